"""Drafting beside a prompt that is computed in chunks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_gemma4_spec.spec_decode.proposer import RUNNER


def prepare_next_token_ids_padded(
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``prepare_next_token_ids_padded``: after a chunk of a prompt follows the prompt's next token.

    The original takes the last token of the whole prompt. An EAGLE head pairs it with the chunk's last
    hidden state and keeps the KV of that pair; a draft model computes that position again in the next chunk.

    Patch: ``chunk-boundaries``. Evidence:
    ``tests/eagle/test_heads.py::test_stock_follows_a_chunk_with_the_prompts_last_token``. Related upstream change: none
    found.
    """

    @functools.wraps(original)
    def wrapper(
        self: Any, sampled_token_ids: torch.Tensor, requests: Any, gpu_input_batch: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        runner = getattr(self, RUNNER, None)
        if runner is None:
            return original(self, sampled_token_ids, requests, gpu_input_batch, *args, **kwargs)
        num_reqs = gpu_input_batch.num_reqs
        unfinished = runner.discard_request_mask.np[:num_reqs]
        if unfinished.any():
            computed = runner.optimistic_seq_lens_cpu[:num_reqs].numpy()
            gpu_input_batch = copy.copy(gpu_input_batch)
            # The original looks up the token before this count.
            known = gpu_input_batch.num_tokens_no_spec[:num_reqs]
            gpu_input_batch.num_tokens_no_spec = np.where(unfinished, computed + 1, known)
        return original(self, sampled_token_ids, requests, gpu_input_batch, *args, **kwargs)

    return wrapper
