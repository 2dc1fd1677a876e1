"""Soft-capped logits in bfloat16 by one kernel, in place, with the roundings of PyTorch's three functions.

From 2^-10 on no bfloat16's tanh lies within 100 units in the last place of float32 of where bfloat16's rounding
changes, so any tanh that is right to a few units gives the same bits; a smaller value is its own tanh
(``tests/kernels/test_soft_cap.py``).
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.triton_utils import tl, triton

PART = 4096  # logits of one program


@triton.jit
def _soft_cap(  # type: ignore[no-untyped-def]
    logits,  # [num_rows, vocab] bfloat16
    stride,
    vocab,
    inverse,
    cap,
    part: tl.constexpr,
):
    """Grid ``(num_rows, num_parts)``."""
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * part + tl.arange(0, part)
    at = logits + row * stride + place
    value = tl.load(at, mask=place < vocab, other=0.0).to(tl.float32)
    value = (value * inverse).to(tl.bfloat16).to(tl.float32)
    # Of a small bfloat16 tanh rounds to itself; libdevice's, as Triton links it, makes a denormal number 0.
    small = tl.abs(value) < 0.0009765625
    value = tl.where(small, value, tl.extra.cuda.libdevice.tanh(value)).to(tl.bfloat16).to(tl.float32)
    tl.store(at, (value * cap).to(tl.bfloat16), mask=place < vocab)


def suits(logits: torch.Tensor) -> bool:
    """Whether the kernel takes such logits: rows of bfloat16 whose values lie together; rows may lie apart."""
    return logits.dim() == 2 and logits.stride(1) == 1 and logits.dtype == torch.bfloat16


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """``tanh(logits / cap) * cap``, written into ``logits``, ``[num_rows, vocab]``."""
    num_rows, vocab = logits.shape
    if num_rows:
        # PyTorch divides by a number by multiplying with its inverse, in float32.
        inverse = float(np.float32(1.0) / np.float32(cap))
        grid = num_rows, triton.cdiv(vocab, PART)
        _soft_cap[grid](logits, logits.stride(0), vocab, inverse, float(cap), part=PART)
    return logits
