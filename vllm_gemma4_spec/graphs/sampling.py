"""The drafter's sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def get_top_tokens(original: None) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """``Gemma4ForCausalLM.get_top_tokens``: argmax per tensor-parallel rank, then over (value, index) pairs."""

    def get_top_tokens(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[num_tokens, hidden_size]`` -> ``[num_tokens]`` int64 token ids."""
        return self.logits_processor.get_top_tokens(self.lm_head, hidden_states)

    return get_top_tokens
