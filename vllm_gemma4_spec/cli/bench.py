"""``vllm-gemma4-spec bench``: the published table for one server, or two of them run for run."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from vllm_gemma4_spec.cli import _rich as rich


def command(
    url: Annotated[str, typer.Option(help="An OpenAI-compatible server, e.g. http://127.0.0.1:8000")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL: MT-bench, Spec-Bench, or lines of {'prompt': …}. Default: eight built in."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="A second server, run in turn; prints ratios.")] = None,
    concurrency: Annotated[str, typer.Option(help="How many requests run at once: one number per run.")] = "1,2,4",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 300,
    input_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut or repeat each prompt to so many tokens.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each run.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind; medians are printed.")] = 1,
    warmups: Annotated[int, typer.Option(min=0, help="Requests before each run that are not measured.")] = 1,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests per second (Poisson). Default: at once.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name to ask for. Default: the first of /v1/models.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="If the server wants one.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this file (PNG, SVG, PDF).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; `schema bench` describes it.")] = False,
) -> None:
    """Measure tok/s, latency and acceptance with vLLM's own `vllm bench serve`; prints Markdown.

    vLLM 0.19.1 must be installed where this runs. The exit code is 1 if any request failed.

    Example: vllm-gemma4-spec bench --url http://127.0.0.1:8000 --prompts mt_bench.jsonl
    """
    from vllm_gemma4_spec.cli import _checks
    from vllm_gemma4_spec.ops import plots, server
    from vllm_gemma4_spec.ops.bench import measure, report, servers
    from vllm_gemma4_spec.ops.bench import prompts as asked
    from vllm_gemma4_spec.ops.bench.plot import save

    try:
        counts = [int(part) for part in concurrency.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise report.BenchError(f"--concurrency {concurrency}: give whole numbers above 0, separated by commas: 1,2,4")
    texts = asked.read(prompts, requests) if prompts else asked.repeated(asked.BUILT_IN, requests)
    if plot:
        plots.check(plot)
    with _checks.slow("asking for the model", as_json):
        measured = [servers.identify(one, model, api_key) for one in (url, *([against] if against else []))]
    servers.different(measured)
    measure.check_environment()
    if input_tokens:
        texts = asked.of_length(texts, input_tokens, server.base_url(url), measured[0].model, api_key)
    load = measure.Load(tuple(texts), tokens, warmups, rate)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    console = rich.Console(stderr=True)
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
    )
    with rich.Progress(
        *columns, rich.TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("starting vLLM's benchmark", total=len(counts) * repeats * len(measured) * requests)

        def step(what: str, ended: int) -> None:
            progress.update(task, completed=ended, description=what)

        runs, failures = measure.measure(measured, load, counts, repeats, api_key, step)
    found = report.Report(
        date=date,
        servers=measured,
        tokens=tokens,
        failures=failures,
        summary=report.summary(runs),
        ratios=report.ratios(runs, url, against) if against else [],
        runs=runs,
    )
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        _print(report.markdown(found))
    if plot:
        save(found, plot)
    for failure in failures if as_json else ():
        typer.echo(f"{failure.count} failed on {failure.url}: {failure.message}", err=True)
    if failures:
        raise typer.Exit(1)


def _print(markdown: str) -> None:
    """As it is into a pipe or a file; fitted to the width of a terminal."""
    console = rich.Console()
    if console.is_terminal:
        console.print(rich.Markdown(markdown))
    else:
        typer.echo(markdown)
