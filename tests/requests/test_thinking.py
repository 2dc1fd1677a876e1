"""Budgets and ``min_tokens`` by position: a step of drafts forces and forbids what steps of one token do."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.configs import GEMMA4, LLAMA, vllm_config
from vllm_gemma4_spec.requests.thinking import Thinking

START, END = (100,), (101,)
LONG_START, LONG_END = (100, 45), (7, 7, 101)
WORDS, VOCABULARY = range(2, 40), 128
STOPS = {1, 50}


def wanted(budget: int, start: tuple[int, ...], end: tuple[int, ...], prompt: list[int], output: list[int]) -> Any:
    """The token that must come next, found by looking at everything again from the beginning."""
    inside, count, forced, text = False, 0, 0, list(prompt)
    starts = [i for i in range(len(prompt)) if tuple(prompt[i : i + len(start)]) == start]
    ends = [i for i in range(len(prompt)) if tuple(prompt[i : i + len(end)]) == end]
    inside = max(starts, default=-1) > max(ends, default=-1)
    due = inside and budget <= 0
    for token in output:
        text.append(token)
        if due:
            forced += 1
            if forced == len(end):
                due, forced, inside = False, 0, False
            continue
        if tuple(text[-len(start) :]) == start:
            inside, count = True, 0
        elif tuple(text[-len(end) :]) == end:
            inside = False
        elif inside:
            count += 1
        due = inside and count >= budget
    return end[forced] if due else None


@pytest.mark.parametrize(("start", "end"), [(START, END), (LONG_START, LONG_END)])
@pytest.mark.parametrize("budget", [0, 1, 3])
def test_the_end_is_due_where_the_budget_is_spent(start: tuple[int, ...], end: tuple[int, ...], budget: int) -> None:
    rng = random.Random(budget)
    due = never = 0
    for _ in range(150):
        prompt = [t for _ in range(rng.randint(0, 6)) for t in rng.choice([start, end, (rng.choice(WORDS),)])]
        thinking, output = Thinking(budget, start, end, prompt), []
        for _ in range(25):
            expected = wanted(budget, start, end, prompt, output)
            assert thinking.wanted == expected, (prompt, output)
            due += expected is not None
            ahead = thinking.copy()  # what it is asked about drafts changes nothing
            may_end = [thinking.may_end_within(n) for n in range(4)]
            assert may_end[0] >= (expected is not None)
            for n, token in enumerate(rng.choices([*WORDS, *start, *end], k=3), 1):
                ahead.push(token)
                assert may_end[n] >= (ahead.wanted is not None)
            never += not may_end[2]
            assert not thinking.may_end_within(-1)
            assert thinking.wanted == expected
            tokens = (expected,) if expected is not None else rng.choice([start, end, (rng.choice(WORDS),)])
            for token in tokens:
                thinking.push(token)
                output.append(token)
                if thinking.wanted is not None:
                    break
    assert due > 20
    assert (never > 20) == (budget > 2)  # there are steps that need not be looked into


def processors(target: Any = GEMMA4, speculates: bool = True) -> Any:
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    from vllm.v1.worker.gpu_model_runner import build_logitsprocs

    settings = vllm_config(SimpleNamespace(hf_config=target.hf_config, runner_type="generate"))
    settings.scheduler_config = SimpleNamespace(max_num_seqs=8)
    settings.speculative_config.num_speculative_tokens = 3
    if not speculates:
        settings.speculative_config = None
    settings.reasoning_config = SimpleNamespace(reasoning_start_token_ids=START, reasoning_end_token_ids=END)
    return build_logitsprocs(settings, torch.device("cpu"), False, False, ())


def params(**fields: Any) -> Any:
    values = {"thinking_token_budget": None, "min_tokens": 0, "all_stop_token_ids": STOPS}
    values |= {"min_p": 0.0, "logit_bias": None}
    return SimpleNamespace(**values | fields)


def update(**changes: Any) -> Any:
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    return BatchUpdate(**{"batch_size": 3, "removed": [], "added": [], "moved": []} | changes)


def sampler(drafts: list[list[int]], processors: Any, seen: dict[str, torch.Tensor]) -> None:
    """``RejectionSampler.forward`` up to the logits that it samples from, which go into ``seen``."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    counts = [len(d) for d in drafts]
    sampling: Any = SimpleNamespace(
        logitsprocs=processors,
        spec_token_ids=drafts,
        no_penalties=True,
        bad_words_token_ids={},
        allowed_token_ids_mask=None,
        output_token_ids=[[] for _ in drafts],
    )
    metadata: Any = SimpleNamespace(num_draft_tokens=counts)

    def original(self: Any, metadata: Any, probs: Any, logits: Any, sampling: Any) -> None:
        last = torch.zeros(len(drafts), VOCABULARY)
        for processor in sampling.logitsprocs.non_argmax_invariant:
            last = processor.apply(last)
        seen["last"] = last
        seen["drafts"] = RejectionSampler.apply_logits_processors(
            None, torch.zeros(sum(counts), VOCABULARY), sampling, metadata
        )

    from vllm_gemma4_spec.requests import min_tokens, thinking_budget

    min_tokens.forward(thinking_budget.forward(original))(None, metadata, None, None, sampling)


def test_every_position_of_a_step() -> None:
    """Rows: a budget spent within the drafts; min_tokens reached within them; nothing asked for."""
    made = processors()
    outputs: list[list[int]] = [[100, 3], [9], []]
    added = [
        (0, params(thinking_token_budget=3), [2], outputs[0]),
        (1, params(min_tokens=4), [2], outputs[1]),
        (2, params(), [2], outputs[2]),
    ]
    for processor in made.all:
        processor.update_state(update(added=added))

    def min_tokens_alone_are_due() -> None:
        """In a step without drafts: those of the step before do not count."""
        logits = torch.zeros(3, VOCABULARY)
        for processor in made.non_argmax_invariant:
            logits = processor.apply(logits)
        assert bool((logits[1, list(STOPS)] == float("-inf")).all())
        assert int((logits != 0).sum()) == len(STOPS)

    seen: dict[str, torch.Tensor] = {}
    sampler([[3, 4, 101, 5], [6, 7, 8, 9], [1]], made, seen)
    min_tokens_alone_are_due()
    forced = seen["drafts"].argmax(-1)
    # One token was thought; the budget is spent after two drafts, and the end is due at the third.
    assert [int(forced[i]) for i in range(4)] == [0, 0, 101, 0]
    ends = [bool((row[list(STOPS)] == float("-inf")).all()) for row in seen["drafts"]]
    assert ends == [False] * 4 + [True, True, True, False] + [False]
    assert [bool((row[list(STOPS)] == float("-inf")).any()) for row in seen["last"]] == [False, False, False]

    sampler([[3, 4], [6, 7], []], made, seen)
    assert seen["last"][0].argmax() == 101  # due after the last draft
    assert [bool((row[list(STOPS)] == float("-inf")).all()) for row in seen["last"]] == [False, True, False]
    assert int((seen["last"] != 0).sum()) == 1 + len(STOPS)
    min_tokens_alone_are_due()
    sampler([[], [], []], made, seen)
    assert int((seen["last"] != 0).sum()) == len(STOPS)

    # Rows move and go with their requests; tokens that are not known yet (-1) wait until they are.
    outputs[0] += [4, -1]
    for processor in made.all:
        processor.update_state(update(moved=[(0, 2, _swap())], removed=[], added=[]))
    sampler([[], [], []], made, seen)
    assert seen["last"][2].argmax() == 0
    outputs[0][-1] = 5
    sampler([[], [], []], made, seen)
    assert seen["last"][2].argmax() == 101
    for processor in made.all:
        processor.update_state(update(batch_size=1, removed=[2, 1]))
    sampler([[3]], made, seen)
    assert not seen["last"].any()
    assert not seen["drafts"].any()


def test_a_budgets_rows_follow_the_drafts_of_the_requests_before_it() -> None:
    made = processors()
    for processor in made.all:
        processor.update_state(update(added=[(1, params(thinking_token_budget=2), [2], [100, 3])]))
    seen: dict[str, torch.Tensor] = {}
    sampler([[6, 7, 8], [3, 4], [1]], made, seen)
    assert seen["drafts"].argmax(-1).tolist() == [0, 0, 0, 0, 101, 0]


def _swap() -> Any:
    from vllm.v1.sample.logits_processor.interface import MoveDirectionality

    return MoveDirectionality.SWAP


def test_other_models_keep_vllms_processors_and_are_sampled_with_them() -> None:
    made = processors(target=LLAMA)
    assert not any(type(p).__module__.startswith("vllm_gemma4_spec") for p in made.all)
    for processor in made.all:
        processor.update_state(update(added=[(0, params(min_tokens=2), [2], [])]))
    seen: dict[str, torch.Tensor] = {}
    sampler([[3, 4]], made, seen)
    assert [bool((row[list(STOPS)] == float("-inf")).all()) for row in seen["drafts"]] == [True, True]
    assert sum(type(p).__module__.startswith("vllm_gemma4_spec") for p in processors().all) == 2


def test_one_processor_forces_the_end_without_speculation_too() -> None:
    """vLLM's own counts by step, and would force the end a second time."""
    names = [type(p).__name__ for p in processors(speculates=False).all]
    assert names.count("ThinkingBudget") == 1
    assert "ThinkingTokenBudgetLogitsProcessor" not in names
