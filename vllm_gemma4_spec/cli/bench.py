"""``vllm-gemma4-spec bench``: the published table for one server, or two of them run for run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def command(
    url: Annotated[str, typer.Option(help="An OpenAI-compatible server, e.g. http://127.0.0.1:8000")],
    prompts: Annotated[Path, typer.Option(help="JSONL: MT-bench, Spec-Bench, or lines of {'prompt': …}.")],
    against: Annotated[str | None, typer.Option(help="A second server, run in turn; prints ratios.")] = None,
    concurrency: Annotated[str, typer.Option(help="Requests at once, by commas.")] = "1,2,4",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 300,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each run.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind; means are printed.")] = 1,
    model: Annotated[str | None, typer.Option(help="Name to ask for. Default: the first of /v1/models.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", show_envvar=True)] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this file (PNG, SVG, PDF).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/bench.md has the schema.")] = False,
) -> None:
    """Measure tok/s, latency and acceptance with vLLM's own `vllm bench serve`; prints Markdown.

    The exit code is 1 if any request failed.

    Example: vllm-gemma4-spec bench --url http://127.0.0.1:8000 --prompts mt_bench.jsonl
    """
    from vllm_gemma4_spec.ops import bench

    try:
        counts = [int(part) for part in concurrency.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise bench.BenchError(f"--concurrency {concurrency}: write whole numbers above 0 by commas, e.g. 1,2,4")
    texts = bench.prompts(prompts, requests)
    urls = [url] + ([against] if against else [])
    if against == url:
        raise bench.BenchError("--against is the same server as --url; give the address of another")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("starting", total=len(counts) * repeats * len(urls))
        started = 0

        def step(what: str) -> None:
            nonlocal started
            progress.update(task, completed=started, description=what)
            started += 1

        runs = bench.measure(urls, texts, counts, tokens, repeats, model, api_key, step)
    rows = bench.summary(runs)
    compared = bench.ratios(rows, url, against) if against else []
    if as_json:
        typer.echo(json.dumps({"summary": rows, "ratios": compared, "runs": [asdict(r) for r in runs]}, indent=2))
    else:
        typer.echo(bench.markdown(rows, compared))
    if plot:
        bench.plot(rows, plot)
    if any(r.errors for r in runs):
        raise typer.Exit(1)
