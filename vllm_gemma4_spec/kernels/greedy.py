"""Greedy tokens of logits, and which drafts they accept: two kernels, without a copy of the logits.

A program finds the largest logit of a part of a row. Value and place are one int64, its key: the value's bits, made to
order as integers do, above the place's complement, so of equal logits the first is larger, and NaN is larger than all,
as ``torch.argmax`` has it. The second kernel takes the largest of a row's keys.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.triton_utils import tl, triton

PART = 4096  # logits of one program


@triton.jit
def _part_keys(  # type: ignore[no-untyped-def]
    logits,  # [num_rows, vocab] bfloat16, float16 or float32
    keys,  # [num_rows, num_parts] int64
    stride,
    vocab,
    part: tl.constexpr,
):
    """Grid ``(num_rows, num_parts)``."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = number * part + tl.arange(0, part)
    value = tl.load(logits + row * stride + place, mask=place < vocab, other=-float("inf")).to(tl.float32)
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 is as large as 0.0
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    # A place past the vocabulary must lose against -inf before it: its complement is 0, theirs is larger.
    rest = tl.where(place < vocab, 0x7FFFFFFF - place, 0)
    key = (ordered.to(tl.int64) << 32) | rest.to(tl.int64)
    tl.store(keys + row * tl.num_programs(1) + number, tl.max(key, axis=0))


@triton.jit
def _token(keys, row, count, all_parts: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tokens of rows, ``[n]`` int32."""
    part = tl.arange(0, all_parts)
    at = keys + row.to(tl.int64)[:, None] * count + part[None, :]
    key = tl.load(at, mask=(part < count)[None, :], other=-0x7FFFFFFFFFFFFFFF)
    return (0x7FFFFFFF - (tl.max(key, axis=1) & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _tokens(keys, out, count, all_parts: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid ``(num_rows,)``: ``out`` is ``[num_rows]`` int32."""
    row = tl.program_id(0) + tl.arange(0, 1)
    tl.store(out + row, _token(keys, row, count, all_parts))


@triton.jit(do_not_specialize=["longest"])
def _verdict(  # type: ignore[no-untyped-def]
    keys,  # [num_rows, count] int64
    out,  # [num_reqs, longest + 1] int32
    ends,  # [num_reqs] int32: cumulated numbers of drafts
    drafts,  # [num_drafts] int32
    draft_rows,  # [num_drafts]: the row that verifies each
    bonus_rows,  # [num_reqs]: the row after a request's last draft
    count,
    longest,
    all_parts: tl.constexpr,
    most: tl.constexpr,  # longest + 1 or more, a power of two, the same for all steps
):
    """Grid ``(num_reqs,)``."""
    request = tl.program_id(0)
    start = tl.load(ends + request - 1, mask=request > 0, other=0)
    number = tl.load(ends + request) - start
    at = tl.arange(0, most)
    bonus = tl.load(bonus_rows + request)
    row = tl.load(draft_rows + start + at, mask=at < number, other=0)
    token = _token(keys, tl.where(at < number, row, bonus), count, all_parts)
    draft = tl.load(drafts + start + at, mask=at < number, other=-1)
    differs = ((draft != token) & (at < number)).to(tl.int32)
    before = tl.cumsum(differs, axis=0) - differs
    kept = (at <= number) & (before == 0)
    tl.store(out + request * (longest + 1) + at, tl.where(kept, token, -1), mask=at <= longest)


def _keys(logits: torch.Tensor) -> tuple[torch.Tensor, int]:
    num_rows, vocab = logits.shape
    count = triton.cdiv(vocab, PART)
    keys = torch.empty(num_rows, count, dtype=torch.int64, device=logits.device)
    if num_rows:
        _part_keys[(num_rows, count)](logits, keys, logits.stride(0), vocab, part=PART)
    return keys, count


def suits(logits: torch.Tensor) -> bool:
    """Whether the kernels take such logits: rows of floats of at most 32 bits, next to each other."""
    return (
        logits.dim() == 2 and logits.stride(1) == 1 and logits.dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


def tokens(logits: torch.Tensor) -> torch.Tensor:
    """``logits.argmax(-1)`` as ``[num_rows]`` int32."""
    keys, count = _keys(logits)
    out = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    if len(logits):
        _tokens[(len(logits),)](keys, out, count, all_parts=triton.next_power_of_2(count))
    return out


def verdict(metadata: Any, logits: torch.Tensor, most_drafts: int) -> torch.Tensor:
    """What greedy rejection sampling keeps: ``[num_reqs, max_spec_len + 1]`` int32, -1 after a request's last token.

    Args:
        metadata: vLLM's ``SpecDecodeMetadata``.
        logits: ``[num_drafts + num_reqs, vocab]``.
        most_drafts: of any request of any step; a kernel is compiled for it.
    """
    keys, count = _keys(logits)
    num_reqs, longest = len(metadata.num_draft_tokens), metadata.max_spec_len
    out = torch.empty(num_reqs, longest + 1, dtype=torch.int32, device=logits.device)
    _verdict[(num_reqs,)](
        keys,
        out,
        metadata.cu_num_draft_tokens,
        metadata.draft_token_ids,
        metadata.target_logits_indices,
        metadata.bonus_logits_indices,
        count,
        longest,
        all_parts=triton.next_power_of_2(count),
        most=triton.next_power_of_2(max(most_drafts, longest) + 1),
    )
    return out
