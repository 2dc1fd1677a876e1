"""Two tensor-parallel ranks on the CPU, in vLLM's multiprocessing executor.

Self-drafting accepts every draft on two ranks as on one, and answers are those of plain decoding on one rank.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import acceptance, engine, generate, random_prompts

pytestmark = pytest.mark.slow  # test_nvfp4_tensor_parallel.py has two ranks in the fast set
FIXTURES = Path(__file__).parents[1] / "checkpoints" / "fixtures"
NVFP4 = FIXTURES / "31b-awq-full"
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_num_seqs": 4}
# Around blocks (16, 32) and windows (32, 64); the NVFP4 fixtures have a vocabulary of 88 and 128 positions.
PROMPTS = {512: random_prompts((1, 17, 65, 200)), 88: random_prompts((3, 17, 40), vocab=88)}
SMALL = {"max_model_len": 128, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 256}


@pytest.fixture(autouse=True)
def workers_that_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("VLLM_SLEEP_WHEN_IDLE", "1")


def answers(model: Path, drafter: Path | None = None, vocab: int = 512, **options: Any) -> tuple[Any, Any]:
    with engine(model, drafter, 3, **options) as llm:
        before = acceptance(llm)
        return generate(llm, PROMPTS[vocab], 24), acceptance(llm) - before


@functools.cache
def plain(model: Path, vocab: int = 512) -> list[list[int]]:
    options = SMALL if vocab == 88 else {}
    return list(answers(model, vocab=vocab, max_num_seqs=4, **options)[0])


@pytest.mark.parametrize(
    ("target", "drafter"),
    [("target", "target"), ("target", "close"), ("drafter", "drafter"), ("target", "drafter")],
)
def test_two_ranks_draft_as_one(tiny: dict[str, Path], target: str, drafter: str) -> None:
    want = plain(tiny[target])
    got, counts = answers(tiny[target], tiny[drafter], **TWO_RANKS)
    assert got == want
    if target == drafter:
        assert counts.accepted == counts.proposed > 0
    elif drafter == "close":
        assert 0 < counts.accepted < counts.proposed
    else:
        assert counts.proposed > 0


def test_two_ranks_adapt_k_alike(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that chose different numbers of passes would wait for each other for ever."""
    want = plain(tiny["target"])
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_ADAPTIVE_K", "0.2")
    got, counts = answers(tiny["target"], tiny["close"], **TWO_RANKS)
    assert got == want
    assert 0 < counts.accepted < counts.proposed


@pytest.mark.parametrize("drafter", ["31b-awq-full", "e4b-awq-lite"])
def test_two_ranks_of_nvfp4_awq(drafter: str) -> None:
    want = plain(NVFP4, 88)
    speculative = {"quantization": "modelopt"}
    got, counts = answers(NVFP4, FIXTURES / drafter, 88, speculative=speculative, **(SMALL | TWO_RANKS))
    assert got == want
    assert counts.proposed > 0
    if drafter == NVFP4.name:
        assert counts.accepted == counts.proposed


def test_local_argmax_drafts_the_same(tiny: dict[str, Path]) -> None:
    """``use_local_argmax_reduction``: each rank reduces its part of the vocabulary."""
    want = plain(tiny["target"])
    speculative = {"use_local_argmax_reduction": True}
    got, counts = answers(tiny["target"], tiny["target"], speculative=speculative, **TWO_RANKS)
    assert got == want
    assert counts.accepted == counts.proposed > 0


@pytest.mark.parametrize("drafter", ["target", "drafter"])
def test_a_whole_drafter_on_each_rank(tiny: dict[str, Path], drafter: str) -> None:
    """``draft_tensor_parallel_size`` 1: the drafts of one rank, without an all-reduce."""
    want = plain(tiny["target"])
    with engine(tiny["target"], tiny[drafter], 3, max_num_seqs=4) as llm:
        before = acceptance(llm)
        assert generate(llm, PROMPTS[512], 24) == want
        on_one = acceptance(llm) - before
    speculative = {"draft_tensor_parallel_size": 1}
    got, counts = answers(tiny["target"], tiny[drafter], speculative=speculative, **TWO_RANKS)
    assert got == want
    assert counts == on_one
