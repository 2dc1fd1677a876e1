"""Split the key range of short multi-token queries, as vLLM does for queries of one token.

TRITON_ATTN has two kernels. One program per query block and KV head ("2D") walks the whole context: a
verification of k + 1 tokens at one request is 16 programs in a 31B target's sliding layers and 12 in its
full ones, on a card with 132 multiprocessors. The other ("3D") also cuts the context into 16 segments, but
is chosen for one token per request only. It is written for any query length; only its choice is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_gemma4_spec import scope

# Programs from which on the 2D kernel fills a GPU: vLLM's MIN_LAUNCH_GRID_SIZE_2D.
_FULL_GRID = 128
# Rows of a query block (BLOCK_M): vLLM's constant for up to 16 query heads per KV head.
_BLOCK_ROWS = 16


def fits(q: torch.Tensor, num_seqs: int, num_kv_heads: int, segments: int, scratch: torch.Tensor | None) -> bool:
    """Whether the 3D kernel is the better one and its scratch holds the batch; a function of shapes alone.

    Args:
        q: ``[num_tokens, num_query_heads, head_size]``.
        num_seqs: requests in the batch.
        num_kv_heads: KV heads of this layer.
        segments: parts that a context is cut into.
        scratch: the builder's, ``[tokens, heads, segments, head_size]`` float32, sized for the target's heads.
    """
    num_tokens, num_heads, head_size = q.shape
    group = num_heads // num_kv_heads
    if scratch is None or group > _BLOCK_ROWS:
        return False
    blocks = num_tokens // (_BLOCK_ROWS // group) + num_seqs
    # The kernels index scratch by their own head counts and sizes; maxima and sums have no room for head_size.
    held = scratch.shape[0] * scratch.shape[1]
    return (
        blocks * num_kv_heads <= _FULL_GRID
        and num_tokens * num_heads <= held
        and head_size <= scratch.shape[3]
        and segments == scratch.shape[2]
    )


# Attribute of the scratch of a metadata builder in scope; the kernel's caller is given tensors and no config.
IN_SCOPE = "_gemma4_spec_in_scope"


def builder_init(original: Callable[..., None]) -> Callable[..., None]:
    """``TritonAttentionMetadataBuilder.__init__``: marks the scratch of an engine in scope.

    Patch: ``split-attention``. Evidence: ``tests/kernels/test_patches.py::test_stock_walks_the_context_in_one_piece``.
    Related upstream change: none found for the choice of kernel; #43257, open, tunes it for head size 512.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.gemma4_engine(self.vllm_config):
            setattr(self.softmax_segm_output, IN_SCOPE, True)

    return __init__


def unified_attention(original: Callable[..., None]) -> Callable[..., None]:
    """``triton_attn.unified_attention``: tells the original that a short query has one token per request.

    The original reads ``max_seqlen_q`` and ``seq_threshold_3D`` for its choice of a kernel and for nothing else.

    Patch: ``split-attention``. Evidence: ``tests/kernels/test_patches.py::test_stock_walks_the_context_in_one_piece``.
    Related upstream change: none found for the choice of kernel; #43257, open, tunes it for head size 512.
    """

    @functools.wraps(original)
    def wrapper(**kwargs: Any) -> None:
        scratch = kwargs.get("softmax_segm_output")
        scoped = getattr(scratch, IN_SCOPE, False)
        if scoped and kwargs["max_seqlen_q"] > 1 and kwargs.get("mm_prefix_range") is None:
            num_seqs = len(kwargs["seqused_k"])
            segments = kwargs.get("num_par_softmax_segments")
            if segments is not None and fits(kwargs["q"], num_seqs, kwargs["k"].shape[2], segments, scratch):
                kwargs["max_seqlen_q"] = 1
                kwargs["seq_threshold_3D"] = num_seqs
        original(**kwargs)

    return wrapper
