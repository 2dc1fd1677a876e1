"""Which number of draft tokens pays, from measured pass times and an acceptance rate.

    python benchmarks/best_k.py results.json            # from a run of full_shape.py
    python benchmarks/best_k.py --verify 11 --other 1 --first 5 --further 5 --plain 11.5

A step with k drafts costs ``verify + other + first + (k - 1) * further`` ms and yields
``1 + a + a^2 + … + a^k`` tokens if every position is accepted with chance ``a``; k = 0 is plain decoding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

MOST = 8
RATES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def acceptance_length(rate: float, k: int) -> float:
    return sum(rate**i for i in range(k + 1))


def step_ms(step: dict[str, float], k: int) -> float:
    if k == 0:
        return step["plain"]
    return step["verify"] + step["other"] + step["first"] + (k - 1) * step["further"]


def best_k(step: dict[str, float], rate: float, most: int = MOST) -> tuple[int, float]:
    """The k with the most tokens per second, and its gain over plain decoding."""
    gains = [acceptance_length(rate, k) * step["plain"] / step_ms(step, k) for k in range(most + 1)]
    k = max(range(most + 1), key=gains.__getitem__)
    return k, gains[k]


def from_results(path: Path) -> dict[int, dict[str, float]]:
    """Concurrency -> times in ms, of the engines ``stock`` (or ``plain``) and the first ``spec…``."""
    engines = json.loads(path.read_text())["engines"]
    spec = next(of for name, of in engines.items() if name.startswith("spec"))
    plain = {r["concurrency"]: r["step"] for r in engines.get("stock", engines.get("plain"))["runs"]}
    out = {}
    for run in spec["runs"]:
        n = run["concurrency"]
        parts = spec["draft_parts"][str(n)]
        times = {"verify": run["verify"], "other": run["sampling"] + run["gap"], "plain": plain[n]}
        out.setdefault(n, times | {"first": parts["first"], "further": parts["further"]})
    return out


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("results", type=Path, nargs="?", help="JSON written by full_shape.py")
    for name in ("verify", "other", "first", "further", "plain"):
        ap.add_argument(f"--{name}", type=float, help="ms")
    args = ap.parse_args()
    if args.results:
        steps = from_results(args.results)
    else:
        names = ("verify", "other", "first", "further", "plain")
        given = {n: getattr(args, n) for n in names}
        if None in given.values():
            ap.error("give a results file, or --verify, --other, --first, --further and --plain in ms")
        steps = {1: given}
    print("c    " + "  ".join(f"a = {rate:<9}" for rate in RATES))
    for n, step in steps.items():
        cells = [best_k(step, rate) for rate in RATES]
        print(f"{n:<4d} " + "  ".join(f"k = {k}, {gain:4.2f}x" for k, gain in cells))


if __name__ == "__main__":
    main()
