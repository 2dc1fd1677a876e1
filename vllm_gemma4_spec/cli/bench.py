"""``vllm-gemma4-spec bench``: the published table for one server, or two of them run for run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def command(
    url: Annotated[str, typer.Option(help="An OpenAI-compatible server, e.g. http://127.0.0.1:8000")],
    prompts: Annotated[Path, typer.Option(help="JSONL: MT-bench, Spec-Bench, or lines of {'prompt': …}.")],
    against: Annotated[str | None, typer.Option(help="A second server, run in turn; prints ratios.")] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, by commas.")] = "1,2,4",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 300,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each run.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind; medians are printed.")] = 1,
    model: Annotated[str | None, typer.Option(help="Name to ask for. Default: the first of /v1/models.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="If the server wants one.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this file (PNG, SVG, PDF).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/reference/json.md has the schema.")] = False,
) -> None:
    """Measure tok/s, latency and acceptance with vLLM's own `vllm bench serve`; prints Markdown.

    The exit code is 1 if any request failed.

    Example: vllm-gemma4-spec bench --url http://127.0.0.1:8000 --prompts mt_bench.jsonl
    """
    from vllm_gemma4_spec.ops import plots
    from vllm_gemma4_spec.ops.bench import measure, report
    from vllm_gemma4_spec.ops.bench.plot import save

    try:
        counts = [int(part) for part in concurrency.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise report.BenchError(f"--concurrency {concurrency}: write whole numbers above 0 by commas, e.g. 1,2,4")
    texts = measure.prompts(prompts, requests)
    urls = [url] + ([against] if against else [])
    if against == url:
        raise report.BenchError("--against is the same server as --url; give the address of another")
    if plot:
        plots.check(plot)
    progress_console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=progress_console, disable=not progress_console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("starting", total=len(counts) * repeats * len(urls))
        started = 0

        def step(what: str) -> None:
            nonlocal started
            progress.update(task, completed=started, description=what)
            started += 1

        runs = measure.measure(urls, texts, counts, tokens, repeats, model, api_key, step)
    found = report.Report(
        summary=report.summary(runs), ratios=report.ratios(runs, url, against) if against else [], runs=runs
    )
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        _print(report.markdown(found.summary, found.ratios))
    if plot:
        save(found.summary, plot)
    if any(r.errors for r in runs):
        raise typer.Exit(1)


def _print(markdown: str) -> None:
    """As it is into a pipe or a file; fitted to the width of a terminal."""
    console = Console()
    if console.is_terminal:
        console.print(Markdown(markdown))
    else:
        typer.echo(markdown)
