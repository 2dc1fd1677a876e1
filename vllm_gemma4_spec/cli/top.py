"""``vllm-gemma4-spec top``: what a running server does, refreshed in the terminal."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from vllm_gemma4_spec.ops.live import Live

HISTORY = 30  # looks in the small curves
_EIGHTHS = "▁▂▃▄▅▆▇█"


def command(
    url: Annotated[str, typer.Option(help="A running vLLM server, e.g. http://127.0.0.1:8000")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    count: Annotated[int, typer.Option(min=0, help="Looks, then end; 0: until Ctrl-C (in a pipe: one).")] = 0,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="If the server wants one.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per look; docs/reference/json.md has the schema.")
    ] = False,
) -> None:
    """Show requests, tok/s, acceptance by position, skipped drafts, NaN blocks and patches, again and again.

    Rates are those of the last interval; the curves beside them go back 30 of them.

    Example: vllm-gemma4-spec top --url http://127.0.0.1:8000
    """
    from vllm_gemma4_spec.ops import live, server

    console = Console(highlight=False)
    looks = count or (0 if console.is_terminal and not as_json else 1)
    before = live.look(server.samples(url, api_key), time.monotonic())
    history: deque[Live] = deque(maxlen=HISTORY)
    shown = 0
    live_screen = console.is_terminal and not as_json
    screen = Screen(console=console, auto_refresh=False, transient=False) if live_screen else None
    with screen or contextlib.nullcontext():
        while not looks or shown < looks:
            time.sleep(interval)
            after = live.look(server.samples(url, api_key), time.monotonic())
            history.append(live.between(before, after))
            if as_json:
                typer.echo(history[-1].model_dump_json())
            elif screen is None:
                console.print(_render(url, history))
            else:
                screen.update(_render(url, history), refresh=True)
            before, shown = after, shown + 1


def _render(url: str, history: Sequence[Live]) -> RenderableType:
    figures = history[-1]
    parts: list[RenderableType] = [
        Text(url, "bold"),
        Text(
            f"{figures.running} running, {figures.waiting} waiting, KV cache {figures.kv_cache_used:.0%} used, "
            f"{figures.output_tok_s:.1f} tok/s"
        ),
    ]
    if figures.tokens_per_step is None:
        parts.append(Text("no drafts in this interval", "dim"))
    else:
        parts.append(Text(f"{figures.drafts_per_s:.1f} drafts/s, {figures.tokens_per_step:.2f} tokens per step"))
        parts.append(_positions(history))
    if figures.drafts_skipped:
        parts.append(Text(f"{figures.drafts_skipped} drafts skipped near the maximum length", "yellow"))
    if figures.nan_blocks_repaired:
        parts.append(Text(f"{figures.nan_blocks_repaired} NaN blocks repaired at load", "yellow"))
    if figures.processes:
        partly = [name for name, n in figures.patches.items() if n != figures.processes]
        on = len(figures.patches) - len(partly)
        parts.append(Text(f"{on} patches on in all {figures.processes} processes that report"))
        if partly:
            parts.append(Text(f"not on everywhere: {', '.join(partly)}", "red"))
    else:
        parts.append(Text("no process reports patches; `vllm-gemma4-spec doctor --url` says why", "red"))
    return Group(*parts)


def _positions(history: Sequence[Live]) -> Table:
    """Share, bar and curve of each draft position."""
    grid = Table.grid(padding=(0, 1))
    for wraps in (False, False, True, False):
        grid.add_column(no_wrap=not wraps, overflow="crop")
    for position, share in enumerate(history[-1].accepted_by_position):
        past = [h.accepted_by_position[position] for h in history if len(h.accepted_by_position) > position]
        bar = ProgressBar(total=1.0, completed=share, width=20)
        grid.add_row(f"draft {position + 1}", f"{share:>4.0%}", bar, Text(curve(past), "cyan"))
    return grid


def curve(shares: Sequence[float]) -> str:
    """One character per share of 0 to 1."""
    return "".join(_EIGHTHS[min(7, int(share * 8))] for share in shares)
