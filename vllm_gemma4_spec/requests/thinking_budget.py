"""``thinking_token_budget`` at every position: after each draft, and after the last."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.v1.sample.logits_processor.builtin import ThinkingTokenBudgetLogitsProcessor, process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor

from vllm_gemma4_spec.requests.thinking import Thinking
from vllm_gemma4_spec.scope import gemma4_model

FORCED = 1e9  # the logit of a token that must come, as in vLLM's processor
# Attribute of an engine's LogitsProcessors: its ThinkingBudget.
BUDGET = "_gemma4_spec_budget"


class _Request:
    """One request: its state after the first ``seen`` tokens of its output, a list that vLLM goes on filling."""

    def __init__(self, thinking: Thinking, output: list[int]) -> None:
        self.thinking, self.output, self.seen = thinking, output, 0

    def now(self) -> Thinking:
        """The state after every token that is known.

        It is read when logits are there: with async scheduling the last tokens are placeholders (-1) until then.
        """
        while self.seen < len(self.output) and self.output[self.seen] >= 0:
            self.thinking.push(self.output[self.seen])
            self.seen += 1
        return self.thinking


class ThinkingBudget(LogitsProcessor):
    """Forces the end of reasoning where a request's budget is spent; nothing is computed for other requests."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        config = vllm_config.reasoning_config
        self._start, self._end = config.reasoning_start_token_ids, config.reasoning_end_token_ids
        self._device, self._pin_memory = device, is_pin_memory
        self.requests: dict[int, _Request] = {}  # those with a budget, by their row in the batch
        self.drafts: Sequence[Sequence[int]] | None = None  # by row, while a speculative step is sampled

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update:
            process_dict_updates(self.requests, batch_update, self._new)

    def _new(self, params: Any, prompt: list[int] | None, output: list[int]) -> _Request | None:
        budget = params.thinking_token_budget
        if budget is None:
            return None
        return _Request(Thinking(budget, self._start, self._end, prompt or ()), output)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (requests, vocabulary) of the token after the last draft, or after the output without drafts."""
        if not self.requests:
            return logits
        forced = []
        for row, request in self.requests.items():
            thinking = request.now()
            drafts = self.drafts[row] if self.drafts is not None else ()
            if not thinking.may_end_within(len(drafts)):
                continue
            if drafts:
                thinking = thinking.copy()
                for token in drafts:
                    thinking.push(token)
            if thinking.wanted is not None:
                forced.append((row, thinking.wanted))
        return self._force(logits, forced)

    def apply_to_drafts(
        self, logits: torch.Tensor, drafts: Sequence[Sequence[int]], num_draft_tokens: list[int]
    ) -> torch.Tensor:
        """Logits (drafts of all requests, vocabulary) that the drafts are verified with."""
        forced = []
        first = 0
        for row, count in enumerate(num_draft_tokens):
            request = self.requests.get(row)
            if request is not None and request.now().may_end_within(count - 1):
                thinking = request.now().copy()
                for at, token in enumerate(drafts[row][:count]):
                    if thinking.wanted is not None:
                        forced.append((first + at, thinking.wanted))
                    thinking.push(token)
            first += count
        return self._force(logits, forced)

    def _force(self, logits: torch.Tensor, forced: list[tuple[int, int]]) -> torch.Tensor:
        if forced:
            at = torch.tensor(forced, dtype=torch.int64, device="cpu", pin_memory=self._pin_memory)
            rows, tokens = at.to(self._device, non_blocking=True).unbind(1)
            logits.index_put_((rows, tokens), logits.new_full((), FORCED))
        return logits


def build_logitsprocs(original: Callable[..., Any]) -> Callable[..., Any]:
    """``build_logitsprocs``: this processor in place of vLLM's, which is left out with speculation.

    Patch: ``thinking-budget``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(vllm_config: Any, device: Any, is_pin_memory: bool, *args: Any, **kwargs: Any) -> Any:
        built = original(vllm_config, device, is_pin_memory, *args, **kwargs)
        config = vllm_config.model_config
        if vllm_config.reasoning_config is None or not gemma4_model(config) or config.runner_type == "pooling":
            return built
        ours = ThinkingBudget(vllm_config, device, is_pin_memory)
        processors = built.non_argmax_invariant
        processors[:] = [p for p in processors if not isinstance(p, ThinkingTokenBudgetLogitsProcessor)]
        processors.append(ours)
        setattr(built, BUDGET, ours)
        return built

    return wrapper


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``RejectionSampler.forward``: while it samples, the processor knows the drafts.

    Patch: ``thinking-budget``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        budget = getattr(sampling_metadata.logitsprocs, BUDGET, None)
        if budget is None or not budget.requests:
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        budget.drafts = sampling_metadata.spec_token_ids
        try:
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        finally:
            budget.drafts = None

    return wrapper


def apply_logits_processors(original: Callable[..., Any]) -> Callable[..., Any]:
    """``RejectionSampler.apply_logits_processors``: the original knows min_tokens alone.

    Patch: ``thinking-budget``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, logits: Any, sampling_metadata: Any, metadata: Any) -> Any:
        logits = original(self, logits, sampling_metadata, metadata)
        budget = getattr(sampling_metadata.logitsprocs, BUDGET, None)
        if budget is None or not budget.requests:
            return logits
        return budget.apply_to_drafts(logits, sampling_metadata.spec_token_ids, metadata.num_draft_tokens)

    return wrapper
