"""Speed by concurrency and acceptance by position."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from vllm_gemma4_spec.ops import plots
from vllm_gemma4_spec.ops.bench.report import Run


def save(rows: Sequence[Run], file: Path) -> None:
    """Draw and write ``file``.

    Raises:
        PlotError: matplotlib is missing or the file cannot be written.
    """
    figure, (left, right) = plots.pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for url in dict.fromkeys(r.url for r in rows):
        own = [r for r in rows if r.url == url]
        left.plot([r.concurrency for r in own], [r.aggregate_tok_s for r in own], "o-", label=url)
        for r, style in zip(own, itertools.cycle(("-", "--", ":")), strict=False):  # equal curves must not hide
            shares = r.accepted_by_position
            if shares:
                right.plot(range(1, len(shares) + 1), shares, f"o{style}", label=f"{url}, {r.concurrency} at once")
    left.set(xlabel="requests at once", ylabel="tok/s, all requests", ylim=(0, None))
    left.set_xticks(sorted({r.concurrency for r in rows}))
    right.set(xlabel="draft position", ylabel="share accepted", ylim=(0, 1.02))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    if not right.lines:
        right.text(0.5, 0.5, "the server reports no acceptance", ha="center", transform=right.transAxes)
    plots.save(figure, file)
