"""Drafting over several KV cache groups, in the real engine, float32.

The target as its own drafter accepts every draft if, and only if, the drafter sees the same context as the
target: any wrong block table, slot or length shows as a rejection. Plain decoding owns the tokens.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Acceptance, acceptance, engine, generate
from tests.support.ways import WAYS, work


@functools.cache
def plain(model: Path, way: str, share: float = 1) -> list[list[int]]:
    prompts, limits = work(way, share)
    with engine(model) as llm:
        return generate(llm, prompts, limits)


def speculate(
    model: Path, drafter: Path, k: int, way: str, share: float = 1
) -> tuple[list[list[int]], Acceptance, dict[str, float]]:
    prompts, limits = work(way, share)
    with engine(model, drafter, k, **WAYS[way]) as llm:
        before, preempted = acceptance(llm), _counter(llm, "vllm:num_preemptions")
        answers = generate(llm, prompts, limits)
        return answers, acceptance(llm) - before, {"preempted": _counter(llm, "vllm:num_preemptions") - preempted}


def _counter(llm: Any, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def matrix() -> list[Any]:
    """Every k with every way. `make test` takes every way once and the ends of k, with answers half as long."""
    cases = [(k, way) for k in (1, 2, 3, 5, 8) for way in WAYS]
    fast = [c for c in cases if c[0] == 3 or (c[0] in (1, 8) and c[1] == "replaced-requests")]
    whole = [pytest.param(*c, 1, id=f"{c[0]}-{c[1]}", marks=pytest.mark.slow) for c in cases]
    return [pytest.param(*c, 0.5, id=f"{c[0]}-{c[1]}-half") for c in fast] + whole


@pytest.mark.parametrize(("k", "way", "share"), matrix())
@pytest.mark.parametrize("kind", ["target", "drafter"])
def test_a_model_as_its_own_drafter_accepts_every_draft(
    tiny: dict[str, Path], kind: str, k: int, way: str, share: float
) -> None:
    want = plain(tiny[kind], way, share)
    answers, counts, extra = speculate(tiny[kind], tiny[kind], k, way, share)
    assert answers == want
    assert counts.proposed >= counts.drafts * min(k, 1) > 0
    assert counts.accepted == counts.proposed
    if way == "preemption":
        assert extra["preempted"] > 0


@pytest.mark.parametrize(("k", "way", "share"), matrix())
@pytest.mark.parametrize("drafter", ["drafter", "close"])
def test_another_drafter_changes_no_token(tiny: dict[str, Path], drafter: str, k: int, way: str, share: float) -> None:
    want = plain(tiny["target"], way, share)
    answers, counts, _ = speculate(tiny["target"], tiny[drafter], k, way, share)
    assert answers == want
    assert counts.proposed > 0
    if drafter == "close":  # neither always right nor always wrong, so both paths of the sampler are taken
        assert 0 < counts.accepted < counts.proposed
