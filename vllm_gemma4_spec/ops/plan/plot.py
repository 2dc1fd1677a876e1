"""Tokens per second by k, one panel per machine, one line per acceptance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from vllm_gemma4_spec.ops import plots

# machine -> acceptance as written -> tokens per second for k = 0, 1, …
Speeds = Mapping[str, Mapping[str, list[float]]]


def save(speeds: Speeds, title: str, file: Path) -> None:
    """Draw and write ``file`` (PNG, SVG or PDF by its ending).

    Raises:
        PlotError: matplotlib is missing, the ending is unknown or the file cannot be written.
    """
    columns = min(3, len(speeds))
    rows = math.ceil(len(speeds) / columns)
    width = max(3.6 * columns, 5.4)  # room for the title over a single panel
    figure, axes = plots.pyplot().subplots(
        rows, columns, figsize=(width, 2.9 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(speeds) :]:
        axis.set_visible(False)
    for axis, (machine, lines) in zip(axes.flat, speeds.items(), strict=False):
        for acceptance, values in lines.items():
            best = max(range(len(values)), key=values.__getitem__)
            (line,) = axis.plot(range(len(values)), values, label=f"a = {acceptance}", linewidth=1.5)
            axis.plot(best, values[best], "o", color=line.get_color(), markersize=5)
        axis.set_title(machine, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.set_xticks(range(0, len(next(iter(lines.values()))), 2))
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("tok/s")
    for axis in axes[-1, :]:
        axis.set_xlabel("k (num_speculative_tokens)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    plots.save(figure, file)
