"""Requests with a seed on the CPU, their prompts computed in chunks or at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.engine import engine, generate, random_prompts
from tests.support.stock import without
from vllm_gemma4_spec.cpu.patches import CPU_RUNNER

PROMPTS = random_prompts((200, 5, 90))
CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 4}


@pytest.mark.parametrize("drafter", [None, "close"])
def test_an_answer_is_its_seeds_however_the_prompt_is_cut(tiny: dict[str, Path], drafter: str | None) -> None:
    answers = []
    for options in ({"max_num_seqs": 4}, CHUNKS):
        with engine(tiny["target"], tiny[drafter] if drafter else None, 2, **options) as llm:
            answers.append(generate(llm, PROMPTS, 16, temperature=1.0, seed=7))
    assert answers[0] == answers[1]


def test_stock_ends_at_the_first_chunk(tiny: dict[str, Path]) -> None:
    with (
        without(CPU_RUNNER),
        pytest.raises(RuntimeError, match="CPU Generator does not use offset"),
        engine(tiny["target"], **CHUNKS) as llm,
    ):
        generate(llm, PROMPTS[:1], 4, temperature=1.0, seed=7)
