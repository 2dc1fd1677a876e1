"""Floors of a decode step from bytes and bandwidth, acceptance length from acceptance, and the k that pays best.

A step with k drafts is k passes of the drafter and one of the target over k + 1 tokens a request::

    time(k)   = k * T_draft + T_target(k + 1) + overhead      (no overhead for k = 0)
    tokens(k) = 1 + a_0 + … + a_(k-1)     a_i: share of steps in which the draft at position i is accepted
    speed(k)  = requests * tokens(k) / time(k)

``a_i`` is the acceptance rate per position of vLLM's ``/metrics``; from one rate p per draft, a_i = p ** (i + 1).
A floor of T is bytes read / bandwidth. Nothing is faster; real steps are slower by launches, arithmetic
and what attention does besides reading: :mod:`.measured` has how much.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.ops.plan.configs import PlanError
from vllm_gemma4_spec.ops.plan.model import Model

MAX_K = 10


@dataclass(frozen=True)
class Hardware:
    """``memory`` in bytes, ``bandwidth`` in bytes per second (measured where it was, else the data sheet's).

    ``marlin``: no FP4 tensor cores, so vLLM multiplies NVFP4 by Marlin.
    """

    name: str
    memory: float
    bandwidth: float
    source: str
    marlin: bool = False


def hardware() -> dict[str, Hardware]:
    """The table ``hardware.json``."""
    return {
        name: Hardware(
            name,
            row["memory"] * 1e9,
            row.get("sustained", row["bandwidth"]) * 1e9,
            row["source"],
            row.get("marlin", False),
        )
        for name, row in _table().items()
    }


def _table() -> dict[str, Any]:
    table = json.loads(Path(__file__).with_name("hardware.json").read_text())
    return {name: row for name, row in table.items() if not name.startswith("_")}


def _plain(name: str) -> str:
    """Lower case without spaces, signs and the maker's words: ``NVIDIA H200 SXM5`` -> ``h200``."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "".join(w for w in words if w not in ("nvidia", "geforce", "sxm", "sxm4", "sxm5", "gpu"))


def named(name: str) -> Hardware:
    """The machine that ``name`` means, however it is spelled: ``h200``, ``NVIDIA H200``, ``DGX Spark``.

    Raises:
        PlanError: none in the table.
    """
    table = _table()
    for known, row in table.items():
        if _plain(name) in map(_plain, (known, *row.get("aliases", ()))):
            return hardware()[known]
    raise PlanError(f"--hardware {name}: choose from {', '.join(table)}, or give --bandwidth and --memory")


@dataclass(frozen=True)
class Workload:
    """``requests`` that decode at once, each at ``context`` tokens; ``kv_bytes`` per number in the cache."""

    requests: int
    context: int
    kv_bytes: float

    def kv_bytes_read(self, model: Model) -> float:
        """Bytes of the cache that one pass reads, once for all tokens of a request."""
        return model.kv_read_bytes(self.context, self.kv_bytes) * self.requests

    def pass_bytes(self, model: Model, tokens: int = 1) -> float:
        """Bytes read by one pass over ``tokens`` tokens of each request."""
        return model.read_bytes(tokens * self.requests) + self.kv_bytes_read(model)


@dataclass(frozen=True)
class Steps:
    """Seconds, for k = 0, 1, … ``MAX_K``: of k passes of the drafter, and of the target's pass over k + 1 tokens a
    request; ``overhead`` is added to every step with drafts."""

    drafts: tuple[float, ...]
    target: tuple[float, ...]
    overhead: float = 0.0

    @classmethod
    def floors(cls, target: Model, drafter: Model | None, load: Workload, bandwidth: float) -> Steps:
        draft = load.pass_bytes(drafter) / bandwidth if drafter else 0.0
        passes = tuple(load.pass_bytes(target, k + 1) / bandwidth for k in range(MAX_K + 1))
        return cls(tuple(k * draft for k in range(MAX_K + 1)), passes)

    def slower(self, target: float, draft: float, overhead: float) -> Steps:
        """Every pass takes so many times as long, and a step with drafts so many seconds beside them."""
        return Steps(tuple(draft * s for s in self.drafts), tuple(target * s for s in self.target), overhead)

    def seconds(self, k: int) -> float:
        return self.drafts[k] + self.target[k] + (self.overhead if k else 0.0)


def curve(text: str) -> tuple[float, ...]:
    """``0.7`` (one rate per draft) or ``0.8,0.6,0.45`` (rate per position) as a_0 … a_(MAX_K - 1).

    Positions beyond those given go on with the last ratio.

    Raises:
        PlanError: not numbers from 0 to 1 that never rise.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(f"--acceptance {text}: write one rate (0.7) or one per position (0.8,0.6,0.45)") from None
    if any(not 0 <= v <= 1 for v in values) or any(b > a for a, b in itertools.pairwise(values)):
        raise PlanError(f"--acceptance {text}: rates lie between 0 and 1 and never rise from one position to the next")
    previous = values[-2] if len(values) > 1 else 1.0
    ratio = values[-1] / previous if previous else 0.0
    while len(values) < MAX_K:
        values.append(values[-1] * ratio)
    return tuple(values[:MAX_K])


def acceptance_length(rates: Sequence[float], k: int) -> float:
    """Tokens that a step with ``k`` drafts adds to a request: the accepted drafts and the target's own."""
    return 1 + sum(rates[:k])


def speed(steps: Steps, rates: Sequence[float], k: int, requests: int) -> float:
    """Tokens per second of all requests together."""
    return requests * acceptance_length(rates, k) / steps.seconds(k)


def best_k(steps: Steps, rates: Sequence[float], requests: int) -> int:
    """The k (0: no speculation) with the most tokens per second; the smallest among equals."""
    return max(range(MAX_K + 1), key=lambda k: (speed(steps, rates, k, requests), -k))
