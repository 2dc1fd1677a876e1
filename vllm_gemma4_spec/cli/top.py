"""``vllm-gemma4-spec top``: what a running server does, refreshed in the terminal."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_gemma4_spec.cli import _keys
from vllm_gemma4_spec.cli import _rich as rich

if TYPE_CHECKING:
    from vllm_gemma4_spec.ops.live import Live

HISTORY = 30  # samples in the small curves
_EIGHTHS = "▁▂▃▄▅▆▇█"


def command(
    url: Annotated[str, typer.Option(help="A running vLLM server, e.g. http://127.0.0.1:8000")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two samples.")] = 2.0,
    count: Annotated[int, typer.Option(min=0, help="Samples, then end; 0: until q or Ctrl-C (in a pipe: one).")] = 0,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="If the server wants one.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per sample; `schema top` describes it.")
    ] = False,
) -> None:
    """Show a server live: requests, tok/s, latencies, prefix hits, acceptance by position, patches. `q` ends it.

    Rates and means are those of the last interval; the curves go back 30 of them. A server that is restarted is
    waited for.

    Example: vllm-gemma4-spec top --url http://127.0.0.1:8000
    """
    from vllm_gemma4_spec.ops import live, server

    before = live.sample_server(server.vllm_samples(url, api_key), time.monotonic())
    console = rich.Console(highlight=False)
    in_terminal = console.is_terminal and not as_json
    samples = count or (0 if in_terminal else 1)
    history: deque[Live] = deque(maxlen=HISTORY)
    shown = 0
    screen = rich.Live(console=console, auto_refresh=False, transient=False) if in_terminal else None
    with _keys.single_keys() as keys, screen or contextlib.nullcontext():
        while not samples or shown < samples:
            if _keys.wait(interval, keys and in_terminal):
                return
            try:
                after = live.sample_server(server.vllm_samples(url, api_key), time.monotonic())
            except server.ServerError as error:
                if screen is None:
                    raise
                screen.update(
                    rich.Group(rich.Text(str(error), "yellow"), rich.Text("waiting for it; q ends")), refresh=True
                )
                continue
            history.append(live.between(before, after))
            if as_json:
                typer.echo(history[-1].model_dump_json())
            elif screen is None:
                console.print(_render(url, history))
            else:
                screen.update(_render(url, history), refresh=True)
            before, shown = after, shown + 1


def _render(url: str, history: Sequence[Live]) -> rich.RenderableType:
    now = history[-1]
    method = f"{now.method or 'speculation'}, k = {now.k}" if now.k else "no speculation"
    parts: list[rich.RenderableType] = [
        rich.Text.assemble((url, "bold"), f"  {now.model}, {method}"),
        rich.Text(
            f"{now.running} running, {now.waiting} waiting, {now.preempted} preempted; "
            f"KV cache {now.kv_cache_used:.0%} used, prefix hits {_share(now.prefix_hits)}"
        ),
        _curves(history),
    ]
    if now.acceptance_length is None:
        parts.append(rich.Text("no drafts in this interval", "dim"))
    else:
        parts.append(rich.Text(f"{now.drafts_per_s:.1f} drafts/s, acceptance length {now.acceptance_length:.2f}"))
        parts.append(_positions(history))
    if now.drafts_skipped:
        parts.append(rich.Text(f"{now.drafts_skipped} drafts dropped near the maximum length", "yellow"))
    if now.nan_blocks_repaired:
        parts.append(rich.Text(f"{now.nan_blocks_repaired} NaN blocks repaired at load", "yellow"))
    if now.processes:
        partly = [name for name, n in now.patches.items() if n != now.processes]
        on = len(now.patches) - len(partly)
        parts.append(rich.Text(f"{on} patches on in all {now.processes} processes that report"))
        if partly:
            parts.append(rich.Text(f"not on everywhere: {', '.join(partly)}", "red"))
    else:
        parts.append(rich.Text("no process reports patches; `vllm-gemma4-spec doctor --url` says why", "red"))
    return rich.Group(*parts)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _curves(history: Sequence[Live]) -> rich.Table:
    """Throughput and latencies: now, and the last intervals from their least to their most."""
    grid = rich.Table.grid(padding=(0, 1))
    for wraps in (False, False, True):
        grid.add_column(no_wrap=not wraps, overflow="crop")
    rows: dict[str, list[float | None]] = {
        "tok/s": [h.output_tok_s for h in history],
        "TTFT ms": [h.ttft_ms for h in history],
        "inter-token latency ms": [h.itl_ms for h in history],
    }
    for name, values in rows.items():
        last = values[-1]
        known = [v for v in values if v is not None]
        most = max(known, default=0.0) or 1.0
        grid.add_row(name, "-" if last is None else f"{last:.1f}", rich.Text(curve([v / most for v in known]), "cyan"))
    return grid


def _positions(history: Sequence[Live]) -> rich.Table:
    """Share, bar and curve of each draft position, counted from 0 as in vLLM's metrics."""
    grid = rich.Table.grid(padding=(0, 1))
    for wraps in (False, False, True, False):
        grid.add_column(no_wrap=not wraps, overflow="crop")
    for position, share in enumerate(history[-1].accepted_by_position):
        past = [h.accepted_by_position[position] for h in history if len(h.accepted_by_position) > position]
        bar = rich.ProgressBar(total=1.0, completed=share, width=20)
        grid.add_row(f"position {position}", f"{share:>4.0%}", bar, rich.Text(curve(past), "cyan"))
    return grid


def curve(shares: Sequence[float]) -> str:
    """One character per share of 0 to 1."""
    return "".join(_EIGHTHS[max(0, min(7, int(share * 8)))] for share in shares)
