"""``vllm-gemma4-spec doctor``: is everything as it must be, and if not, what to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_gemma4_spec.cli import _rich as rich

if TYPE_CHECKING:
    from vllm_gemma4_spec.ops.doctor import Finding

_STYLE = {"ok": "green", "note": "cyan", "problem": "bold red"}


def command(
    url: Annotated[str | None, typer.Option(help="A running server, e.g. http://127.0.0.1:8000")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --url: how many workers (GPUs) the server must have.")
    ] = None,
    no_speculation: Annotated[
        bool, typer.Option("--no-speculation", help="With --url: the server is meant to decode plainly.")
    ] = False,
    patience: Annotated[
        float, typer.Option(min=0.1, help="With --url: seconds in which the engine must give one token.")
    ] = 30.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every patch on a line of its own.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="If the server wants one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/reference/json.md has the schema.")] = False,
) -> None:
    """Check versions, device, patches, environment and, with --url, a running server: whether its engine gives
    a token, the patches of every process, whether it speculates and how much is accepted, its model runner and parsers.
    Problems are printed last.

    The exit code is 0 only when there is no problem, 1 with problems, 2 when the server cannot be asked.

    Example: vllm-gemma4-spec doctor --url http://127.0.0.1:8000
    """
    from vllm_gemma4_spec.cli import _checks
    from vllm_gemma4_spec.ops import doctor

    with _checks.slow(f"asking {url}" if url else "looking at what is installed", as_json):
        report = doctor.examine(url, api_key, workers, not no_speculation, patience)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _print(rich.Console(highlight=False), report.findings, verbose)
    if not report.healthy:
        raise typer.Exit(1)


def _print(console: rich.Console, findings: Sequence[Finding], verbose: bool) -> None:
    """In a terminal lines are wrapped and indented; in a pipe or a file they stay whole. Problems come last."""
    problems = [f for f in findings if f.state.value == "problem"]
    fine = [f for f in findings if f.state.value != "problem"]
    for section, found in itertools.groupby(fine, lambda f: f.section):
        rows = list(found)
        if section == "patches" and not verbose:
            console.print(rich.Text("\npatches", "bold"))
            off = [f.name for f in rows if f.state.value == "note"]
            text = f"{len(rows) - len(off)} switched on, fingerprints match" + f"; off: {', '.join(off)}" * bool(off)
            _rows(console, [("note" if off else "ok", f"{text} (-v lists them)")])
            continue
        console.print(rich.Text(f"\n{section}", "bold"))
        _rows(console, _lines(rows))
    many = "s" if len(problems) != 1 else ""
    console.print(rich.Text(f"\n{len(problems)} problem{many}", "bold red" if problems else "bold green"))
    _rows(console, _lines(problems, named=True))


def _rows(console: rich.Console, lines: Iterable[tuple[str, str]]) -> None:
    grid = rich.Table.grid(padding=(0, 1))
    grid.add_column(width=9)
    grid.add_column(overflow="fold")
    for state, text in lines:
        if console.is_terminal:
            grid.add_row(rich.Text(f"  {state}", _STYLE.get(state, "")), text)
        else:
            typer.echo(f"  {state:<7} {text}")
    if console.is_terminal and grid.row_count:
        console.print(grid)


def _lines(findings: Iterable[Finding], named: bool = False) -> Iterator[tuple[str, str]]:
    """State, empty for advice, and text; ``named``: the section before it."""
    for finding in findings:
        state = finding.state.value
        wanted = f" (wanted {finding.wanted})" if finding.wanted and state != "ok" else ""
        yield state, f"{finding.section + ', ' if named else ''}{finding.name}: {finding.found}{wanted}"
        if finding.advice:
            yield "", f"-> {finding.advice}"
