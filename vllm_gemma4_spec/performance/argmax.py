"""The drafter's sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_gemma4_spec import scope

# Attribute of a draft model's proposer that holds its two-pass head; see kernels.head.
HEAD = "_gemma4_spec_head"


def get_top_tokens(original: None) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """``Gemma4ForCausalLM.get_top_tokens``: argmax per tensor-parallel rank, then over (value, index) pairs.

    Patch: ``local-argmax``. Evidence: ``tests/patching/test_stock.py::test_local_argmax_ends_the_engine``. Related
    upstream change: none found.
    """

    def get_top_tokens(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[num_tokens, hidden_size]`` -> ``[num_tokens]`` int64 token ids."""
        return self.logits_processor.get_top_tokens(self.lm_head, hidden_states)

    return get_top_tokens


def load_model(original: Callable[..., None]) -> Callable[..., None]:
    """``SpecDecodeBaseProposer.load_model``: then the two-pass head of a draft model, where it fits.

    Patch: ``draft-argmax``. Evidence: ``tests/kernels/test_patches.py::test_stock_computes_every_logit``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.gemma4_drafter(self.vllm_config) and self.device.type == "cuda":
            setattr(self, HEAD, head_of(self.model))

    return wrapper


def head_of(model: Any) -> Any:
    """A ``DraftHead``, or None where a drafter's lm_head is quantized or of another shape."""
    from vllm.distributed import get_tp_group

    from vllm_gemma4_spec.kernels import draft_head

    lm_head = getattr(model, "lm_head", None)
    weight = getattr(lm_head, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    group = get_tp_group()
    # Rows that pad the vocabulary would take part in the maximum.
    vocab = weight.shape[0] * group.world_size
    if not draft_head.suits(weight) or vocab != model.config.get_text_config().vocab_size:
        return None
    made = draft_head.DraftHead(weight.data, group=group if group.world_size > 1 else None)
    torch.cuda.synchronize()
    return made


def greedy_sample(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``SpecDecodeBaseProposer._greedy_sample``: the two-pass argmax where there is one.

    Patch: ``draft-argmax``. Evidence: ``tests/kernels/test_patches.py::test_stock_computes_every_logit``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        head = getattr(self, HEAD, None)
        if head is None or len(hidden_states) > head.most_requests:
            return original(self, hidden_states)
        return head.argmax(hidden_states)

    return wrapper
