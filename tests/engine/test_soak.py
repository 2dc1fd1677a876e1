"""Tens of thousands of engine steps: nothing decays.

A model drafts for itself, or the demo's trained MTP assistant for its target, in a cache too small for what it is
asked, so that blocks are reused all the time: prompts that continue cached answers, evictions, preemptions, aborted
requests, bursts and quiet times, requests that end at the maximum length. Every token that comes out is compared at
once, and at every checkpoint all drafts since the last one must have been accepted, of an assistant's as many as the
first time the same tokens were drafted from. ``make soak`` runs both; SOAK_STEPS changes how long.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM

from tests.support.engine import Acceptance, acceptance, engine, generate, random_prompts

STEPS = int(os.environ.get("SOAK_STEPS", "20000"))
CHECKPOINT = 500
K = 3
LONGEST = 384
BASES = 24
# Nothing is to depend on the last bits: an answer whose two likeliest tokens are ever this close is left out.
GAP = 1e-4
LOST = 0.02  # share of the drafts accepted before that may be missing in CHECKPOINT steps: a preempted request has none


@dataclass
class Conversation:
    """A prompt and what the model says to it, greedily, up to the maximum length."""

    prompt: list[int]
    answer: list[int]


@dataclass
class Live:
    """A request: part of a conversation as its prompt, what must come out, and when to abort it."""

    conversation: int
    said: int  # tokens of the answer that are in the prompt
    expected: list[int]
    abort_at: int | None
    seen: int = 0


@dataclass
class Counts:
    """What happened, so that the run can be shown to have been what it says."""

    finished: int = 0
    aborted: int = 0
    tokens: int = 0
    at_the_limit: int = 0
    evicted: int = 0
    checkpoints: list[Acceptance] = field(default_factory=list, repr=False)
    repeated: list[tuple[int, int]] = field(default_factory=list, repr=False)


def conversations(model: Path, prompts: list[list[int]]) -> list[Conversation]:
    with engine(model, max_model_len=LONGEST, max_num_seqs=32) as llm:
        answers = generate(llm, prompts, LONGEST)
    judge = Gemma4ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    made = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = judge(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        two = logits.topk(2).values
        if (two[:, 0] - two[:, 1]).min() > GAP:
            assert logits.argmax(-1).tolist() == answer
            made.append(Conversation(prompt, answer))
    return made[:BASES]


class Soak:
    """Feeds one engine at random, from a seed, and checks everything that comes out of it."""

    def __init__(self, llm: Any, known: list[Conversation]) -> None:
        self.engine, self.llm, self.known = llm.llm_engine, llm, known
        self.random = random.Random(7)
        self.live: dict[str, Live] = {}
        self.counts = Counts()
        self.number = 0
        # (conversation, tokens of its answer so far) -> how many of the drafts made there were accepted the first time.
        self.first_time: dict[tuple[int, int], int] = {}
        self.wanted = self.again = 0  # accepted the first time and now, of drafts made once more
        pool = self.engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        evict = pool._maybe_evict_cached_block

        def counted(block: Any) -> bool:
            self.counts.evicted += (done := evict(block))
            return bool(done)

        pool._maybe_evict_cached_block = counted

    def add(self) -> None:
        from vllm import SamplingParams

        which = self.random.randrange(len(self.known))
        conversation = self.known[which]
        said = self.random.choice([0, 0, self.random.randrange(len(conversation.answer) - 1)])
        prompt, rest = conversation.prompt + conversation.answer[:said], conversation.answer[said:]
        tokens = LONGEST if self.random.random() < 0.05 else self.random.choice([1, 2, 8, 24, 60])
        abort_at = self.random.randrange(tokens) if self.random.random() < 0.15 else None
        self.number += 1
        name = str(self.number)
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        self.live[name] = Live(which, said, rest[:tokens], abort_at)

    def step(self) -> None:
        for output in self.engine.step():
            request = self.live[output.request_id]
            got = list(output.outputs[0].token_ids)
            assert got == request.expected[: len(got)], f"request {output.request_id} after {len(got)} tokens"
            self.counts.tokens += len(got) - request.seen
            if request.seen and not output.finished:  # a prompt's step verifies no drafts, a last one may be cut off
                accepted = len(got) - request.seen - 1
                before = self.first_time.setdefault((request.conversation, request.said + request.seen), accepted)
                self.wanted, self.again = self.wanted + before, self.again + accepted
            request.seen = len(got)
            if output.finished:
                assert got == request.expected
                self.counts.finished += 1
                self.counts.at_the_limit += len(output.prompt_token_ids) + len(got) == LONGEST
                del self.live[output.request_id]
            elif request.abort_at is not None and request.seen > request.abort_at:
                self.engine.abort_request([output.request_id])
                self.counts.aborted += 1
                del self.live[output.request_id]

    def run(self, steps: int, check: Callable[[Acceptance], None]) -> None:
        """``check`` is given what became of the drafts since the checkpoint before."""
        last = acceptance(self.llm)
        for number in range(steps):
            crowd = 1 if (number // 300) % 4 == 3 else 9  # quiet times, and bursts that leave some waiting
            while len(self.live) < crowd and (self.random.random() < 0.5 or not self.live):
                self.add()
            self.step()
            if number % CHECKPOINT == CHECKPOINT - 1:
                now = acceptance(self.llm)
                since, last = now - last, now
                self.counts.repeated.append((self.again, self.wanted))
                self.wanted = self.again = 0
                check(since)
                self.counts.checkpoints.append(since)
                print(f"step {number + 1}: {since.accepted} of {since.proposed} accepted, {self.counts}", flush=True)


def counter(llm: Any, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def soaked(model: Path, known: list[Conversation], check: Callable[[Acceptance], None], **drafting: Any) -> Counts:
    """``STEPS`` steps of one engine, and that they were what they are said to be."""
    options = {"max_model_len": LONGEST, "max_num_seqs": 6, "max_num_batched_tokens": 160}
    options |= {"num_gpu_blocks_override": 220, "enable_prefix_caching": True}
    with engine(model, **options, **drafting) as llm:
        names = ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions")
        before = {name: counter(llm, name) for name in names}
        soak = Soak(llm, known)
        soak.run(STEPS, check)
        found = {name: int(counter(llm, name) - before[name]) for name in names}
    counts = soak.counts
    accepted, proposed = (sum(getattr(c, name) for c in counts.checkpoints) for name in ("accepted", "proposed"))
    print(
        f"{STEPS} steps, {counts.finished} requests finished ({counts.at_the_limit} at the maximum length), "
        f"{counts.aborted} aborted, {counts.tokens} tokens, {accepted} of {proposed} drafts accepted, "
        f"{counts.evicted} cached blocks evicted, {found}"
    )
    # It was what it says it is.
    assert counts.finished > STEPS / 30
    assert counts.aborted > STEPS / 500
    assert counts.at_the_limit > 0
    assert counts.evicted > STEPS / 10
    assert found["num_preemptions"] > STEPS / 1000
    assert STEPS < found["prefix_cache_hits"] < found["prefix_cache_queries"]  # tokens
    return counts


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_nothing_decays(tiny: dict[str, Path]) -> None:
    known = conversations(tiny["target"], random_prompts([3 + 7 * i for i in range(BASES + 16)], seed=11))
    assert len(known) == BASES

    def all_accepted(since: Acceptance) -> None:
        assert since.accepted == since.proposed > 0, since

    soaked(tiny["target"], known, all_accepted, drafter=tiny["target"], k=K)


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_an_assistant_drafts_as_well_at_the_end() -> None:
    """It reads the target's blocks a step after they were written: one that was reused would cost acceptance."""
    from transformers import AutoTokenizer

    from vllm_gemma4_spec.demo import build, measure
    from vllm_gemma4_spec.demo.template import prompt_text

    pair, _ = build.ensure(build.default_folder())
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    known = conversations(pair.target, [tokenizer(prompt_text(d))["input_ids"] for d in measure.held_out(BASES + 16)])
    assert len(known) > BASES // 2

    def some_accepted(since: Acceptance) -> None:
        assert 0 < since.accepted < since.proposed, since

    speculative = {"method": "mtp", "model": str(pair.assistant), "num_speculative_tokens": K}
    counts = soaked(pair.target, known, some_accepted, speculative_config=speculative)
    print("accepted, and the first time:", counts.repeated)
    assert sum(wanted for _, wanted in counts.repeated) > STEPS / 20
    for again, wanted in counts.repeated:
        assert abs(again - wanted) <= LOST * wanted + 1, counts.repeated
