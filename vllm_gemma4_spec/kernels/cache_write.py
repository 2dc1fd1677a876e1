"""The keys and values of a few tokens, written into a paged cache by a kernel that is launched early.

vLLM's kernel starts when everything before has ended and lets nothing behind it start before it has ended itself.
Here the kernel behind may start with this one, and fetch what this one does not write.
"""

from __future__ import annotations

from torch import Tensor
from vllm.triton_utils import tl, triton


@triton.jit
def _write_few(  # type: ignore[no-untyped-def]
    key,  # [tokens, kv_heads, size]
    value,
    key_cache,  # [blocks, block_size, kv_heads, size]
    value_cache,
    slots,  # [tokens] int64; below 0: of no token
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    k_stride,
    k_token_stride,
    k_head_stride,
    v_stride,
    v_token_stride,
    v_head_stride,
    size: tl.constexpr,
    block_size: tl.constexpr,
    early: tl.constexpr,  # launched before the kernel before has ended
):
    """Grid ``(tokens, kv_heads)``."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if early:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    dim = tl.arange(0, size)
    slot = tl.load(slots + token).to(tl.int64)
    # Asked for before the slot is known; what a padded token's rows hold is not written.
    k = tl.load(key + token * key_stride + head * key_head_stride + dim)
    v = tl.load(value + token * value_stride + head * value_head_stride + dim)
    page, within = slot // block_size, slot % block_size
    into_k = key_cache + page * k_stride + within * k_token_stride + head * k_head_stride + dim
    into_v = value_cache + page * v_stride + within * v_token_stride + head * v_head_stride + dim
    tl.store(into_k, k, mask=slot >= 0)
    tl.store(into_v, v, mask=slot >= 0)


def write(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, early: bool = True
) -> None:
    """Write each token's key and value where its slot says.

    Args:
        key: ``[>= tokens, kv_heads, size]``, as ``value``; rows of ``size``, a power of two, lie together.
        key_cache: ``[blocks, block_size, kv_heads, size]`` of the same dtype, as ``value_cache``.
        slots: ``[tokens]`` int64; tokens with one below 0 are left out.
    """
    size = key.shape[2]
    _write_few[(len(slots), key.shape[1])](
        key,
        value,
        key_cache,
        value_cache,
        slots,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        size=size,
        block_size=key_cache.shape[1],
        early=early,
        num_warps=max(1, size // 256),  # 16 bytes a thread
        launch_pdl=early,
    )
