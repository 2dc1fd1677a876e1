"""Gemma 4's choice of experts as one Triton kernel: the largest logits, softmax over them, times the experts' scales.

vLLM's own is ``routing_function`` in ``Gemma4MoE.__init__``: softmax over all experts, of which the chosen ones
are divided by their sum; the sum over all cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton


@triton.jit
def _route(  # type: ignore[no-untyped-def]
    logits,  # [tokens, experts]
    scales,  # [experts]
    weights,  # [tokens, top] float32
    ids,  # [tokens, top] int32
    experts: tl.constexpr,
    top: tl.constexpr,
    all_experts: tl.constexpr,  # both rounded up to powers of two
    all_top: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert, slot = tl.arange(0, all_experts), tl.arange(0, all_top)
    left = tl.load(logits + token * experts + expert, mask=expert < experts, other=-float("inf")).to(tl.float32)
    value = tl.full((all_top,), -float("inf"), tl.float32)
    chosen = tl.zeros((all_top,), tl.int32)
    for i in tl.static_range(top):
        best = tl.max(left, 0)
        # The first of equal ones; NaN is equal to none, and any expert does.
        at = tl.minimum(tl.min(tl.where(left == best, expert, all_experts), 0), experts - 1)
        value, chosen = tl.where(slot == i, best, value), tl.where(slot == i, at, chosen)
        left = tl.where(expert == at, -float("inf"), left)
    share = tl.exp(value - tl.max(value, 0))
    scale = tl.load(scales + chosen, mask=slot < top, other=0.0).to(tl.float32)
    tl.store(weights + token * top + slot, share / tl.sum(share, 0) * scale, mask=slot < top)
    tl.store(ids + token * top + slot, chosen, mask=slot < top)


def route(logits: Tensor, scales: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Weights and ids, ``[tokens, top]`` each, of the experts with the largest ``logits``; they come largest first."""
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, top, dtype=torch.int32, device=logits.device)
    if tokens:
        sizes = (experts, top, triton.next_power_of_2(experts), triton.next_power_of_2(top))
        _route[(tokens,)](logits.contiguous(), scales, weights, ids, *sizes, num_warps=1)
    return weights, ids
