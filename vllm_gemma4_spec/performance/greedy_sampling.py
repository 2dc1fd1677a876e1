"""Greedy tokens of a step where nothing else is asked of its logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import cuda

# Attribute of a sampler whose engine is a Gemma 4's: the most drafts that a request may have in a step.
OURS = "_gemma4_spec_greedy"
# Attribute of a sampler whose kernels are compiled.
WARM = "_gemma4_spec_greedy_warm"


@functools.cache
def _where_requests_are() -> dict[type, str]:
    """Processors that may change the largest logit, and the attribute that is false while one has nothing to do."""
    from vllm.v1.sample.logits_processor import builtin

    from vllm_gemma4_spec.requests.min_tokens import MinTokens
    from vllm_gemma4_spec.requests.thinking_budget import ThinkingBudget

    return {
        builtin.LogitBiasLogitsProcessor: "biases",
        builtin.MinTokensLogitsProcessor: "min_toks",
        builtin.ThinkingTokenBudgetLogitsProcessor: "is_enabled",
        MinTokens: "min_toks",
        ThinkingBudget: "requests",
    }


def _idle(processor: Any) -> bool:
    """Whether a processor that may change the largest logit has nothing to do; False for one that is not known here."""
    requests = _where_requests_are().get(type(processor))
    return requests is not None and not getattr(processor, requests)


def only_largest(metadata: Any) -> bool:
    """Whether every request of a step wants the largest of its logits as they are, and nothing else of them.

    Args:
        metadata: vLLM's ``SamplingMetadata``.
    """
    return (
        metadata.all_greedy
        and metadata.max_num_logprobs is None
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and all(_idle(p) for p in metadata.logitsprocs.non_argmax_invariant)
    )


def _sampled(
    sampler: Any, logits: torch.Tensor, sampling_metadata: Any, sample: Callable[[], torch.Tensor]
) -> torch.Tensor | None:
    """What ``sample`` gives, or None where vLLM has to sample; the first time that it has to the kernels are compiled.

    vLLM's start samples like that, so no request waits for it.
    """
    if not cuda.nvidia(logits) or not hasattr(sampler, OURS):
        return None
    from vllm_gemma4_spec.kernels import greedy

    if not greedy.suits(logits):
        return None
    if only_largest(sampling_metadata):
        return sample()
    if not getattr(sampler, WARM, False):
        setattr(sampler, WARM, True)
        sample()
    return None


def sampler_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Sampler.__init__`` and ``RejectionSampler.__init__``: a Gemma 4's know that they are.

    Patch: ``greedy-sampling``. Evidence:
    ``tests/performance/test_greedy_sampling.py::test_stock_copies_the_logits_first``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = scope.current_config()
        if scope.gemma4_engine(config):
            setattr(self, OURS, getattr(config.speculative_config, "num_speculative_tokens", 0))

    return __init__


def sampler_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Sampler.forward``: two kernels where a step wants the largest logits alone.

    Patch: ``greedy-sampling``. Evidence:
    ``tests/performance/test_greedy_sampling.py::test_stock_copies_the_logits_first``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.outputs import SamplerOutput

        from vllm_gemma4_spec.kernels import greedy

        tokens = _sampled(self, logits, sampling_metadata, lambda: greedy.tokens(logits).unsqueeze(-1))
        if tokens is None:
            return original(self, logits, sampling_metadata, *args, **kwargs)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)

    return wrapper


def rejection_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``RejectionSampler.forward``: two kernels where a step wants the largest logits alone.

    Patch: ``greedy-sampling``. Evidence:
    ``tests/performance/test_greedy_sampling.py::test_stock_copies_the_logits_first``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        from vllm.v1.outputs import SamplerOutput

        from vllm_gemma4_spec.kernels import greedy

        def sample() -> torch.Tensor:
            return greedy.verdict(metadata, logits, getattr(self, OURS))

        tokens = _sampled(self, logits, sampling_metadata, sample)
        if tokens is None:
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)

    return wrapper
