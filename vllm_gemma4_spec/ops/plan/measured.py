"""Step times that were measured (``measured.json``), for the pair and card measured and as a range for others."""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.ops.plan.model import Model, published
from vllm_gemma4_spec.ops.plan.timing import MAX_K, Hardware, Steps, Workload, hardware


@cache
def _rows() -> list[dict[str, Any]]:
    return list(json.loads(Path(__file__).with_name("measured.json").read_text()))


def _drafter(row: dict[str, Any]) -> Model:
    return published(row["drafter"], row["drafter_weights"])


def _target(row: dict[str, Any]) -> Model:
    return published(row["target"], row["weights"])


def _same(model: Model, other: Model) -> bool:
    return type(model) is type(other) and (model.weights, model.text) == (other.weights, other.text)


def _at(runs: dict[str, dict[str, float]], requests: int) -> dict[str, float] | None:
    """Milliseconds at ``requests``, between two measured numbers on the line between them; None beyond them."""
    counts = sorted(map(int, runs))
    place = bisect_left(counts, requests)
    if place == len(counts):
        return None
    high = counts[place]
    low = counts[place - 1] if place else high
    share = (requests - low) / (high - low) if high > low else 0.0
    one, two = runs[str(low)], runs[str(high)]
    return {key: one[key] + share * (two[key] - one[key]) for key in one}


def steps(machine: Hardware, target: Model, drafter: Model | None, load: Workload) -> tuple[Steps, str] | None:
    """Times of this pair on this card, and the results file; None where nobody measured it.

    A longer context than the measured one reads more KV, which is added at the card's bandwidth. Passes over another
    number of drafts than the measured lie on the lines between plain decoding's pass and the measured ones.
    """
    for row in _rows():
        fits = row["card"] == machine.name and _same(target, _target(row))
        ms = _at(row["ms"], load.requests)
        if not fits or ms is None or not (drafter is None or _same(drafter, _drafter(row))):
            continue
        short = Workload(load.requests, row["context"], load.kv_bytes)

        def more(model: Model, short: Workload = short) -> float:
            return max(0.0, load.kv_bytes_read(model) - short.kv_bytes_read(model)) / machine.bandwidth

        passes = [ms["step"], *_passes(ms["plain_pass"], _verified(ms))[1:]]
        drafts = [0.0, *(ms["first_draft"] + ms["further_draft"] * (k - 1) for k in range(1, MAX_K + 1))]
        extra = more(drafter) if drafter else 0.0
        return (
            Steps(
                tuple(d / 1e3 + k * extra for k, d in enumerate(drafts)),
                tuple(p / 1e3 + more(target) for p in passes),
                ms["rest"] / 1e3,
            ),
            row["source"],
        )
    return None


def _verified(ms: dict[str, float]) -> dict[int, float]:
    """k -> milliseconds of the target's pass over k + 1 tokens a request, of each k measured."""
    return {int(key.partition("@")[2]): value for key, value in ms.items() if key.startswith("verify@")}


def _passes(plain: float, verified: dict[int, float]) -> list[float]:
    """For k = 0, 1, … ``MAX_K``; no pass is faster than one over fewer tokens. Past the last, the line from 0 to it."""
    points = [(0, min(plain, *verified.values())), *sorted(verified.items())]
    last, most = points[-1]
    slope = max(0.0, most - points[0][1]) / last
    out: list[float] = []
    for k in range(MAX_K + 1):
        value = most + slope * (k - last)
        for (a, low), (b, high) in itertools.pairwise(points):
            if a <= k <= b:
                value = low + (high - low) * (k - a) / (b - a)
        out.append(max([value, *out[-1:]]))
    return out


@dataclass(frozen=True)
class Slowest:
    """Measured times over floors, the largest of any pair: of a pass of the target and of the drafter.

    A mixture of experts reads little and launches much, so its ratio is its own (31B 2.3, 26B-A4B 6 on an H200).
    ``overhead``: the most seconds that a step with drafts took beside its passes.
    """

    target: float
    draft: float
    overhead: float


@cache
def slowest(requests: int, experts: bool) -> Slowest:
    """``experts``: the target is a mixture of experts.

    At the measured number of requests that is next above ``requests``; at the most that were measured, beyond it.
    """
    target, draft, overhead = 1.0, 1.0, 0.0
    for row in _rows():
        counts = sorted(map(int, row["ms"]))
        n = counts[min(bisect_left(counts, requests), len(counts) - 1)]
        ms, card = row["ms"][str(n)], hardware()[row["card"]]
        load = Workload(n, row["context"], 2.0)
        floors = Steps.floors(_target(row), _drafter(row), load, card.bandwidth)
        overhead = max(overhead, ms["rest"] / 1e3)
        draft = max(draft, ms["first_draft"] / 1e3 / floors.drafts[1], ms["further_draft"] / 1e3 / floors.drafts[1])
        if bool(_target(row).experts) == experts:
            over = (value / 1e3 / floors.target[k] for k, value in _verified(ms).items())
            target = max(target, ms["step"] / 1e3 / floors.target[0], *over)
    return Slowest(target, draft, overhead)
