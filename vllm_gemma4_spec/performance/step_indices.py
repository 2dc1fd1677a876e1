"""Where a step's drafts and their logits lie: found once for steps that are alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_gemma4_spec import scope

# Attribute of a runner with its last step's :class:`_Kept`.
KEPT = "_gemma4_spec_step_indices"


@dataclass
class _Kept:
    """A step: how many drafts each request had, and where they are.

    Attributes:
        key: what vLLM computes the rest from.
        rows: ``[num_drafts]`` int64, where the drafts stand in the step's tokens; None until a second step is alike.
    """

    key: tuple[bytes, bytes]
    metadata: Any
    rows: torch.Tensor | None = None


def calc_spec_decode_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner._calc_spec_decode_metadata``: the last step's, if each request has as many tokens and drafts.

    Patch: ``step-indices``. Evidence: ``tests/performance/test_step_indices.py::test_stock_copies_indices_each_step``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, num_draft_tokens: Any, cu_num_scheduled_tokens: Any) -> Any:
        if not scope.gemma4_engine(self.vllm_config):
            return original(self, num_draft_tokens, cu_num_scheduled_tokens)
        key = num_draft_tokens.tobytes(), cu_num_scheduled_tokens.tobytes()
        kept: _Kept | None = getattr(self, KEPT, None)
        if kept is None or kept.key != key:
            made = original(self, num_draft_tokens, cu_num_scheduled_tokens)
            setattr(self, KEPT, _Kept(key, replace(made, num_draft_tokens=[*made.num_draft_tokens])))
            return made
        metadata = kept.metadata
        if kept.rows is None:
            kept.rows = metadata.logits_indices[metadata.target_logits_indices + 1]
        return replace(
            metadata,
            draft_token_ids=self.input_ids.gpu[kept.rows],
            num_draft_tokens=[*metadata.num_draft_tokens],
        )

    return wrapper
