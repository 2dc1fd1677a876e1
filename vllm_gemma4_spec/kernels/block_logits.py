"""Logits of chosen blocks of the vocabulary, in float32, without a copy of their rows; their choice, and the largest.

A block's largest rough score and its number are one int32, its key: the score's upper 16 bits, made to order as
integers do, above the number's complement. So keys are compared once, no two are equal, and of equal scores the first
block's is larger. :func:`block_maxima` makes them, each program of :func:`chosen_logits` finds its block among them,
and :func:`largest` looks at the logits. From Hopper on each starts while the kernel before it ends.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton

ROWS = 16  # token ids of one program, at most
COLUMNS = 256  # values of a row that a program reads at a time; twice as many where they fit


@triton.jit
def _early(early: tl.constexpr):  # type: ignore[no-untyped-def]
    if early:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _block_maxima(  # type: ignore[no-untyped-def]
    scores,  # [num_reqs, count * block]
    keys,  # [num_reqs, count] int32
    stride,
    count,
    block: tl.constexpr,
    each: tl.constexpr,  # blocks of one program
    early: tl.constexpr,
):
    """Grid ``(num_reqs, count / each)``."""
    request, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _early(early)
    number, within = part * each + tl.arange(0, each), tl.arange(0, block)
    is_block = number < count
    at = scores + request * stride + number[:, None] * block + within[None, :]
    score = tl.load(at, mask=is_block[:, None], other=0.0).to(tl.float32)
    bits = tl.max(score, axis=1).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    tl.store(keys + request * count + number, (ordered & -65536) | (count - 1 - number), mask=is_block)


@triton.jit
def _block_logits(  # type: ignore[no-untyped-def]
    hidden,  # [num_reqs, size] bfloat16
    weight,  # [vocab, size] bfloat16
    keys,  # [num_reqs, count] int32
    blocks,  # [num_reqs, candidates] int64
    logits,  # [num_reqs, candidates, block] float32
    count,
    all_count: tl.constexpr,  # as many or more, a power of two
    size: tl.constexpr,
    candidates: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    early: tl.constexpr,
):
    """Grid ``(num_reqs, candidates, block / rows)``."""
    request, candidate, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    _early(early)
    place = tl.arange(0, all_count)
    # -2**31 is below every block's key; its number is the last block's.
    key = tl.load(keys + request * count + place, mask=place < count, other=-2147483648)
    best = tl.max(key, axis=0)
    for _ in range(candidate):
        best = tl.max(tl.where(key < best, key, -2147483648), axis=0)
    number = (count - 1 - (best & 65535)).to(tl.int64)
    if part == 0:
        tl.store(blocks + request * candidates + candidate, number)
    within = part * rows + tl.arange(0, rows)
    token = number * block + within
    column = tl.arange(0, columns)
    # Each row loads its own copy from the L1: one for all would go through shared memory, a wait per step.
    mine = hidden + request * size + tl.zeros((rows, 1), tl.int32) + column[None, :]
    total = tl.zeros((rows, columns), tl.float32)
    for start in tl.static_range(0, size, columns):  # so that all loads may be under way at once
        w = tl.load(weight + token[:, None] * size + start + column[None, :]).to(tl.float32)
        total += w * tl.load(mine + start).to(tl.float32)
    tl.store(logits + (request * candidates + candidate) * block + within, tl.sum(total, axis=1))


@triton.jit
def _largest(  # type: ignore[no-untyped-def]
    logits,  # [num_reqs, count]
    blocks,  # [num_reqs, candidates] int64
    best,  # [num_reqs] float32
    token,  # [num_reqs] int64
    names,  # [vocab] int64: the token of each row, or None
    of_ranks,  # [num_reqs, ranks, 2] float32: both for this rank, zeros for the others; where there are several
    count,
    candidates,
    vocab,
    rank,
    ranks: tl.constexpr,
    block: tl.constexpr,
    all_count: tl.constexpr,
    early: tl.constexpr,
):
    """Grid ``(num_reqs,)``."""
    request = tl.program_id(0).to(tl.int64)
    _early(early)
    place = tl.arange(0, all_count)
    is_one = place < count
    logit = tl.load(logits + request * count + place, mask=is_one, other=-float("inf"))
    row = tl.load(blocks + request * candidates + place // block, mask=is_one, other=0) * block + place % block
    most = tl.max(logit, axis=0)
    # NaN is equal to none: then the last row, as what follows looks the token up.
    found = tl.minimum(tl.min(tl.where((logit == most) & is_one, row, vocab), axis=0), vocab - 1)
    if names is not None:
        found = tl.load(names + found)
    if ranks == 1:
        tl.store(best + request, most)
        tl.store(token + request, found)
    else:
        for r in tl.static_range(ranks):
            at = of_ranks + (request * ranks + r) * 2
            tl.store(at, tl.where(r == rank, most, 0.0))
            tl.store(at + 1, tl.where(r == rank, (found + rank * vocab).to(tl.float32), 0.0))


@triton.jit
def _largest_of_ranks(  # type: ignore[no-untyped-def]
    of_ranks,  # [num_reqs, ranks, 2] float32, of all ranks
    token,  # [num_reqs] int64
    vocab,  # of all ranks
    ranks: tl.constexpr,
    early: tl.constexpr,
):
    """Grid ``(num_reqs,)``."""
    request = tl.program_id(0).to(tl.int64)
    _early(early)
    at = of_ranks + request * ranks * 2
    most, found = tl.load(at), tl.load(at + 1)
    for r in tl.static_range(1, ranks):
        logit = tl.load(at + r * 2)
        found = tl.where(logit > most, tl.load(at + r * 2 + 1), found)
        most = tl.where(logit > most, logit, most)
    # A pass that warms up before a capture is given no sum, and must not look up what memory holds.
    found = tl.where(found >= 0.0, found, 0.0)  # of NaN, too
    tl.store(token + request, tl.minimum(found, vocab - 1.0).to(tl.int64))


@functools.cache
def _launched_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def suits(hidden: Tensor, block: int) -> bool:
    """Whether the kernels take rows of this width and dtype, of whose scores a key holds all, and such blocks."""
    return hidden.is_cuda and hidden.dtype == torch.bfloat16 and hidden.shape[-1] % COLUMNS == 0 and block % ROWS == 0


def block_maxima(scores: Tensor, block: int, each: int | None = None) -> Tensor:
    """``[num_reqs, count]`` int32: the key of each block of ``scores``, ``[num_reqs, count * block]``.

    Args:
        block: a power of two up to 2,048, of which there are at most 65,536.
        each: blocks of one program, a power of two; by default 2,048 scores.
    """
    each = each or 2048 // block
    num_reqs, count = len(scores), scores.shape[1] // block
    keys = torch.empty(num_reqs, count, dtype=torch.int32, device=scores.device)
    early = _launched_early(scores.device)
    _block_maxima[(num_reqs, triton.cdiv(count, each))](
        scores, keys, scores.stride(0), count, block, each, early=early, launch_pdl=early
    )
    return keys


def chosen_logits(hidden: Tensor, weight: Tensor, keys: Tensor, candidates: int, block: int) -> tuple[Tensor, Tensor]:
    """Logits of the blocks with the largest keys, ``[num_reqs, candidates * block]`` float32, and the blocks.

    The blocks, ``[num_reqs, candidates]`` int64, come largest first.

    Args:
        hidden: ``[num_reqs, size]``, contiguous; size a multiple of 256.
        weight: ``[vocab, size]``, contiguous.
        keys: of :func:`block_maxima`; as many as candidates or more.
        block: a multiple of 16.
    """
    (num_reqs, size), count = hidden.shape, keys.shape[1]
    # Of a wide weight small programs: their loads are all under way at once (H200, rows of 2,560: change 104).
    rows, warps = (4, 2) if size >= 2048 else (min(block, ROWS), 4)
    blocks = torch.empty(num_reqs, candidates, dtype=torch.int64, device=hidden.device)
    logits = torch.empty(num_reqs, candidates * block, dtype=torch.float32, device=hidden.device)
    early = _launched_early(hidden.device)
    _block_logits[(num_reqs, candidates, block // rows)](
        hidden,
        weight,
        keys,
        blocks,
        logits,
        count,
        triton.next_power_of_2(count),
        size,
        candidates,
        block,
        rows,
        COLUMNS * 2 if size % (COLUMNS * 2) == 0 else COLUMNS,
        early=early,
        launch_pdl=early,
        num_warps=warps,
    )
    return logits, blocks


def largest(
    logits: Tensor, blocks: Tensor, block: int, vocab: int, names: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The largest logit, ``[num_reqs]``, and its token, int64: the first in the vocabulary of equal ones.

    Args:
        logits, blocks: of :func:`chosen_logits`.
        vocab: rows of the weight; the token is one of them whatever the logits are.
        names: the token of each row, ``[vocab]`` int64; by default the row's number.
    """
    best = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    token = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _find(logits, blocks, best, token, names, token, block, vocab)
    return best, token


def largest_of_rank(logits: Tensor, blocks: Tensor, block: int, vocab: int, rank: int, ranks: int) -> Tensor:
    """``[num_reqs, ranks, 2]`` float32: the largest logit and its token in the place of this rank, zeros in others'.

    The sum over all ranks is what :func:`largest_of_ranks` takes.

    Args:
        logits, blocks, vocab: as in :func:`largest`, of this rank's part of the vocabulary.
        ranks: two or more, with parts of equal size, in order; ids are exact in float32.
    """
    found = torch.empty(len(logits), ranks, 2, dtype=torch.float32, device=logits.device)
    _find(logits, blocks, found, blocks, None, found, block, vocab, rank, ranks)
    return found


def _find(
    logits: Tensor,
    blocks: Tensor,
    best: Tensor,
    token: Tensor,
    names: Tensor | None,
    of_ranks: Tensor,
    block: int,
    vocab: int,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    num_reqs, count = logits.shape
    early = _launched_early(logits.device)
    _largest[(num_reqs,)](
        logits,
        blocks,
        best,
        token,
        names,
        of_ranks,
        count,
        blocks.shape[1],
        vocab,
        rank,
        ranks,
        block,
        triton.next_power_of_2(count),
        early=early,
        launch_pdl=early,
    )


def largest_of_ranks(found: Tensor, vocab: int) -> Tensor:
    """``[num_reqs]`` int64: the token of the rank with the largest logit, the first rank's of equal ones.

    Args:
        found: ``[num_reqs, ranks, 2]`` float32, the sum of all ranks' :func:`largest_of_rank`.
        vocab: tokens of all ranks; the result is one of them whatever ``found`` is.
    """
    num_reqs, ranks, _ = found.shape
    token = torch.empty(num_reqs, dtype=torch.int64, device=found.device)
    early = _launched_early(found.device)
    _largest_of_ranks[(num_reqs,)](found, token, vocab, ranks, early=early, launch_pdl=early)
    return token
