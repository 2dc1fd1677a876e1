"""What the model registry asks of the assistant's class, without importing its layers.

vLLM looks at a class by importing it in a new process, some ten seconds of a start. It needs no more than the
signatures below; the network in ``model`` derives from them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Gemma4MTP(nn.Module):
    """A Gemma 4 assistant, as the registry sees it."""

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        raise NotImplementedError
