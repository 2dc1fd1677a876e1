"""``vllm-gemma4-spec top``: what a running server does, refreshed in the terminal."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from vllm_gemma4_spec.ops.live import Live


def command(
    url: Annotated[str, typer.Option(help="A running vLLM server, e.g. http://127.0.0.1:8000")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    count: Annotated[int, typer.Option(min=0, help="Looks, then end; 0: until Ctrl-C (in a pipe: one).")] = 0,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", show_envvar=True)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per look.")] = False,
) -> None:
    """Show requests, tok/s, acceptance by position and patches of the last interval, again and again.

    JSON keys: running, waiting, kv_cache_used (0 to 1), output_tok_s, drafts_per_s, tokens_per_step (null
    without drafts), accepted_by_position (0 to 1 each), patches (name: processes that have it on), processes.

    Example: vllm-gemma4-spec top --url http://127.0.0.1:8000
    """
    from vllm_gemma4_spec.ops import live, server

    console = Console(highlight=False)
    looks = count or (0 if console.is_terminal and not as_json else 1)
    before = live.look(server.samples(url, api_key), time.monotonic())
    shown = 0
    with Screen(console=console, auto_refresh=False, transient=False) if not as_json else _Nothing() as screen:
        while not looks or shown < looks:
            time.sleep(interval)
            after = live.look(server.samples(url, api_key), time.monotonic())
            figures = live.between(before, after)
            if as_json:
                typer.echo(json.dumps(asdict(figures)))
            elif screen is not None:
                screen.update(_render(url, figures), refresh=True)
            before, shown = after, shown + 1


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _render(url: str, figures: Live) -> RenderableType:
    head = Text.assemble(
        (url, "bold"),
        f"\n{figures.running} running, {figures.waiting} waiting, KV cache {figures.kv_cache_used:.0%} used, "
        f"{figures.output_tok_s:.1f} tok/s",
    )
    parts: list[RenderableType] = [head]
    if figures.tokens_per_step is None:
        parts.append(Text("no drafts in this interval", "dim"))
    else:
        parts.append(Text(f"{figures.drafts_per_s:.1f} drafts/s, {figures.tokens_per_step:.2f} tokens per step"))
        grid = Table.grid(padding=(0, 1))
        for position, share in enumerate(figures.accepted_by_position, 1):
            grid.add_row(f"draft {position}", f"{share:>4.0%}", ProgressBar(total=1.0, completed=share, width=30))
        parts.append(grid)
    if figures.processes:
        partly = [name for name, n in figures.patches.items() if n != figures.processes]
        on = len(figures.patches) - len(partly)
        parts.append(Text(f"{on} patches on in all {figures.processes} processes that report"))
        if partly:
            parts.append(Text(f"not on everywhere: {', '.join(partly)}", "red"))
    else:
        parts.append(Text("no process reports patches; `vllm-gemma4-spec doctor --url` says why", "red"))
    return Group(*parts)
