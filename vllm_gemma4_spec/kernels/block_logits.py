"""Logits of chosen blocks of the vocabulary, in float32, without a copy of their rows."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton

ROWS = 16  # token ids of one program
COLUMNS = 256  # values of a row that a program reads at a time


@triton.jit
def _block_logits_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [num_reqs, size] bfloat16
    weight,  # [vocab, size] bfloat16
    blocks,  # [num_reqs, candidates] int64
    logits,  # [num_reqs, candidates, block] float32
    size,
    candidates: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Grid ``(num_reqs, candidates, block / rows)``."""
    request, candidate, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    within = part * rows + tl.arange(0, rows)
    token = tl.load(blocks + request * candidates + candidate) * block + within
    column = tl.arange(0, columns)
    total = tl.zeros((rows, columns), tl.float32)
    for start in range(0, size, columns):
        w = tl.load(weight + token[:, None] * size + start + column[None, :]).to(tl.float32)
        h = tl.load(hidden + request.to(tl.int64) * size + start + column).to(tl.float32)
        total += w * h[None, :]
    tl.store(logits + (request * candidates + candidate) * block + within, tl.sum(total, axis=1))


def suits(hidden: Tensor, block: int) -> bool:
    """Whether the kernel takes rows of this width and blocks of this size."""
    return hidden.is_cuda and hidden.shape[-1] % COLUMNS == 0 and block % ROWS == 0


def block_logits(hidden: Tensor, weight: Tensor, blocks: Tensor, block: int) -> Tensor:
    """``[num_reqs, candidates * block]`` float32.

    Args:
        hidden: ``[num_reqs, size]``, contiguous; size a multiple of 256.
        weight: ``[vocab, size]``, contiguous.
        blocks: ``[num_reqs, candidates]`` int64, numbers of blocks of ``block`` rows of ``weight``.
        block: a multiple of 16.
    """
    num_reqs, candidates = blocks.shape
    logits = torch.empty(num_reqs, candidates * block, dtype=torch.float32, device=hidden.device)
    _block_logits_kernel[(num_reqs, candidates, block // ROWS)](
        hidden, weight, blocks, logits, hidden.shape[1], candidates, block, ROWS, COLUMNS
    )
    return logits
