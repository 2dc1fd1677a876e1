"""Adaptive k: a step runs as many draft passes as recent acceptance pays for.

The scheduler goes on to verify k tokens per request. Drafts that were not made are filled up with token 0,
which the target rejects like any wrong draft, so no answer depends on how many passes ran. The first pass
always runs: it writes the drafter's KV cache of the tokens that were accepted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_gemma4_spec import scope, settings
from vllm_gemma4_spec.metrics import reports
from vllm_gemma4_spec.performance.draft_graphs import with_draft_length

# Attribute of a model runner: its AdaptiveK, or None where the setting is off or has no part.
STATE = "_gemma4_spec_adaptive_k"

_FILLER = 0
_KEEP = 0.9  # what is left of a request's history after one more step
_KEEP_ALL = 0.99  # the same, for the history of all requests
_REPORT_SECONDS = 1.0  # a report costs some 0.2 ms
_PRIOR = 2.0  # a new request starts as if it had this many positions of the average request behind it


@dataclass
class _History:
    """Draft positions that the target looked at, and how many of them it accepted; both decay."""

    tested: float = 0.0
    accepted: float = 0.0

    def add(self, tested: int, accepted: int, keep: float) -> None:
        self.tested = self.tested * keep + tested
        self.accepted = self.accepted * keep + accepted


class DraftLength:
    """Chooses the number of draft passes of a step from the acceptance of the requests in it.

    A position is taken to be accepted with a request's own recent rate, independently of its index; so a pass
    at position ``d`` yields ``rate ** d`` tokens. Passes are added while they yield more tokens per time than the
    step has without them.

    Args:
        k: the most passes.
        cost: time of a further pass, as a share of a step with one pass (verification and sampling included).
    """

    def __init__(self, k: int, cost: float) -> None:
        self.k, self.cost = k, cost
        # Optimistic: all passes run until acceptance is known.
        self._all = _History(_PRIOR, _PRIOR)
        self._requests: dict[str, _History] = {}

    def rate(self, request: str) -> float:
        """Chance that a draft position of this request is accepted."""
        average = self._all.accepted / self._all.tested
        history = self._requests.get(request) or _History()
        return (history.accepted + _PRIOR * average) / (history.tested + _PRIOR)

    def observe(self, request: str, drafted: int, accepted: int) -> None:
        """A step verified ``drafted`` tokens that passes had made, and accepted the first ``accepted`` of them."""
        accepted = min(accepted, drafted)
        tested = min(accepted + 1, drafted)
        self._requests.setdefault(request, _History()).add(tested, accepted, _KEEP)
        self._all.add(tested, accepted, _KEEP_ALL)

    def choose(self, requests: Sequence[str]) -> int:
        """Passes to run for a batch of these requests, 1 to k."""
        if len(self._requests) > 2 * len(requests) + 64:
            self._requests = {r: self._requests[r] for r in requests if r in self._requests}
        rates = reach = [self.rate(r) for r in requests]
        tokens, duration = 1.0 + sum(reach) / len(reach), 1.0
        for draft_length in range(2, self.k + 1):
            reach = [chance * rate for chance, rate in zip(reach, rates, strict=True)]
            more = sum(reach) / len(reach)
            if more * duration <= tokens * self.cost:
                return draft_length - 1
            tokens, duration = tokens + more, duration + self.cost
        return self.k


class AdaptiveK:
    """A model runner's :class:`DraftLength`, fed with the counts of the step before.

    Those were copied to the host while that step drafted, and vLLM has waited for its own copy of them by
    now, so nothing is waited for here. Ranks of a tensor-parallel group see the same counts and choose alike.
    """

    def __init__(self, k: int, cost: float, max_num_reqs: int, device: torch.device) -> None:
        self._draft_length = DraftLength(k, cost)
        self._drafted: dict[str, int] = {}  # request -> passes behind the drafts that it has now
        self._pending: list[tuple[str, int]] = []  # requests of the step before with drafts, and their passes
        cuda = device.type == "cuda"
        self._accepted = torch.zeros(max_num_reqs, dtype=torch.int32, pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None
        self._dropped, self._reported = 0, time.monotonic()

    def next_draft_length(self, requests: Sequence[str], num_drafts: Sequence[int], sampled: torch.Tensor) -> int:
        """Passes to run now.

        Args:
            requests: ids of the batch, in order.
            num_drafts: tokens of each that this step verified beside its last one; 0 for a prompt.
            sampled: ``[num_reqs, k + 1]``, what the sampler accepted and added; -1 elsewhere.
        """
        if self._pending:
            if self._copied is not None:
                self._copied.synchronize()
            counts = self._accepted[: len(self._pending)].tolist()
            for (request, drafted), accepted in zip(self._pending, counts, strict=True):
                self._draft_length.observe(request, drafted, accepted)
        self._pending = []
        if any(num_drafts):
            self._accepted[: len(requests)].copy_((sampled >= 0).sum(dim=1) - 1, non_blocking=True)
            if self._copied is not None:
                self._copied.record()
            self._pending = [(r, min(n, self._drafted.get(r, 0))) for r, n in zip(requests, num_drafts, strict=True)]
        draft_length = self._draft_length.choose(requests)
        self._drafted = dict.fromkeys(requests, draft_length)
        self._count((self._draft_length.k - draft_length) * len(requests))
        return draft_length

    def _count(self, dropped: int) -> None:
        self._dropped += dropped
        if self._dropped and time.monotonic() - self._reported > _REPORT_SECONDS:
            reports.count("drafts_left_out", self._dropped)
            self._dropped, self._reported = 0, time.monotonic()


def propose_draft_token_ids(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner.propose_draft_token_ids``: with fewer passes where acceptance is low.

    Patch: ``adaptive-k``. Evidence:
    ``tests/performance/test_adaptive_k.py::test_stock_runs_every_pass_whatever_is_accepted``. Related upstream change:
    none found by number; 0.24.0 chooses k by batch size, 0.28.0 verifies adaptively (V2 runner).
    """

    @functools.wraps(original)
    def wrapper(self: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        state = _state(self)
        if state is None:
            return original(self, scheduler_output, sampled_token_ids, *args, **kwargs)
        requests, spec_decode = self.input_batch.req_ids, args[4]
        num_drafts = [0] * len(requests) if spec_decode is None else spec_decode.num_draft_tokens
        with with_draft_length(self.drafter, state.next_draft_length(requests, num_drafts, sampled_token_ids)):
            drafts = original(self, scheduler_output, sampled_token_ids, *args, **kwargs)
        return torch.nn.functional.pad(drafts, (0, self.num_spec_tokens - drafts.shape[1]), value=_FILLER)

    return wrapper


def adapts(speculative_config: Any) -> bool:
    """Whether the setting is on and has a part: draft models and assistants, whose drafts stay on the GPU."""
    return (
        settings.ADAPTIVE_K.number() > 0
        and speculative_config is not None
        and (speculative_config.uses_draft_model() or scope.is_assistant(speculative_config))
        and not speculative_config.disable_padded_drafter_batch
        and not speculative_config.parallel_drafting
        and speculative_config.num_speculative_tokens > 1
    )


def _state(runner: Any) -> AdaptiveK | None:
    if not scope.gemma4_speculation(runner.vllm_config):
        return None
    if not hasattr(runner, STATE):
        made = None
        if adapts(runner.speculative_config):
            made = AdaptiveK(
                runner.num_spec_tokens,
                settings.ADAPTIVE_K.number(),
                runner.scheduler_config.max_num_seqs,
                runner.device,
            )
        setattr(runner, STATE, made)
    state: AdaptiveK | None = getattr(runner, STATE)
    return state
