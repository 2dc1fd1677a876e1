"""An NVFP4_AWQ target with NVFP4 drafters: greedy output is that of plain decoding."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.checkpoints import tiny
from tests.support.engine import acceptance, engine, generate, random_prompts

FIXTURES = Path(__file__).parents[1] / "checkpoints" / "fixtures"
PROMPTS = random_prompts((3, 17, 40), vocab=88)
LIMITS = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4, "num_gpu_blocks_override": 256}


@functools.cache
def plain(target: str) -> list[list[int]]:
    with engine(FIXTURES / target, **LIMITS) as llm:
        return generate(llm, PROMPTS, 24)


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        ("31b-awq-full", "e4b-awq-lite"),
        ("31b-awq-full", "31b-awq-full"),
        pytest.param("31b-svdquant", "e4b-awq-clip", marks=pytest.mark.slow),
        pytest.param("31b-nvfp4", "31b-svdquant", marks=pytest.mark.slow),
    ],
)
def test_greedy_output_equals_plain_decoding(target: str, drafter: str) -> None:
    """With itself as the drafter every draft is accepted: the drafter's scales and branches are right too."""
    wanted = plain(target)  # before the other engine: two at once share one set of groups
    speculative = {"quantization": "modelopt"}
    with engine(FIXTURES / target, FIXTURES / drafter, k=3, speculative=speculative, **LIMITS) as llm:
        before = acceptance(llm)
        assert generate(llm, PROMPTS, 24) == wanted
        counted = acceptance(llm) - before
    assert counted.drafts > 0
    if drafter == target:
        assert counted.accepted == counted.proposed


@pytest.mark.slow
def test_an_unquantized_drafter(tmp_path: Path) -> None:
    """A target in NVFP4_AWQ, and the bf16 model that it was made from drafting for it: mostly right, never followed."""
    tiny.build("31b").save_pretrained(tmp_path / "parent")
    wanted = plain("31b-awq-full")
    with engine(FIXTURES / "31b-awq-full", tmp_path / "parent", k=3, **LIMITS) as llm:
        before = acceptance(llm)
        assert generate(llm, PROMPTS, 24) == wanted
        counted = acceptance(llm) - before
    assert 0 < counted.accepted < counted.proposed
