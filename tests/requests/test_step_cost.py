"""What the patches add to an engine's step, counted instead of timed: Python functions and tensor operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.requests.generator import SCHEMA
from tests.requests.test_random_requests import OPTIONS
from tests.support import scripted
from tests.support.engine import engine
from tests.support.turns import Turns
from vllm_gemma4_spec.requests.patches import PATCHES

TOKENS, K = 20, 3
WITHOUT = {"ignore_eos": True, "max_tokens": TOKENS}
RULES: dict[str, dict[str, Any]] = {
    "json": {"structured_outputs": {"json": {"type": "array", "items": SCHEMA, "minItems": 9}}},
    "regex": {"structured_outputs": {"regex": "([a-z]{1,9} ){40,60}"}},
    "min_tokens": {"ignore_eos": True, "min_tokens": 8},
    "allowed_token_ids": {"ignore_eos": True, "allowed_token_ids": list(range(3, 200))},
    "stop": {"ignore_eos": True, "stop": ["zzzz"]},
}
# Functions that a step without a rule calls: RejectionSampler.forward twice, its apply_logits_processors,
# GPUModelRunner._update_states, update_state and apply of the processor for budgets, and whether that is MinTokens.
ADDED = 7


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Turns]:
    target = scripted.save(tmp_path_factory.mktemp("scripted") / "target")
    with engine(target, target, K, **OPTIONS) as llm, Turns(llm, PATCHES) as made:
        yield made


def prompts(count: int) -> list[list[int]]:
    text = "<bos><|turn>user\nWhat?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    return [scripted.tokenizer().encode(text)] * count


def test_a_step_without_a_rule_costs_a_few_calls_whatever_the_batch(turns: Turns) -> None:
    for requests in (2, 8):
        counts = {}
        for patched in (True, False):
            turns.change(patched)
            turns.answers(prompts(requests), WITHOUT)  # what happens once has happened
            # The first steps take requests in, the last one gives them back.
            counts[patched] = turns.calls(prompts(requests), WITHOUT)[0][2:-1]
        assert len(counts[True]) == len(counts[False]) > 2
        assert min(counts[True]) - min(counts[False]) <= ADDED, (requests, counts)


def test_a_step_without_a_rule_does_the_same_tensor_operations(turns: Turns) -> None:
    fields, seen = WITHOUT | {"max_tokens": 9}, {}
    for patched in (True, False):
        turns.change(patched)
        turns.answers(prompts(2), fields)
        seen[patched] = turns.operations(prompts(2), fields)
    assert seen[True] == seen[False]


@pytest.mark.parametrize("rule", RULES)
def test_steps_with_a_rule_call_at_most_a_twentieth_more(turns: Turns, rule: str) -> None:
    fields = {"max_tokens": 10} | RULES[rule]
    turns.answers(prompts(1), fields)
    counts, answers = {}, {}
    for patched in (True, False):
        turns.change(patched)
        counts[patched], answers[patched] = turns.calls(prompts(4), fields)
    assert answers[True] == answers[False]
    assert len(counts[True]) == len(counts[False])
    assert sum(counts[True]) <= 1.05 * sum(counts[False]), counts
