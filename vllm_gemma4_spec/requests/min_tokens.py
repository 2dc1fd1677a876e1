"""``min_tokens`` after the last draft of a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor, process_dict_updates

from vllm_gemma4_spec.scope import gemma4_model

# Attribute of an engine's LogitsProcessors: its MinTokens.
MIN_TOKENS = "_gemma4_spec_min_tokens"


class MinTokens(MinTokensLogitsProcessor):
    """vLLM's processor, but for two counts.

    The drafts of a step count before the token after them. And with async scheduling a request's output has a
    placeholder for every draft of the step before, rejected or not, until logits are there: a request is forgotten only
    once its output is long enough without them.
    """

    drafts: Sequence[int] | None = None  # how many, by row, while a speculative step is sampled

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._most_drafts: int = vllm_config.speculative_config.num_speculative_tokens
        self._at: list[tuple[int, int]] = []  # rows and tokens that were forbidden last, and the same as tensors
        self._places: tuple[torch.Tensor, ...] = ()

    @staticmethod
    def add_request(params: Any, _: list[int] | None, output: list[int]) -> tuple[int, Sequence[int], set[int]] | None:
        return (params.min_tokens, output, params.all_stop_token_ids) if params.min_tokens else None

    def update_state(self, batch_update: Any) -> None:
        if batch_update:
            process_dict_updates(self.min_toks, batch_update, self.add_request)
        for row, (least, output, _) in tuple(self.min_toks.items()):
            if len(output) - self._most_drafts >= least:
                del self.min_toks[row]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (requests, vocabulary) of the token after the last draft, or after the output without drafts."""
        at: list[tuple[int, int]] = []
        for row, (least, output, stops) in self.min_toks.items():
            if len(output) + (self.drafts[row] if self.drafts is not None else 0) < least:
                at += [(row, token) for token in stops]
        if at and at != self._at:
            self._at = at
            self._places = tuple(self._device_tensor(places, torch.int32) for places in zip(*at, strict=True))
        if at:
            logits.index_put_(self._places, self.neg_inf_tensor)
        return logits


def make_sampling_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InputBatch._make_sampling_metadata``: outputs lose their placeholders before they are counted.

    Patch: ``min-tokens``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> Any:
        processor = getattr(self.logitsprocs, MIN_TOKENS, None)
        if processor is None or not processor.min_toks:
            return original(self)
        needed = self.logitsprocs_need_output_token_ids
        self.logitsprocs_need_output_token_ids = True
        try:
            return original(self)
        finally:
            self.logitsprocs_need_output_token_ids = needed

    return wrapper


def build_logitsprocs(original: Callable[..., Any]) -> Callable[..., Any]:
    """``build_logitsprocs``: this processor in place of vLLM's.

    Patch: ``min-tokens``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(vllm_config: Any, device: Any, is_pin_memory: bool, *args: Any, **kwargs: Any) -> Any:
        built = original(vllm_config, device, is_pin_memory, *args, **kwargs)
        if vllm_config.speculative_config is None or not gemma4_model(vllm_config.model_config):
            return built
        ours = MinTokens(vllm_config, device, is_pin_memory)
        processors = built.non_argmax_invariant
        processors[:] = [ours if type(p) is MinTokensLogitsProcessor else p for p in processors]
        if ours in processors:
            setattr(built, MIN_TOKENS, ours)
        return built

    return wrapper


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``RejectionSampler.forward``: while it samples, the processor knows how many drafts each request has.

    Patch: ``min-tokens``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        processor = getattr(sampling_metadata.logitsprocs, MIN_TOKENS, None)
        if processor is None or not processor.min_toks:
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        processor.drafts = metadata.num_draft_tokens
        try:
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        finally:
            processor.drafts = None

    return wrapper
