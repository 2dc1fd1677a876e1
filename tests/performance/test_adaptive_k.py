"""Adaptive k changes the number of draft passes, never an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import acceptance, engine, generate, random_prompts
from tests.support.stock import without
from vllm_gemma4_spec.metrics import reports
from vllm_gemma4_spec.performance.adaptive_k import DraftLength
from vllm_gemma4_spec.performance.patches import ADAPTIVE_K

K = 3
LENGTHS = (5, 40, 90, 17, 33)
LIMITS = (20, 26, 32, 38, 44)  # they end one after the other


def dropped() -> int:
    return reports._counts["drafts_left_out"][""]


@pytest.mark.parametrize("kind", ["target", pytest.param("close", marks=pytest.mark.slow), "drafter"])
def test_answers_are_those_of_plain_decoding(tiny: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(LENGTHS)
    with engine(tiny["target"], max_num_seqs=4) as llm:
        plain = generate(llm, prompts, LIMITS)
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_ADAPTIVE_K", "0.2")
    # Counts go out once a second; here with every step.
    monkeypatch.setattr("vllm_gemma4_spec.performance.adaptive_k._REPORT_SECONDS", -1.0)
    with engine(tiny["target"], tiny[kind], K, max_num_seqs=4) as llm:
        before, missing = acceptance(llm), dropped()
        answers, counts, missing = generate(llm, prompts, LIMITS), acceptance(llm) - before, dropped() - missing
    assert answers == plain
    if kind == "target":  # a drafter that is always right runs all its passes, and nothing it drafts is rejected
        assert missing == 0
        assert counts.accepted == counts.proposed > 0
    elif kind == "close":
        assert 0 < counts.accepted < counts.proposed - missing
        assert missing > 0
    else:  # one that knows nothing is soon down to one pass of three
        assert counts.proposed * 0.5 < missing <= counts.proposed * 2 / 3


def test_stock_runs_every_pass_whatever_is_accepted(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    widths = []
    sample = DraftModelProposer.propose

    def propose(self: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = sample(self, *args, **kwargs)
        widths.append(drafts.shape[1])
        return drafts

    monkeypatch.setenv("VLLM_GEMMA4_SPEC_ADAPTIVE_K", "0.2")
    with without(ADAPTIVE_K):
        monkeypatch.setattr(DraftModelProposer, "propose", propose)
        with engine(tiny["target"], tiny["drafter"], K) as llm:
            generate(llm, random_prompts(LENGTHS[:1]), 20)
    assert set(widths) == {K}
    assert len(widths) > 15


def test_a_request_that_accepts_nothing_goes_down_to_one_pass_and_back() -> None:
    draft_length = DraftLength(K, 0.2)
    assert draft_length.choose(["a"]) == K
    for _ in range(10):
        draft_length.observe("a", draft_length.choose(["a"]), 0)
    assert draft_length.choose(["a"]) == 1
    for _ in range(40):
        chosen = draft_length.choose(["a"])
        draft_length.observe("a", chosen, chosen)
    assert draft_length.choose(["a"]) == K


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("cost", [0.05, 0.2, 0.5])
def test_the_draft_length_chosen_yields_the_most_tokens_per_time(rate: float, cost: float) -> None:
    draft_length = DraftLength(8, cost)
    draft_length.rate = lambda request: rate  # type: ignore[method-assign]

    def speed(passes: int) -> float:
        return sum(rate**i for i in range(passes + 1)) / (1 + cost * (passes - 1))

    chosen = draft_length.choose(["a"])
    assert speed(chosen) == pytest.approx(max(speed(passes) for passes in range(1, 9)))


def test_every_request_counts_by_its_own_acceptance() -> None:
    draft_length = DraftLength(8, 0.2)
    for _ in range(50):
        draft_length.observe("good", 8, 8)
        draft_length.observe("bad", 8, 0)
    assert draft_length.rate("good") > 0.9
    assert draft_length.rate("bad") < 0.2
    assert draft_length.choose(["bad"]) == 1
    assert draft_length.choose(["good"]) == 8
    assert draft_length.choose(["good", "bad"]) == 8  # one of two pays for both
    assert draft_length.choose(["good", "bad", "bad", "bad", "bad"]) == 1
    draft_length.choose(["new"])
    assert draft_length.rate("bad") < draft_length.rate("new") < draft_length.rate("good")  # the average position


def test_requests_that_left_are_forgotten() -> None:
    draft_length = DraftLength(K, 0.2)
    for i in range(1000):
        draft_length.observe(f"r{i}", K, 1)
        draft_length.choose([f"r{i}"])
    assert len(draft_length._requests) < 100
