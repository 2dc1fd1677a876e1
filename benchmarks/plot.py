"""Draw what ``full_shape.py`` measured: ``plot.py results.json figure.svg [ENGINE]`` (needs matplotlib).

Speed over plain decoding, where the file has an engine without drafts, and what a step is made of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = ("verify", "sampling", "draft", "gap")


def main(source: Path, figure: Path, engine: str = "spec") -> None:
    results = json.loads(source.read_text())
    engines = results.get("engines", {"spec": results})
    plain = engines.get("stock", engines.get("plain", {"runs": []}))
    base = {r["concurrency"]: r["tokens_per_s"] for r in plain["runs"]}
    runs = engines[engine]["runs"]
    fig, axes = plt.subplots(1, 2 if base else 1, figsize=(11 if base else 5.5, 4), squeeze=False, layout="constrained")
    if base:
        speed = axes[0][0]
        for rate in sorted({r["acceptance"] for r in runs}, key=str, reverse=True):
            line = [r for r in runs if r["acceptance"] == rate and r["concurrency"] in base]
            speed.plot(
                [r["concurrency"] for r in line],
                [r["tokens_per_s"] / base[r["concurrency"]] for r in line],
                marker="o",
                label=f"acceptance {rate}",
            )
        if "stock" in engines and "plain" in engines:
            line = [r for r in engines["plain"]["runs"] if r["concurrency"] in base]
            speed.plot(
                [r["concurrency"] for r in line],
                [r["tokens_per_s"] / base[r["concurrency"]] for r in line],
                marker="o",
                color="black",
                linestyle="--",
                label="no drafts, with the plugin",
            )
        speed.axhline(1.0, color="grey", linewidth=0.8)
        speed.set(xlabel="requests at a time", ylabel="tok/s over stock plain decoding", xscale="log", ylim=(0, None))
        sizes = sorted(base)
        speed.set_xticks(sizes, [str(n) for n in sizes])
        speed.minorticks_off()
        speed.grid(alpha=0.3)
        speed.legend(frameon=False)
    split = axes[0][-1]
    rates = [r["acceptance"] for r in runs]
    first = [r for r in runs if r["acceptance"] == max(rates, key=rates.count)]  # of which no row is left out
    bottom = [0.0] * len(first)
    for part in PARTS:
        heights = [r[part] for r in first]
        split.bar([str(r["concurrency"]) for r in first], heights, 0.6, bottom=bottom, label=part)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    split.set(xlabel="requests at a time", ylabel="ms of a step", ylim=(0, 1.25 * max(bottom)))
    split.legend(ncols=len(PARTS), frameon=False, loc="upper center")
    fig.savefig(figure, dpi=120, metadata={"Date": None} if figure.suffix == ".svg" else None)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit("usage: plot.py results.json figure.svg [ENGINE]")
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
