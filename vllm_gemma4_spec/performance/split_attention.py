"""Split the key range of short multi-token queries, as vLLM does for queries of one token.

TRITON_ATTN has two kernels. One program per query block and KV head ("2D") walks the whole context: a
verification of k + 1 tokens at one request is 16 programs in a 31B target's sliding layers and 12 in its
full ones, on a card with 132 multiprocessors. The other ("3D") also cuts the context into 16 segments, but
is chosen for one token per request only. It is written for any query length; only its choice is not.

Where its scratch does not hold a batch, as that of a draft for 16 requests, each program of the 2D kernel still walks a
context by itself, tile after tile, and the GPU is far from full. There tiles of 64 keys take 0.6 times what tiles of 32
take (H200, E4B's sliding layers, 256 to 30,000 tokens of context).
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


# What the 2D kernel is launched with where few programs walk the contexts; and for which heads that was measured.
FEW_PROGRAMS = {"TILE_SIZE": 64, "num_warps": 8, "num_stages": 2}
_TILED_HEAD = 256
_changed: dict[str, int] = {}  # for the launches to come


def few_programs(q: torch.Tensor, k: torch.Tensor, num_seqs: int) -> bool:
    """Whether the 2D kernel would run few programs, of a kind for which larger tiles are known; of shapes alone.

    Args:
        q: ``[num_tokens, num_query_heads, head_size]``.
        k: ``[blocks, block_size, num_kv_heads, head_size]``.
    """
    num_tokens, num_heads, head_size = q.shape
    group = num_heads // k.shape[2]
    return (
        head_size == _TILED_HEAD
        and q.element_size() == 2
        and group <= _BLOCK_ROWS
        and (num_tokens // (_BLOCK_ROWS // group) + num_seqs) * k.shape[2] <= _FULL_GRID
    )


@functools.cache
def _larger_tiles(device: torch.device) -> bool:
    """On cards with 227 KB of shared memory for a block, unless a batch's size must not change the order of sums."""
    import vllm.envs as envs

    if device.type != "cuda" or envs.VLLM_BATCH_INVARIANT:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


class Kernel:
    """Stands for one of Triton's kernels, and launches it with other numbers while :data:`_changed` has some."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch: Callable[..., Any] = self._kernel[grid]
        if not _changed:
            return launch
        return lambda *args, **kwargs: launch(*args, **kwargs | _changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def attention_kernel(original: Any) -> Kernel:
    """``triton_unified_attention.kernel_unified_attention_2d``: launched with the numbers of :data:`FEW_PROGRAMS`.

    Patch: ``split-attention``. Evidence: ``tests/kernels/test_patches.py::test_stock_walks_the_context_in_one_piece``.
    Related upstream change: none found for the choice of kernel; #43257, open, tunes it for head size 512.
    """
    return Kernel(original)


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
        if not getattr(scratch, IN_SCOPE, False) or kwargs.get("mm_prefix_range") is not None:
            original(**kwargs)
            return
        q, k, num_seqs = kwargs["q"], kwargs["k"], len(kwargs["seqused_k"])
        segments = kwargs.get("num_par_softmax_segments")
        if kwargs["max_seqlen_q"] > 1 and segments is not None and fits(q, num_seqs, k.shape[2], segments, scratch):
            kwargs["max_seqlen_q"] = 1
            kwargs["seq_threshold_3D"] = num_seqs
        if few_programs(q, k, num_seqs) and _larger_tiles(q.device):
            _changed.update(FEW_PROGRAMS)  # read by the 2D kernel alone, if that is what the original chooses
        try:
            original(**kwargs)
        finally:
            _changed.clear()

    return wrapper
