"""``vllm-gemma4-spec doctor``: is everything as it must be, and if not, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from vllm_gemma4_spec.ops.doctor import Finding

_STYLE = {"ok": "green", "note": "cyan", "problem": "bold red"}


def command(
    url: Annotated[str | None, typer.Option(help="A running server, e.g. http://127.0.0.1:8000")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --url: how many workers (GPUs) the server must have.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", show_envvar=True)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/json.md has the schema.")] = False,
) -> None:
    """Check versions, device, patches, environment and, with --url, every process of a running server.

    The exit code is 0 only when there is no problem, 1 with problems, 2 when the server cannot be asked.

    Example: vllm-gemma4-spec doctor --url http://127.0.0.1:8000
    """
    from vllm_gemma4_spec.ops import doctor

    report = doctor.examine(url, api_key, workers)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _print(Console(highlight=False), report.findings)
    if not report.healthy:
        raise typer.Exit(1)


def _print(console: Console, findings: Sequence[Finding]) -> None:
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            console.print(f"\n[bold]{section}[/bold]")
        style = _STYLE[finding.state.value]
        line = f"  [{style}]{finding.state.value:<7}[/{style}]  {escape(finding.name)}: {escape(finding.found)}"
        if finding.wanted and finding.state.value != "ok":
            line += f" (wanted {escape(finding.wanted)})"
        console.print(line, soft_wrap=not console.is_terminal)
        if finding.advice:
            console.print(f"           -> {escape(finding.advice)}", soft_wrap=not console.is_terminal)
    problems = sum(f.state.value == "problem" for f in findings)
    console.print(f"\n{problems} problem{'s' if problems != 1 else ''}" if problems else "\nall well")
