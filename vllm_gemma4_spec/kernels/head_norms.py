"""What stands between a layer's qkv_proj and its attention, as one kernel: norms of all heads, rotary embedding, and
the cache write, where the operator can know where to.

Sums, weights and rotation are float32, rounded to bfloat16 once, at the end. A head's result does not depend on what
other tokens and heads there are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton

from vllm_gemma4_spec.kernels import cuda

logger = logging.getLogger("vllm.plugins.gemma4_spec")

OPERATOR = "gemma4_spec_norm_heads"
_ROWS = 4  # heads of a program, a warp each
_starts_early = functools.cache(cuda.starts_early)


@dataclass(frozen=True)
class Into:
    """Where a layer's keys and values are kept.

    Attributes:
        cache: ``[blocks, 2, block_size, kv_heads, size]`` of the heads' dtype; rows of ``size`` lie together.
        slots: ``[<= tokens]`` int64; tokens with one below 0, or with none, are left out.
        wrote: told the address of the keys that have been written.
    """

    cache: Tensor
    slots: Tensor
    wrote: Callable[[int], None]


def nowhere(q_weight: Tensor, qkv: Tensor) -> Into | None:
    """Whoever asked for the heads writes them."""
    return None


destination: Callable[[Tensor, Tensor], Into | None] = nowhere  # of a layer's q_weight and qkv


# One kernel for a layer, which available() has compiled.
@triton.jit(do_not_specialize=["tokens", "slotted"])
def _norm_heads(  # type: ignore[no-untyped-def]
    qkv,  # [tokens, heads * size], a token's query heads, key heads and value heads
    stride,
    positions,  # [tokens] int64
    cos_sin,  # [positions, size]: cosines of half a head's pairs of values, then sines
    q_weight,  # [size]
    k_weight,
    out,  # [tokens, q_heads, size], behind them [tokens, kv_heads, size] of keys, then of values
    cache,  # [blocks, 2, block_size, kv_heads, size], where write
    slots,  # [slotted] int64
    page_stride,
    value_stride,
    token_stride,
    head_stride,
    tokens,
    slotted,
    eps,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    block_size: tl.constexpr,
    write: tl.constexpr,
    early: tl.constexpr,  # launched before the kernel before has ended
):
    """Grid ``(tokens, heads / rows)``."""
    half: tl.constexpr = size // 2
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * rows + tl.arange(0, rows)
    dim = tl.arange(0, half)
    is_query, is_value = head < q_heads, head >= q_heads + kv_heads
    there = (head < q_heads + 2 * kv_heads)[:, None]
    first, second = tl.load(q_weight + dim), tl.load(q_weight + half + dim)
    key_first, key_second = tl.load(k_weight + dim), tl.load(k_weight + half + dim)
    if early:
        if not write:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if write:
        slot = tl.load(slots + token, mask=token < slotted, other=-1).to(tl.int64)
    at = qkv + token * stride + (head * size)[:, None] + dim[None, :]
    x = tl.load(at, mask=there, other=0.0).to(tl.float32)
    y = tl.load(at + half, mask=there, other=0.0).to(tl.float32)
    turn = cos_sin + tl.load(positions + token) * size + dim
    cos, sin = tl.load(turn).to(tl.float32)[None, :], tl.load(turn + half).to(tl.float32)[None, :]
    scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / size + eps)[:, None]
    query, value = is_query[:, None], is_value[:, None]
    x = x * scale * tl.where(value, 1.0, tl.where(query, first[None, :], key_first[None, :]).to(tl.float32))
    y = y * scale * tl.where(value, 1.0, tl.where(query, second[None, :], key_second[None, :]).to(tl.float32))
    of_keys = tokens * q_heads + token * kv_heads + head - q_heads
    of_values = of_keys + (tokens - 1) * kv_heads
    row = tl.where(is_query, token * q_heads + head, tl.where(is_value, of_values, of_keys))
    to = out + (row * size)[:, None] + dim[None, :]
    low, high = tl.where(value, x, x * cos - y * sin), tl.where(value, y, y * cos + x * sin)
    tl.store(to, low, mask=there)
    tl.store(to + half, high, mask=there)
    if write:
        at = slot // block_size * page_stride + slot % block_size * token_stride
        at += tl.where(
            is_value, value_stride + (head - q_heads - kv_heads) * head_stride, (head - q_heads) * head_stride
        )
        into, own = cache + at[:, None] + dim[None, :], there & (head >= q_heads)[:, None] & (slot >= 0)
        tl.store(into, low, mask=own)
        tl.store(into + half, high, mask=own)
        if early:  # not sooner: attention's programs would be spread around those of the kernels that still run
            tl.extra.cuda.gdc_launch_dependents()


def norm_heads(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_heads: int,
    kv_heads: int,
    eps: float,
    into: Into | None = None,
) -> Tensor:
    """RMS norm of each head, times its weight, turned by its token's position; of value heads the norm alone.

    Args:
        qkv: ``[tokens, >= (q_heads + 2 * kv_heads) * size]`` bfloat16; a row's values lie together.
        positions: ``[tokens]`` int64.
        cos_sin: ``[most positions, size]`` bfloat16, as vLLM's ``RotaryEmbedding.cos_sin_cache``, all of a head turned.
        q_weight, k_weight: ``[size]`` bfloat16; ``size`` is a power of two.
        kv_heads: 0 for a layer that shares another one's keys and values.
        into: keys and values are written there, too.

    Returns:
        ``[tokens * (q_heads + 2 * kv_heads) * size]``: all query heads, then all key heads, then all value heads.
    """
    tokens, size, heads = len(qkv), len(q_weight), q_heads + 2 * kv_heads
    out = qkv.new_empty(tokens * heads * size)
    cache, slots = (out, positions) if into is None else (into.cache, into.slots)  # neither is read where there is none
    if tokens:
        _norm_heads[(tokens, triton.cdiv(heads, _ROWS))](
            qkv,
            qkv.stride(0),
            positions,
            cos_sin,
            q_weight,
            k_weight,
            out,
            cache,
            slots,
            *(cache.stride()[:4] if into else (0, 0, 0, 0)),
            tokens,
            len(slots),
            eps,
            q_heads=q_heads,
            kv_heads=kv_heads,
            size=size,
            rows=_ROWS,
            block_size=cache.shape[2] if into else 1,
            write=into is not None,
            early=(early := _starts_early(qkv.device)),
            num_warps=_ROWS,
            launch_pdl=early,
        )
        if into:
            into.wrote(out.data_ptr() + out.element_size() * tokens * q_heads * size)
    return out


def operator(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_heads: int,
    kv_heads: int,
    eps: float,
) -> Tensor:
    """:func:`norm_heads`, into the layer's cache where that is known."""
    into = destination(q_weight, qkv) if kv_heads else None
    return norm_heads(qkv, positions, cos_sin, q_weight, k_weight, q_heads, kv_heads, eps, into)


def _shape(
    qkv: Tensor, _p: Tensor, _c: Tensor, q_weight: Tensor, _k: Tensor, q_heads: int, kv_heads: int, _e: float
) -> Tensor:
    return qkv.new_empty(qkv.shape[0] * (q_heads + 2 * kv_heads) * q_weight.shape[0])


@functools.cache
def register_operator() -> None:
    """``torch.ops.vllm.gemma4_spec_norm_heads``: opaque to torch.compile, which sees its shape only."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(OPERATOR, operator, fake_impl=_shape)


@functools.cache
def available(q_heads: int, kv_heads: int, size: int) -> bool:
    """Whether the kernel compiles here for such a layer; if not, the log says why, and vLLM's functions stay."""
    some: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    try:
        qkv, weight = torch.zeros(1, (q_heads + 2 * kv_heads) * size, **some), torch.zeros(size, **some)
        position = torch.zeros(1, dtype=torch.int64, device="cuda")
        of = qkv, position, weight[None], weight, weight, q_heads, kv_heads, 1e-6
        norm_heads(*of)
        if kv_heads:
            cache = torch.zeros(1, 2, 16, kv_heads, size, **some)
            norm_heads(*of, Into(cache, position, lambda _: None))
    except Exception as error:  # of Triton's compiler, which raises anything
        logger.info("Heads of %d stay vLLM's to norm and turn: %s", size, f"{error}".partition("\n")[0])
        return False
    return True
