"""Greedy answers with speculation are plain decoding's, graph drafts the original's: shared by several parts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.gpu import device
from tests.gpu.device import K, Run
from tests.gpu.parts import REHEARSAL
from tests.support import engine


@dataclass(frozen=True)
class Way:
    """A way of running: which model drafts, and what is unlike the default."""

    drafter: str
    asynchronous: bool = False
    eager: bool = False
    sleeps: bool = False


WAYS = {
    "self, eager": Way("target", eager=True),
    "self": Way("target"),
    "self, async": Way("target", asynchronous=True),
    "near copy": Way("close"),
    "near copy, async": Way("close", asynchronous=True),
    "E4B-like, async": Way("drafter", asynchronous=True),
    "self, asleep and awake": Way("target", asynchronous=True, sleeps=True),  # last: it changes torch's allocator
}


class Exactness:
    """Plain decoding once, then each way against it.

    A draft pass and a verification have different shapes, for which torch.compile and cuBLAS add in different orders.
    So where the two best tokens of an answer are nearer than float32's own error (counted in plain decoding), a model
    may reject its own draft, and what follows it in that step.
    """

    def __init__(self, models: dict[str, Path], mode: int = 0, **settings: Any) -> None:
        self.models, self.mode, self.settings = models, mode, settings
        self.prompts = engine.random_prompts(device.LENGTHS)
        self.limits = [device.TOKENS + 7 * i for i in range(len(self.prompts))]
        with engine.engine(models["target"], **device.options(None, mode, **settings)) as llm:
            self.plain = device.ask(llm, self.prompts, self.limits)
            # vLLM compiles a helper of its log-probabilities even in eager mode: half a minute for one call.
            with nullcontext() if mode else torch.compiler.set_stance("force_eager"):
                self.leads = device.lead(llm, self.prompts, self.limits)[1]
            self.plain.near_ties = device.near_ties(self.leads)

    def run(self, way: Way) -> Run:
        changes: dict[str, Any] = {"async_scheduling": way.asynchronous and not REHEARSAL, **self.settings}
        if way.eager:
            changes["speculative"] = {"enforce_eager": True}
        if way.sleeps:
            changes["enable_sleep_mode"] = True
        drafter = self.models[way.drafter]
        with engine.engine(self.models["target"], drafter, K, **device.options(K, self.mode, **changes)) as llm:
            found = device.drafted(llm, self.prompts, self.limits)
            if way.sleeps:
                llm.sleep(1)
                llm.wake_up()
                woken = device.ask(llm, self.prompts, self.limits)
                device.same_answers(woken.tokens, found.tokens)
                found.proposed += woken.proposed
                found.accepted += woken.accepted
                found.counts = llm.collective_rpc(device.read_counts)[0]
            return found

    def check(self, way: Way) -> dict[str, Any]:
        found = self.run(way)
        # Compiled kernels differ by a batch's size, so there an answer may go on otherwise behind a near tie.
        parted = device.same_answers(found.tokens, self.plain.tokens, self.leads if self.mode else None)
        assert found.proposed > 0
        assert not found.counts["different"]
        if way.drafter == "target":
            assert found.proposed - found.accepted <= K * self.plain.near_ties * (2 if way.sleeps else 1), (
                found.numbers()
            )
        elif way.drafter == "close":
            assert 0 < found.accepted < found.proposed
        if not way.eager:
            device.replayed(found)
        return {**found.numbers(), "near_ties": self.plain.near_ties, "parted": parted}
