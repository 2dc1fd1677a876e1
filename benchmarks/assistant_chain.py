"""A pass of an assistant's bfloat16 GEMMs by cuBLAS and by ``bf16_rows.cu``, in a chain of small kernels.

    python benchmarks/assistant_chain.py --out assistant-chain.json

Needs a Hopper card. One CUDA graph holds four passes of 31B's assistant (``31B, half``: of each of two tensor-parallel
ranks), each of them pre_projection, four layers (q, norms of heads, a stand-in for attention, o, norms, gate_up,
gelu * up, down, norms) and post_projection; halves wait 1.5 us behind o and down, in place of an all-reduce. Triton's
kernels are launched as torch.compile launches its own with ``triton.enable_pdl``. First each GEMM alone, against
float64; cuBLAS's time there is without an activation.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from layer_chain import activation, heads, norms
from rows_chain import LINGER
from target_gemm import graph_us
from torch import Tensor

from vllm_gemma4_spec.kernels import bf16_gemm, cuda
from vllm_gemma4_spec.kernels.bf16_gemm import Form, form_for

WIDE, BACKBONE, HEAD = 1024, 5376, 256


def shapes(ranks: int) -> list[dict[str, tuple[int, int]]]:
    """Of each layer; the full one last."""
    rows = []
    for head in (256, 256, 256, 512):
        q, wide = 32 * head // ranks, 8192 // ranks
        rows.append({"q": (q, WIDE), "o": (WIDE, q), "gate_up": (2 * wide, WIDE), "down": (WIDE, wide)})
    return rows


class Chain:
    def __init__(self, ranks: int) -> None:
        def made(n: int, k: int) -> Tensor:
            return torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5

        self.layers = [{name: made(*shape) for name, shape in layer.items()} for layer in shapes(ranks)]
        self.pre, self.post = made(WIDE, 2 * BACKBONE), made(BACKBONE, WIDE)
        self.norms = torch.rand(4, 2, 2, WIDE, device="cuda").bfloat16() + 0.5
        self.lingered = torch.zeros(64, dtype=torch.int32, device="cuda")
        self.linger, self.ranks = cuda.Kernel(LINGER, "linger"), ranks

    def __call__(self, start: Tensor, embedded: Tensor, ours: bool, variant: dict[str, Any]) -> Tensor:
        rows = len(start)

        def product(name: str, weight: Tensor, x: Tensor) -> Tensor:
            gelu = name == "gate_up"
            if ours:
                return bf16_gemm.gemm(x, weight, gelu, form_of(variant, rows, weight, gelu))
            y = F.linear(x, weight)
            if gelu:
                y, both = y.new_empty(rows, y.shape[1] // 2), y
                grid = (triton.cdiv(y.numel(), 1024),)
                activation[grid](both, y, y.numel(), y.shape[1], BLOCK=1024, EARLY=True, launch_pdl=True)
            return y

        hidden = start
        for _ in range(4):
            x = product("pre", self.pre, torch.cat([embedded, hidden], -1))
            residual = x
            for layer, weights in zip(self.layers, self.norms, strict=True):

                def normed(x: Tensor, weights: Tensor) -> Tensor:
                    nonlocal residual
                    if self.ranks > 1:
                        self.linger(grid=(16, 1, 1), block=256, args=[self.lingered, 1500])
                    out, after = torch.empty_like(x), torch.empty_like(x)
                    norms[(rows,)](
                        x,
                        residual,
                        *weights,
                        out,
                        after,
                        WIDE,
                        BLOCK=WIDE,
                        EARLY=True,
                        AHEAD=False,
                        num_warps=8,
                        launch_pdl=True,
                    )
                    residual = after
                    return out

                q = product("q", layer["q"], x)
                queries, wide = torch.empty_like(q), q.shape[1]
                heads[(rows, wide // HEAD)](q, queries, wide, wide, HEAD=HEAD, EARLY=True, num_warps=2, launch_pdl=True)
                self.linger(grid=(16, 1, 1), block=256, args=[self.lingered, 3000])
                x = normed(product("o", layer["o"], queries), weights[0])
                x = normed(product("down", layer["down"], product("gate_up", layer["gate_up"], x)), weights[1])
            hidden = product("post", self.post, x)
        return hidden


def alone(shape: tuple[int, int], gelu: bool, rows: int) -> tuple[float, float, float, float]:
    """us by cuBLAS and ours in a graph over weights that are not in the L2, and both errors to float64."""
    n, k = shape
    count = max(2, 2**28 // (n * k * 2))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5 for _ in range(count)]
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)

    def theirs(weight: Tensor) -> Tensor:
        y = F.linear(x, weight)
        if gelu:
            return F.gelu(y[:, : n // 2].float(), approximate="tanh").mul(y[:, n // 2 :].float()).bfloat16()
        return y

    exact = x.double() @ weights[0].double().T
    if gelu:
        exact = F.gelu(exact[:, : n // 2], approximate="tanh") * exact[:, n // 2 :]
    results = theirs(weights[0]), bf16_gemm.gemm(x, weights[0], gelu)
    errors = [float((found.double() - exact).norm() / exact.norm()) for found in results]
    calls = [partial(F.linear, x), partial(bf16_gemm.gemm, x, gelu=gelu)]
    us = [graph_us(partial(lambda call: [call(w) for w in weights], call), 15) / count for call in calls]
    return us[0], us[1], errors[0], errors[1]


def form_of(variant: dict[str, Any], rows: int, weight: Tensor, gelu: bool) -> Form:
    wide = variant.get("wide", bf16_gemm.WIDE)
    form = form_for(bf16_gemm.WIDE if len(weight) >= wide else 0, rows, gelu)
    return replace(form, **variant.get("form", {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    counts = [int(r) for r in asked.rows.split(",")]
    torch.manual_seed(0)
    assert bf16_gemm.available()
    found: dict[str, Any] = {"card": torch.cuda.get_device_name()}
    for ranks, kind in ((1, "31B"), (2, "31B, half")):
        layers = shapes(ranks)
        gemms = {**layers[0], "q, full": layers[3]["q"], "o, full": layers[3]["o"]}
        gemms |= {"pre": (WIDE, 2 * BACKBONE), "post": (BACKBONE, WIDE)}
        for name, shape in gemms.items():
            for rows in counts:
                us = alone(shape, name == "gate_up", rows)
                found[f"{kind}, {name}, {rows} rows"] = us
                times = f"{us[0]:6.2f} {us[1]:6.2f} us, errors {us[2]:.1e} {us[3]:.1e}"
                print(f"{kind:10s} {name:8s} {rows:3d} rows: {times}", flush=True)
        chain = Chain(ranks)
        for rows in counts:
            start, embedded = (torch.randn(rows, BACKBONE, device="cuda").bfloat16() for _ in range(2))
            here: dict[str, list[float]] = {}
            for _ in range(2):
                for name, variant in VARIANTS.items():
                    call = partial(chain, start, embedded, name != "cuBLAS", variant)
                    us = graph_us(call, 15) / 4
                    here.setdefault(name, []).append(round(us, 2))
            found[f"{kind}, pass, {rows} rows"] = here
            print(f"{kind}, a pass of {rows} rows, us:", {n: min(v) for n, v in here.items()}, flush=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


# `wide`: outputs from which a warp takes two tiles; `form`: other fields of all forms.
VARIANTS: dict[str, dict[str, Any]] = {
    "cuBLAS": {},
    "bf16_rows": {},
    "two tiles nowhere": {"wide": 10**9},
    "two tiles everywhere": {"wide": 0},
    "eight warps": {"form": {"warps": 8}},
}


if __name__ == "__main__":
    main()
