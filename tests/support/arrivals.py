"""Requests that come while others are answered, so that a step has more or fewer of them than the step before."""

from __future__ import annotations

from typing import Any

from tests.support.engine import Prompt, random_prompts

# The step before which each comes, and how many tokens it asks for. One alone, several, several of which one stays, one
# beside which others come: every pair of one and several requests, now and in the step before.
ARRIVALS = [(0, 30), (4, 40), (4, 6), (20, 9), (24, 25), (24, 25), (25, 3)]
LENGTHS = [5, 33, 70, 3, 20, 9, 40]


def serve(llm: Any, seed: int = 1) -> list[Prompt]:
    """Greedy answers to them, of an engine in this process."""
    from vllm import SamplingParams

    prompts = random_prompts(LENGTHS, seed=seed)
    answers: dict[str, Prompt] = {}
    waiting = list(enumerate(zip(ARRIVALS, prompts, strict=True)))
    step = 0
    while waiting or llm.llm_engine.has_unfinished_requests():
        while waiting and waiting[0][1][0][0] <= step:
            number, ((_, tokens), prompt) = waiting.pop(0)
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        for output in llm.llm_engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return [answers[str(number)] for number in range(len(ARRIVALS))]
