"""``vllm-gemma4-spec repair``: a copy of a checkpoint without NaN block scales."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_gemma4_spec.cli import _rich as rich
from vllm_gemma4_spec.cli._tables import show


def command(
    path: Annotated[Path, typer.Argument(help="Folder of the quantized checkpoint; it is only read.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.")],
    parent: Annotated[
        Path | None, typer.Option("--parent", help="The bf16 checkpoint it was quantized from: restores lost blocks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Saturate NaN scales whose codes are intact; requantize destroyed blocks from the parent, or zero them.

    OUT appears when it is complete. Exit code: 0 written, 2 bad input or no space.

    Example: vllm-gemma4-spec repair ./gemma-4-31B-NVFP4 --out ./repaired --parent ./gemma-4-31B-it
    """
    from vllm_gemma4_spec.cli import _checks
    from vllm_gemma4_spec.cli._progress import shards

    checkpoint = _checks.checkpoint(path)
    source = _checks.checkpoint(parent) if parent is not None else None
    _checks.new_folder("--out", out)
    _checks.say("importing torch", as_json)
    from vllm_gemma4_spec.checkpoints.repairing import repair

    with shards("repairing", 2 * len(checkpoint.files), quiet=as_json) as step:
        done = repair(checkpoint, out, source, step)
    if as_json:
        typer.echo(done.model_dump_json(indent=2))
        return
    console = rich.Console()
    if done.changes:
        table = rich.Table(rich.Column("layer", overflow="fold"), "saturated", "zeroed", "restored from the parent")
        for change in done.changes:
            table.add_row(change.module, str(change.saturated), str(change.zeroed), str(change.restored))
        show(console, table)
    what = f"{len(done.changes)} layers in {len(done.rewritten)} files changed" if done.changes else "nothing to repair"
    console.print(f"{what}; written to {done.out}", highlight=False)
