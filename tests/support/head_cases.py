"""Heads of Gemma 4's layers beside what float64 makes of them, and beside vLLM's own functions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Query heads, key heads, size; 0 key heads: a layer that shares another one's.
LAYERS = {
    "31B sliding": (32, 16, 256),
    "31B full": (32, 4, 512),
    "E4B sliding": (8, 2, 256),
    "E4B shares": (8, 0, 512),
    "31B's assistant, sliding": (32, 0, 256),
    "31B's assistant, full": (32, 0, 512),
    "odd": (5, 1, 64),
}


def layer(q_heads: int, kv_heads: int, size: int, tokens: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``norm_heads``; rows of qkv lie apart, as where its last heads are another layer's."""
    torch.manual_seed(size + tokens)
    some: dict[str, Any] = {"dtype": dtype, "device": device}
    wide = (q_heads + 2 * kv_heads) * size
    angle = torch.arange(512)[:, None] * 10_000.0 ** (-torch.arange(size // 2) / (size // 2))
    return {
        "qkv": (torch.randn(tokens, wide + 2 * size) * 3).to(**some)[:, :wide],
        "positions": torch.randint(0, 512, (tokens,), device=device),
        "cos_sin": torch.cat([angle.cos(), angle.sin()], 1).to(**some),
        "q_weight": torch.randn(size).to(**some),
        "k_weight": torch.randn(size).to(**some),
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "eps": 1e-6,
    }


def exactly(of: dict[str, Any]) -> Tensor:
    """What ``norm_heads`` should give, in float64."""
    q_heads, kv_heads, size = of["q_heads"], of["kv_heads"], len(of["q_weight"])
    x = of["qkv"].double().unflatten(1, (-1, size))
    x = x * (x.square().mean(-1, keepdim=True) + of["eps"]).rsqrt()
    q, k, v = x.split([q_heads, kv_heads, kv_heads], 1)
    cos, sin = of["cos_sin"].double()[of["positions"]][:, None].chunk(2, -1)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    q, k = turned(q * of["q_weight"].double()), turned(k * of["k_weight"].double())
    return torch.cat([part.flatten() for part in (q, k, v)])


def stock(of: dict[str, Any]) -> Tensor:
    """What vLLM's functions give, rounded to the input's dtype by each."""
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    q_heads, kv_heads, size = of["q_heads"], of["kv_heads"], len(of["q_weight"])
    q, k, v = of["qkv"].unflatten(1, (-1, size)).split([q_heads, kv_heads, kv_heads], 1)
    norm = RMSNorm.forward_static
    q = norm(q, of["eps"], size, q.dtype, of["q_weight"]).flatten(1)
    k = norm(k, of["eps"], size, k.dtype, of["k_weight"]).flatten(1)
    v = norm(v, of["eps"], size, v.dtype)
    q, k = RotaryEmbedding.forward_static(of["positions"], q, k, size, size, of["cos_sin"], True)
    return torch.cat([part.flatten() for part in (q, k, v)])


def wrong_heads(device: str, dtype: torch.dtype, tokens: tuple[int, ...]) -> list[str]:
    """What the kernel gives that is further from float64 than one rounding and float32's own errors, or, in bfloat16,
    than what vLLM gives; and rows whose bits depend on other tokens."""
    from vllm_gemma4_spec.kernels.head_norms import norm_heads

    said = []
    for name, shape in LAYERS.items():
        for count in tokens:
            of = layer(*shape, count, device, dtype)
            found, wanted = norm_heads(**of), exactly(of)
            parts = [count * heads * shape[2] for heads in (shape[0], shape[1], shape[1])]
            if not torch.allclose(found.double(), wanted, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-5):
                said.append(f"{name}, {count} tokens: {(found.double() - wanted).abs().max():.1e}")
            if dtype == torch.bfloat16 and (found.double() - wanted).norm() > (stock(of).double() - wanted).norm():
                said.append(f"{name}, {count} tokens: vLLM is nearer")
            last = {**of, "qkv": of["qkv"][-1:], "positions": of["positions"][-1:]}
            mine = [part[-part.numel() // count :] for part in found.split(parts) if part.numel()]
            if not torch.equal(torch.cat(mine), norm_heads(**last)):
                said.append(f"{name}, {count} tokens: other bits than alone")
    return said


def wrong_caches(device: str, dtype: torch.dtype, tokens: tuple[int, ...], layers: Sequence[str] = ()) -> list[str]:
    """Caches that do not hold, to the bit, the keys and values that the kernel gives where it also writes them."""
    from vllm_gemma4_spec.kernels.head_norms import Into, norm_heads

    said = []
    for name, count in itertools.product(layers or [n for n, (_, kv_heads, _) in LAYERS.items() if kv_heads], tokens):
        q_heads, kv_heads, size = LAYERS[name]
        of = layer(q_heads, kv_heads, size, count, device, dtype)
        alone = norm_heads(**of)
        _, keys, values = alone.split([count * heads * size for heads in (q_heads, kv_heads, kv_heads)])
        for slotted, left_out in ((count, 0), (count, count // 2), (count - 1, 0)):
            slots = (
                torch.randperm(7 * 16, device=device)[:slotted]
                if slotted < 7 * 16
                else torch.arange(slotted).to(device)
            )
            slots[:left_out] = -1
            blocks = -(-max(7 * 16, slotted) // 16)
            # Keys and values of a block lie beside other layers' in vLLM's memory.
            before = torch.randn(blocks, 3, 16, kv_heads, size, device=device).to(dtype)
            cache, wanted, told = before.clone(), before.clone(), []
            found = norm_heads(**of, into=Into(cache[:, 1:], slots, told.append))
            there = slots[left_out:]
            for part, rows in ((1, keys), (2, values)):
                wanted[there // 16, part, there % 16] = rows.view(count, kv_heads, size)[left_out:slotted]
            if not torch.equal(found, alone) or not torch.equal(cache, wanted):
                said.append(f"{name}, {count} tokens, {slotted} slots, {left_out} of them none: another cache")
            if told != [found[count * q_heads * size :].data_ptr()]:
                said.append(f"{name}, {count} tokens: other keys than it says")
    return said
