"""``vllm-gemma4-spec doctor``: is everything as it must be, and if not, what to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from vllm_gemma4_spec.ops.doctor import Finding

_STYLE = {"ok": "green", "note": "cyan", "problem": "bold red"}


def command(
    url: Annotated[str | None, typer.Option(help="A running server, e.g. http://127.0.0.1:8000")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --url: how many workers (GPUs) the server must have.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="If the server wants one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/reference/json.md has the schema.")] = False,
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
    """In a terminal lines are wrapped and indented; in a pipe or a file they stay whole."""
    for section, found in itertools.groupby(findings, lambda f: f.section):
        console.print(Text(f"\n{section}", "bold"))
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=9)
        grid.add_column(overflow="fold")
        for state, text in _lines(found):
            if console.is_terminal:
                grid.add_row(Text(f"  {state}", _STYLE.get(state, "")), text)
            else:
                typer.echo(f"  {state:<7} {text}")
        console.print(grid if console.is_terminal else "", end="")
    problems = sum(f.state.value == "problem" for f in findings)
    console.print(f"\n{problems} problem{'s' if problems != 1 else ''}" if problems else "\nall well")


def _lines(findings: Iterable[Finding]) -> Iterator[tuple[str, str]]:
    """State, empty for advice, and text."""
    for finding in findings:
        state = finding.state.value
        wanted = f" (wanted {finding.wanted})" if finding.wanted and state != "ok" else ""
        yield state, f"{finding.name}: {finding.found}{wanted}"
        if finding.advice:
            yield "", f"-> {finding.advice}"
