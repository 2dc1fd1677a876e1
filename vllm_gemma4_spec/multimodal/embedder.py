"""The projection from a tower's soft tokens to the language model's embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.layernorm import RMSNorm


def embedder_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Gemma4MultimodalEmbedder.__init__``: the norm stands before the projection, not behind it.

    Source: ``embedding_pre_projection_norm`` of transformers' class of the same name. Neither norm has
    weights, so the checkpoint is read as before.

    Patch: ``embedder-norm``. Evidence: ``tests/multimodal/test_images.py::test_stock_projects_before_it_normalises``.
    Related upstream change: #40411; in 0.20.0.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        norm = RMSNorm(self.embedding_projection.input_size, eps=self.eps, has_weight=False)
        # A hook, so that `embedding_projection` stays the linear layer whose weight is loaded and looked at.
        self.embedding_projection.register_forward_pre_hook(lambda _, inputs: (norm(inputs[0]),))
        self.embedding_post_projection_norm = torch.nn.Identity()

    return __init__
