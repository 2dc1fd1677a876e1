"""``use_local_argmax_reduction`` with Gemma 4: accepted, and the same drafts."""

from __future__ import annotations

from pathlib import Path

from tests.support.engine import acceptance, engine, generate, random_prompts


def test_local_argmax_drafts_the_same_tokens(tiny: dict[str, Path]) -> None:
    prompts = random_prompts([5, 40, 90])
    runs = []
    for local in (False, True):
        with engine(tiny["target"], tiny["close"], 3, speculative={"use_local_argmax_reduction": local}) as llm:
            before = acceptance(llm)
            runs.append((generate(llm, prompts, 24), acceptance(llm) - before))
    assert runs[0] == runs[1]
    assert runs[0][1].accepted > 0
