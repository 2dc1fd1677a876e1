"""Attention of a few queries per request over a paged KV cache, the keys that a query sees cut into equal parts.

vLLM's kernel with segments cuts up the whole context, of which a sliding layer's window lies in one or two of 16 parts,
and adds the parts up in a kernel of its own. Here a program takes one part of what its queries see, and the last of a
block's programs adds up all of them. A row's sums do not depend on the rows beside it: only the length of its context
and the number of parts, which is the batch's, say where parts begin.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from vllm.triton_utils import tl, triton


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "split", "segments"])
def _few_queries(  # type: ignore[no-untyped-def]
    out,  # [tokens, heads, size]
    q,  # [tokens, heads, size]
    k,  # [blocks, block_size, kv_heads, size]
    v,
    partial,  # [tokens, heads, segments, size] float32
    sums,  # [tokens, heads, segments, 2] float32: largest score (of base 2) and sum
    arrivals,  # [blocks of queries, kv_heads] int32, zero
    table,  # [requests, pages] int32
    lengths,  # [requests] int32: keys of a request, its queries' among them
    starts,  # [requests + 1] int32
    k_scale,  # [1] float32
    v_scale,
    scale,
    num_seqs,
    split,  # parts of what is seen
    segments,  # parts that a block of queries may touch
    table_stride,
    q_stride,
    q_head_stride,
    out_stride,
    out_head_stride,
    k_stride,
    k_token_stride,
    k_head_stride,
    v_stride,
    v_token_stride,
    v_head_stride,
    heads: tl.constexpr,
    group: tl.constexpr,  # query heads of a KV head
    size: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.constexpr,  # 0: none
    rows: tl.constexpr,  # of a block of queries: its queries times their heads
    tile: tl.constexpr,  # keys at a time
    all_segments: tl.constexpr,  # as many or more, a power of two
    one: tl.constexpr,  # a token a request
    all_seqs: tl.constexpr,  # as many requests or more, a power of two
    scaled: tl.constexpr,  # whether k_scale and v_scale count
    early: tl.constexpr,  # launched before the kernel before has ended
):
    block, kv_head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    queries: tl.constexpr = rows // group  # a block's
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if one:
        request, local = block, 0
    else:
        each = tl.arange(0, all_seqs)
        first = tl.load(starts + each, mask=each < num_seqs, other=2**30) // queries + each
        request = tl.sum((first <= block).to(tl.int32), 0) - 1
        local = block - tl.load(starts + request) // queries - request
    start, end = tl.load(starts + request), tl.load(starts + request + 1)
    length = tl.load(lengths + request)
    if local * queries >= end - start:
        return
    context = length - (end - start)
    first_seen = 0
    seen = length
    if window:
        first_seen = tl.maximum(context + local * queries - window + 1, 0)
        seen = tl.minimum(length, window)
    behind = tl.minimum(context + (local + 1) * queries, length)  # the last seen key's
    part = tl.cdiv(seen, split * tile) * tile
    lowest = first_seen // part
    live = tl.cdiv(behind, part) - lowest
    if segment >= live:
        return
    row, dim, slot = tl.arange(0, rows), tl.arange(0, size), tl.arange(0, tile)
    query = local * queries + row // group
    token, head = start + query, kv_head * group + row % group
    is_row = (start + query < end) & (row < queries * group)
    x = tl.load(
        q + token[:, None].to(tl.int64) * q_stride + head[:, None] * q_head_stride + dim[None, :],
        mask=is_row[:, None],
        other=0.0,
    )
    if x.dtype.is_fp8():
        x = x.to(tl.bfloat16)
    factor = scale * 1.4426950408889634
    if scaled:
        factor *= tl.load(k_scale)
    position = context + query
    largest = tl.full((rows,), -float("inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    acc = tl.zeros((rows, size), tl.float32)
    begin = tl.maximum(first_seen // tile * tile, (lowest + segment) * part)
    for at in range(begin, tl.minimum((lowest + segment + 1) * part, behind), tile):
        key = at + slot
        is_seen = (key >= first_seen) & (key < behind)  # elsewhere the cache may hold anything
        page = tl.load(table + request * table_stride + key // block_size, mask=is_seen, other=0).to(tl.int64)
        within = key % block_size
        keys = tl.load(
            k + (page * k_stride + within * k_token_stride + kv_head * k_head_stride)[None, :] + dim[:, None],
            mask=is_seen[None, :],
            other=0.0,
        ).to(x.dtype)
        values = tl.load(
            v + (page * v_stride + within * v_token_stride + kv_head * v_head_stride)[:, None] + dim[None, :],
            mask=is_seen[:, None],
            other=0.0,
        ).to(x.dtype)
        visible = is_row[:, None] & (key[None, :] <= position[:, None]) & is_seen[None, :]
        if window:
            visible = visible & (position[:, None] - key[None, :] < window)
        score = tl.where(visible, tl.dot(x, keys) * factor, -float("inf"))
        now = tl.maximum(largest, tl.max(score, 1))
        base = tl.where(now > -float("inf"), now, 0.0)
        weight = tl.exp2(score - base[:, None])
        fade = tl.exp2(largest - base)
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None] + tl.dot(weight.to(x.dtype), values)
        largest = now
    if live > 1:
        line = token.to(tl.int64) * heads + head
        tl.store(partial + ((line * segments + segment) * size)[:, None] + dim[None, :], acc, mask=is_row[:, None])
        tl.store(sums + (line * segments + segment) * 2, largest, mask=is_row)
        tl.store(sums + (line * segments + segment) * 2 + 1, total, mask=is_row)
        tl.debug_barrier()  # all threads' parts are written when one tells that they are
        counter = arrivals + block * tl.num_programs(1) + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") != live - 1:
            return
        tl.store(counter, 0)
        each_part = tl.arange(0, all_segments)
        those = is_row[:, None] & (each_part < live)[None, :]
        stored = sums + ((line * segments)[:, None] + each_part[None, :]) * 2
        each_largest = tl.load(stored, mask=those, other=-float("inf"), cache_modifier=".cg")
        each_total = tl.load(stored + 1, mask=those, other=0.0, cache_modifier=".cg")
        largest = tl.max(each_largest, 1)
        base = tl.where(largest > -float("inf"), largest, 0.0)
        total = tl.sum(tl.exp2(each_largest - base[:, None]) * each_total, 1)
        acc = tl.zeros((rows, size), tl.float32)
        for first_part in range(0, live, 4):
            for j in tl.static_range(4):
                i = first_part + j
                there = is_row & (i < live)
                share = sums + (line * segments + i) * 2
                share = tl.exp2(tl.load(share, mask=there, other=-float("inf"), cache_modifier=".cg") - base)
                part_acc = tl.load(
                    partial + ((line * segments + i) * size)[:, None] + dim[None, :],
                    mask=there[:, None],
                    other=0.0,
                    cache_modifier=".cg",
                )
                acc += share[:, None] * part_acc
    if scaled:
        acc *= tl.load(v_scale)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out + token[:, None].to(tl.int64) * out_stride + head[:, None] * out_head_stride + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=is_row[:, None],
    )


@dataclass(frozen=True)
class Form:
    """How the kernel is launched.

    Attributes:
        split: parts of what a query sees, at most.
        tile: keys at a time.
        warps: of a program.
        stages: tiles that are asked for at a time.
        rows: of a block of queries, its queries times their heads.
        early: launched before the kernel before has ended.
    """

    split: int
    tile: int
    warps: int = 4
    stages: int = 2
    rows: int = 16
    early: bool = True

    def segments(self, window: int, one: bool) -> int:
        """Parts that a block of queries touches at most: they begin at multiples, and a window does not."""
        return self.split + (0 if not window else 1 if one else 2)

    def scratch(self, tokens: int, num_seqs: int, heads: int, kv_heads: int, size: int, window: int) -> tuple[int, int]:
        """Floats and counters that a launch needs at most."""
        blocks = tokens // (self.rows * kv_heads // heads) + num_seqs
        return tokens * heads * self.segments(window, False) * (size + 2), blocks * kv_heads


def attention(
    form: Form,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float,
    window: int,
    scratch: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None = None,
    one: bool | None = None,
) -> None:
    """Fill ``out`` with the attention of ``q`` over the keys of its request up to each query's own.

    Args:
        k: ``[blocks, block_size, kv_heads, size]``, as ``v``; rows of ``size`` lie together.
        lengths: keys of each request, those of its queries among them.
        starts: first token of each request, and behind the last.
        window: keys that a query sees at most; 0: all.
        scratch: float32 memory and zeroed int32 counters, of at least :meth:`Form.scratch`'s size.
        scales: of ``k`` and ``v``, if they count.
        one: whether each request has one token; default: as many tokens as requests.
    """
    tokens, heads, size = q.shape
    num_seqs, kv_heads = len(lengths), k.shape[2]
    group = heads // kv_heads
    one = tokens == num_seqs if one is None else one
    segments = form.segments(window, one)
    blocks = num_seqs if one else tokens // (form.rows // group) + num_seqs
    floats, counters = scratch
    lines = tokens * heads * segments
    partial, sums = floats[: lines * size], floats[lines * size : lines * (size + 2)]
    _few_queries[(blocks, kv_heads, segments)](
        out,
        q,
        k,
        v,
        partial,
        sums,
        counters,
        table,
        lengths,
        starts,
        scales[0] if scales else None,
        scales[1] if scales else None,
        scale,
        num_seqs,
        form.split,
        segments,
        table.stride(0),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        *k.stride()[:3],
        *v.stride()[:3],
        heads=heads,
        group=group,
        size=size,
        block_size=k.shape[1],
        window=window,
        rows=form.rows,
        tile=form.tile,
        all_segments=max(32, triton.next_power_of_2(segments)),  # few variants to compile
        one=one,
        all_seqs=max(16, triton.next_power_of_2(num_seqs)),
        scaled=scales is not None,
        early=form.early,
        num_warps=form.warps,
        num_stages=form.stages,
        launch_pdl=form.early,
    )
