"""``min_tokens`` after the last draft of a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

from vllm_gemma4_spec.scope import gemma4_model


class MinTokens(MinTokensLogitsProcessor):
    """vLLM's processor, which counts the drafts of a step before the token after them, too."""

    drafts: Sequence[int] | None = None  # how many, by row, while a speculative step is sampled

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (requests, vocabulary) of the token after the last draft, or after the output without drafts."""
        drafts = self.drafts
        if not self.min_toks or drafts is None:
            return super().apply(logits)
        at = [
            (row, token)
            for row, (least, output, stops) in self.min_toks.items()
            if len(output) + drafts[row] < least
            for token in stops
        ]
        if at:
            rows, tokens = zip(*at, strict=True)
            places = self._device_tensor(rows, torch.int32), self._device_tensor(tokens, torch.int32)
            logits.index_put_(places, self.neg_inf_tensor)
        return logits


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
        return LogitsProcessors(
            MinTokens(vllm_config, device, is_pin_memory) if type(p) is MinTokensLogitsProcessor else p
            for p in built.all
        )

    return wrapper


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``RejectionSampler.forward``: while it samples, the processor knows how many drafts each request has.

    Patch: ``min-tokens``. Evidence:
    ``tests/requests/test_requests_engine.py::test_stock_vllm_forgets_grammar_budget_and_stop_strings``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        ours = [p for p in sampling_metadata.logitsprocs.non_argmax_invariant if isinstance(p, MinTokens)]
        for processor in ours:
            processor.drafts = metadata.num_draft_tokens
        try:
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        finally:
            for processor in ours:
                processor.drafts = None

    return wrapper
