"""``vllm-gemma4-spec demo-models``: make the demo's target and its drafters, or check the pair that is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_gemma4_spec.cli import _rich as rich
from vllm_gemma4_spec.cli._tables import show
from vllm_gemma4_spec.ops.output import Output

if TYPE_CHECKING:
    from vllm_gemma4_spec.demo import build


class Report(Output):
    """The pair in a folder."""

    target: str
    drafter: str
    assistant: str
    """an MTP assistant of the target"""
    made_now: bool
    """false: it was there, and its checksums are right"""
    measured: dict[str, Any]
    """as in `manifest.json`: right answers by kind, acceptance length and by position, seconds it took to make"""


def command(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for the pair.", show_default="$VLLM_GEMMA4_SPEC_DEMO_DIR or the user's cache"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make the pair again, also where one is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/reference/json.md has the schema.")] = False,
) -> None:
    """Train the demo's target, drafter and MTP assistant on this machine's CPU (about three minutes on 2 cores), once.

    A pair that is there is checked against its checksums and kept.

    Example: vllm-gemma4-spec demo-models --out ./pair
    """
    from vllm_gemma4_spec.demo import build

    folder = out.expanduser().absolute() if out else build.default_folder()
    pair, made = ensure_with_bar(folder, force)
    if as_json:
        found = Report(
            target=str(pair.target),
            drafter=str(pair.drafter),
            assistant=str(pair.assistant),
            made_now=made,
            measured=pair.measured,
        )
        typer.echo(found.model_dump_json(indent=2))
        return
    measured = pair.measured
    table = rich.Table("demo pair", "made now" if made else "found, checksums right", show_header=True)
    table.add_row("target", str(pair.target))
    table.add_row("drafter", str(pair.drafter))
    table.add_row("assistant", str(pair.assistant))
    for kind, (right, asked) in measured["right_by_kind"].items():
        table.add_row(f"right answers: {kind}", f"{right} of {asked}")
    table.add_row(f"acceptance length, k = {measured['drafts']}", f"{measured['acceptance_length']:.2f}")
    table.add_row("of the assistant", f"{measured['assistant_acceptance_length']:.2f}")
    table.add_row("time to make", f"{measured['seconds']:.0f} s ({measured['cpu_seconds']:.0f} CPU s)")
    show(rich.Console(), table)


def ensure_with_bar(folder: Path, force: bool = False) -> tuple[build.Pair, bool]:
    """:func:`build.ensure` with a progress bar on stderr while something is trained."""
    from vllm_gemma4_spec.demo import build

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TextColumn("{task.completed:.0f}/{task.total:.0f} steps  loss {task.fields[loss]:.3f}"),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    bar = rich.Progress(*columns, console=rich.Console(stderr=True))
    tasks: dict[str, rich.TaskID] = {}

    def advanced(name: str, step: int, steps: int, loss: float) -> None:
        bar.start()  # only now: nothing is drawn while a pair that is there is checked
        if name not in tasks:
            tasks[name] = bar.add_task(f"training the {name}", total=steps, loss=loss)
        bar.update(tasks[name], completed=step, loss=loss)

    try:
        return build.ensure(folder, force, advanced)
    finally:
        if tasks:
            bar.stop()
