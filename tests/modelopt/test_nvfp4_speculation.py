"""An NVFP4_AWQ target with NVFP4 drafters: greedy output is that of plain decoding."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.support.engine import acceptance, engine, generate, random_prompts

FIXTURES = Path(__file__).parents[1] / "checkpoints" / "fixtures"
TARGET = FIXTURES / "31b-awq-full"
PROMPTS = random_prompts((3, 17, 40), vocab=88)
LIMITS = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4, "num_gpu_blocks_override": 256}


@functools.cache
def plain() -> list[list[int]]:
    with engine(TARGET, **LIMITS) as llm:
        return generate(llm, PROMPTS, 24)


@pytest.mark.parametrize("drafter", ["e4b-awq-lite", "31b-awq-full"])
def test_greedy_output_equals_plain_decoding(drafter: str) -> None:
    """With itself as the drafter every draft is accepted: the drafter's scales and branches are right too."""
    wanted = plain()  # before the other engine: two at once share one set of groups
    with engine(TARGET, FIXTURES / drafter, k=3, speculative={"quantization": "modelopt"}, **LIMITS) as llm:
        before = acceptance(llm)
        assert generate(llm, PROMPTS, 24) == wanted
        counted = acceptance(llm) - before
    assert counted.drafts > 0
    if drafter == TARGET.name:
        assert counted.accepted == counted.proposed
