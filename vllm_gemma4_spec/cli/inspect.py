"""``vllm-gemma4-spec inspect``: what a checkpoint holds and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_gemma4_spec.cli import _rich as rich
from vllm_gemma4_spec.cli._tables import show


def command(
    path: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show architecture, quantization per kind of layer, NaN block scales and what vLLM does with it.

    Of an MTP assistant the tensors are compared with its network.

    Exit code: 0 clean, 1 NaN block scales, 2 the checkpoint cannot be read.

    Example: vllm-gemma4-spec inspect ./gemma-4-31B-NVFP4
    """
    from vllm_gemma4_spec.cli import _checks
    from vllm_gemma4_spec.cli._progress import shards

    checkpoint = _checks.checkpoint(path)
    if checkpoint.config.get("model_type") == "gemma4_assistant":
        from vllm_gemma4_spec.mtp import weights

        weights.compare_checkpoint(checkpoint)
    _checks.say("importing torch", as_json)
    from vllm_gemma4_spec.checkpoints.inspection import Report, inspect

    with shards("reading", len(checkpoint.files), quiet=as_json) as step:
        report: Report = inspect(checkpoint, step)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _print(report)
    if not report.clean:
        raise typer.Exit(1)


def _print(report: object) -> None:
    from vllm_gemma4_spec.checkpoints.inspection import Report

    assert isinstance(report, Report)
    console = rich.Console()
    console.print(f"[bold]{report.path}[/bold]  {', '.join(report.architectures)}", highlight=False)
    form = report.algorithm or "not quantized"
    by = f", by {report.producer}" if report.producer else ""
    cache = f", KV cache {report.kv_cache}" if report.kv_cache else ""
    size = f"{report.bytes / 1e9:.2f} GB in {report.shards} shards, {report.tensors} tensors"
    console.print(f"{form}{by}{cache}; {size}", highlight=False)
    table = rich.Table(rich.Column("kind", overflow="fold"), "layers", "format", "pre_quant_scale", "low rank", "MB")
    for kind in report.kinds:
        formats = ", ".join(
            f"{name} {count}" if len(kind.formats) > 1 else name for name, count in kind.formats.items()
        )
        row = [kind.kind, str(kind.layers), formats, str(kind.pre_quant_scale or ""), str(kind.low_rank or "")]
        table.add_row(*row, f"{kind.bytes / 1e6:.1f}")
    show(console, table)
    if report.nan:
        table = rich.Table(
            rich.Column("NaN block scales in", overflow="fold"), "blocks", "codes destroyed", "codes intact"
        )
        for layer in report.nan:
            table.add_row(layer.module, str(layer.blocks), str(layer.destroyed), str(layer.intact))
        show(console, table)
    console.print(f"vLLM 0.19.1 alone: {report.vllm_alone}", highlight=False)
    console.print(f"with the plugin:  {report.with_overlay}", highlight=False)
    for machine, text in report.machines.items():
        console.print(f"  {machine}: {text}", highlight=False)
