"""Speed by concurrency and acceptance by position."""

from __future__ import annotations

import itertools
from pathlib import Path

from vllm_gemma4_spec.ops import plots
from vllm_gemma4_spec.ops.bench.report import Report


def save(made: Report, file: Path) -> None:
    """Draw and write ``file``; what was measured is its title.

    Raises:
        PlotError: matplotlib is missing or the file cannot be written.
    """
    figure, (left, right) = plots.pyplot().subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    names = dict(zip((s.url for s in made.servers), "AB", strict=False))
    for url, name in names.items():
        own = [r for r in made.summary if r.url == url]
        left.plot([r.concurrency for r in own], [r.aggregate_tok_s for r in own], "o-", label=name)
        for r, style in zip(own, itertools.cycle(("-", "--", ":")), strict=False):  # equal curves must not hide
            shares = r.accepted_by_position
            if shares:
                right.plot(range(len(shares)), shares, f"o{style}", label=f"{name}, concurrency {r.concurrency}")
    left.set(xlabel="concurrency", ylabel="tok/s, all requests", ylim=(0, None))
    left.set_xticks(sorted({r.concurrency for r in made.summary}))
    right.set(xlabel="position, from 0", ylabel="share accepted", ylim=(0, 1.02))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    if not right.lines:
        right.text(0.5, 0.5, "the server reports no acceptance", ha="center", transform=right.transAxes)
    title = "\n".join([f"{names[s.url]}: {s}" for s in made.servers] + [made.date])
    figure.suptitle(title, fontsize=8)
    plots.save(figure, file)
