"""Structured output that begins where reasoning ends, with the demo pair drafting: what plain decoding gives.

On CUDA under async scheduling, with the drafts of every step in one graph. The demo target thinks before it answers, so
the end of its reasoning lies at any place of a step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import device
from tests.gpu.parts import REHEARSAL
from tests.support import engine
from vllm_gemma4_spec.demo import build, measure

pytestmark = pytest.mark.gpu
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 12}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
# Fields of a request -> whether an answer fits them.
CONSTRAINTS: dict[str, tuple[dict[str, Any], Any]] = {
    "choice": ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
    "regex": ({"regex": r"[a-z]{3}-\d{2}"}, lambda text: re.fullmatch(r"[a-z]{3}-\d{2}", text)),
    "json": ({"json": SCHEMA}, lambda text: set(json.loads(text)) == {"answer", "sure"}),
}
DRAFTERS = {"plain": None, "demo drafter, k = 3": ("drafter", 3), "self, k = 5": ("target", 5)}


@pytest.fixture(scope="module")
def pair() -> build.Pair:
    return build.ensure(build.default_folder())[0]


def questions() -> list[Any]:
    """Ten held-out questions that the target thinks about and answers in words."""
    chosen = [d for d in measure.held_out(400) if d.thinking and not d.tools and not d.in_reasoning]
    return chosen[:10]


@pytest.fixture(scope="module")
def answers(pair: build.Pair) -> Iterator[Any]:
    """Which model drafts -> per constraint the token ids and texts of every answer, and how it was scheduled."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    @cache
    def get(drafter: str) -> dict[str, Any]:
        which = DRAFTERS[drafter]
        path: Path | None = None if which is None else getattr(pair, which[0])
        k = which[1] if which else None
        changes: dict[str, Any] = {"structured_outputs_config": {"reasoning_parser": "gemma4"}, "max_model_len": 512}
        settings = device.options(k, skip_tokenizer_init=False, **changes)
        found: dict[str, Any] = {}
        with engine.engine(pair.target, path, k or 1, **settings) as llm:
            found["async"] = llm.llm_engine.vllm_config.scheduler_config.async_scheduling
            before = engine.acceptance(llm)
            for kind, (fields, _) in CONSTRAINTS.items():
                params = SamplingParams(
                    max_tokens=160,
                    temperature=0,
                    structured_outputs=StructuredOutputsParams(**fields),
                )
                outputs = llm.chat(
                    [q.messages for q in questions()],
                    params,
                    use_tqdm=False,
                    chat_template_kwargs={"enable_thinking": True},
                )
                ids = [list(o.outputs[0].token_ids) for o in outputs]
                found[kind] = [(tokens, llm.get_tokenizer().decode(tokens)) for tokens in ids]
            spent = engine.acceptance(llm) - before
        found["proposed"], found["accepted"] = spent.proposed, spent.accepted
        return found

    return get  # type: ignore[return-value]


@pytest.mark.parametrize("kind", CONSTRAINTS)
@pytest.mark.parametrize("drafter", [d for d in DRAFTERS if d != "plain"])
def test_answers_fit_and_equal_plain_decoding(answers: Any, measured: Any, drafter: str, kind: str) -> None:
    plain, found = answers("plain"), answers(drafter)
    assert found["proposed"] > 0
    assert REHEARSAL or found["async"]
    fits = CONSTRAINTS[kind][1]
    for (wanted, _), (tokens, text) in zip(plain[kind], found[kind], strict=True):
        thought, end, answer = text.partition("<channel|>")
        assert end, f"the target was to think first: {text!r}"
        assert thought
        assert fits(answer.removesuffix("<turn|>").strip()), text
        assert tokens == wanted
    measured(proposed=found["proposed"], accepted=found["accepted"])
