"""Attention of a few queries per request over a paged KV cache, the keys that a query sees cut into equal parts.

vLLM's kernel with segments cuts up the whole context, of which a sliding layer's window lies in one or two of 16 parts.
Here a program takes one part of what its queries see. A row's sums do not depend on the rows beside it: only the length
of its context and the number of parts, which is the batch's, say where parts begin.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from vllm.triton_utils import tl, triton


@triton.jit
def _seen(  # type: ignore[no-untyped-def]
    length, context, local, split, queries: tl.constexpr, window: tl.constexpr, tile: tl.constexpr
):
    """First key that a block of queries sees, and behind the last; keys of a part, the first part, and how many."""
    first = 0
    seen = length
    if window:
        first = tl.maximum(context + local * queries - window + 1, 0)
        seen = tl.minimum(length, window)
    behind = tl.minimum(context + (local + 1) * queries, length)
    part = tl.maximum(tl.cdiv(seen, split * tile), 1) * tile
    lowest = first // part
    return first, behind, part, lowest, tl.maximum(tl.cdiv(behind, part) - lowest, 1)  # padding sees nothing: zeros


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "split", "segments"])
def _few_queries(  # type: ignore[no-untyped-def]
    out,  # [tokens, heads, size]
    q,  # [tokens, heads, size]
    k,  # [blocks, block_size, kv_heads, size]
    v,
    partial,  # [tokens, heads, segments, size] float32
    sums,  # [tokens, heads, segments, 2] float32: largest score (of base 2) and sum
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
    request, local = block, 0
    if not one:
        each = tl.arange(0, all_seqs)
        first = tl.load(starts + each, mask=each < num_seqs, other=2**30) // queries + each
        request = tl.sum((first <= block).to(tl.int32), 0) - 1
        local = block - tl.load(starts + request) // queries - request
    start, end = tl.load(starts + request), tl.load(starts + request + 1)
    length = tl.load(lengths + request)
    if local * queries >= end - start:
        return
    context = length - (end - start)
    first_seen, behind, part, lowest, live = _seen(length, context, local, split, queries, window, tile)
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
    if scaled:
        acc *= tl.load(v_scale)
    if live > 1:
        line = (token.to(tl.int64) * heads + head) * segments + segment
        tl.store(partial + (line * size)[:, None] + dim[None, :], acc, mask=is_row[:, None])
        tl.store(sums + line * 2, largest, mask=is_row)
        tl.store(sums + line * 2 + 1, total, mask=is_row)
    else:
        tl.store(
            out + token[:, None].to(tl.int64) * out_stride + head[:, None] * out_head_stride + dim[None, :],
            (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty),
            mask=is_row[:, None],
        )


@triton.jit(do_not_specialize=["num_seqs", "split", "segments"])
def _add_parts(  # type: ignore[no-untyped-def]
    out,
    partial,
    sums,
    lengths,
    starts,
    num_seqs,
    split,
    segments,
    out_stride,
    out_head_stride,
    heads: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    window: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
    all_segments: tl.constexpr,  # as many or more, a power of two
    one: tl.constexpr,
    all_seqs: tl.constexpr,
    early: tl.constexpr,
):
    """Grid ``(tokens, heads)``: what the programs of :func:`_few_queries` left of one row, whose part was not all."""
    token, head = tl.program_id(0), tl.program_id(1)
    queries: tl.constexpr = rows // group
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    request = token
    if not one:
        each = tl.arange(0, all_seqs)
        request = tl.sum((tl.load(starts + each, mask=each < num_seqs, other=2**30) <= token).to(tl.int32), 0) - 1
    start, end = tl.load(starts + request), tl.load(starts + request + 1)
    length = tl.load(lengths + request)
    if token >= end:
        return
    local = (token - start) // queries
    _, _, _, _, live = _seen(length, length - (end - start), local, split, queries, window, tile)
    if live == 1:
        return
    segment, dim = tl.arange(0, all_segments), tl.arange(0, size)
    line = (token.to(tl.int64) * heads + head) * segments + segment
    largest = tl.load(sums + line * 2, mask=segment < live, other=-float("inf"))
    total = tl.load(sums + line * 2 + 1, mask=segment < live, other=0.0)
    part = tl.load(partial + (line * size)[:, None] + dim[None, :], mask=(segment < live)[:, None], other=0.0)
    base = tl.max(largest, 0)
    share = tl.exp2(largest - tl.where(base > -float("inf"), base, 0.0))
    total = tl.sum(share * total, 0)
    acc = tl.sum(share[:, None] * part, 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + token.to(tl.int64) * out_stride + head * out_head_stride + dim, acc.to(out.dtype.element_ty))


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

    def scratch(self, tokens: int, heads: int, size: int, window: int) -> int:
        """Floats that a launch needs at most."""
        return tokens * heads * self.segments(window, False) * (size + 2)


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
    scratch: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
    one: bool | None = None,
) -> None:
    """Fill ``out`` with the attention of ``q`` over the keys of its request up to each query's own.

    Args:
        k: ``[blocks, block_size, kv_heads, size]``, as ``v``; rows of ``size`` lie together.
        lengths: keys of each request, those of its queries among them.
        starts: first token of each request, and behind the last.
        window: keys that a query sees at most; 0: all.
        scratch: at least :meth:`Form.scratch` of float32.
        scales: of ``k`` and ``v``, if they count.
        one: whether each request has one token; default: as many tokens as requests.
    """
    tokens, heads, size = q.shape
    num_seqs, kv_heads = len(lengths), k.shape[2]
    group = heads // kv_heads
    one = tokens == num_seqs if one is None else one
    segments = form.segments(window, one)
    blocks = num_seqs if one else tokens // (form.rows // group) + num_seqs
    lines = tokens * heads * segments
    partial, sums = scratch[: lines * size], scratch[lines * size : lines * (size + 2)]
    same = {
        "heads": heads,
        "group": group,
        "size": size,
        "window": window,
        "rows": form.rows,
        "tile": form.tile,
        "one": one,
        "all_seqs": max(16, triton.next_power_of_2(num_seqs)),  # few variants to compile
        "early": form.early,
        "launch_pdl": form.early,
    }
    _few_queries[(blocks, kv_heads, segments)](
        out,
        q,
        k,
        v,
        partial,
        sums,
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
        block_size=k.shape[1],
        scaled=scales is not None,
        num_warps=form.warps,
        num_stages=form.stages,
        **same,
    )
    if segments > 1:
        _add_parts[(tokens, heads)](
            out,
            partial,
            sums,
            lengths,
            starts,
            num_seqs,
            form.split,
            segments,
            out.stride(0),
            out.stride(1),
            all_segments=max(8, triton.next_power_of_2(segments)),
            **same,
        )
