"""Draw what ``full_shape.py`` measured: ``plot.py results.json figure.png`` (needs matplotlib)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = ("verify", "sampling", "draft", "gap")


def main(source: Path, figure: Path) -> None:
    engines = json.loads(source.read_text())["engines"]
    base = {r["concurrency"]: r["tokens_per_s"] for r in engines.get("stock", engines.get("plain"))["runs"]}
    fig, (speed, split) = plt.subplots(1, 2, figsize=(11, 4))
    runs = [r for r in engines["spec"]["runs"] if r["concurrency"] in base]
    for rate in sorted({r["acceptance"] for r in runs}, reverse=True):
        line = [r for r in runs if r["acceptance"] == rate]
        speed.plot(
            [r["concurrency"] for r in line],
            [r["tokens_per_s"] / base[r["concurrency"]] for r in line],
            marker="o",
            label=f"acceptance {rate}",
        )
    speed.axhline(1.0, color="grey", linewidth=0.8)
    speed.set(xlabel="requests at a time", ylabel="tok/s over plain decoding", xscale="log")
    speed.legend()
    first = [r for r in runs if r["acceptance"] == runs[0]["acceptance"]]
    bottom = [0.0] * len(first)
    for part in PARTS:
        heights = [r[part] for r in first]
        split.bar([str(r["concurrency"]) for r in first], heights, bottom=bottom, label=part)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    split.set(xlabel="requests at a time", ylabel="ms of a step")
    split.legend()
    fig.tight_layout()
    fig.savefig(figure, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: plot.py results.json figure.png")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
