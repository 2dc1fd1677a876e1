"""The small-batch NVFP4 kernel where a drafter's pass has it: in a chain of an E4B's layers, small kernels between.

    python benchmarks/rows_chain.py --out rows-chain.json

Needs a Hopper card. One CUDA graph holds layers with weights of their own (more than the L2 holds), each of them qkv,
norms of heads, a stand-in for attention, o, norms, gate_up with gelu * up, down, norms, gate and projection of the
per-layer input, norms. All are launched as torch.compile launches its own with ``triton.enable_pdl``. ``E4B, half`` has
the shapes of each of two tensor-parallel ranks, and a wait in place of the other rank's sums.
"""

from __future__ import annotations

import argparse
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from layer_chain import heads, norms
from target_gemm import graph_us
from torch import Tensor

from vllm_gemma4_spec.kernels import cuda, packing, small_batch_gemm
from vllm_gemma4_spec.kernels.packing import pack
from vllm_gemma4_spec.kernels.small_batch_gemm import Form, Launch, candidates

HIDDEN, WIDE, HEAD = 2560, 256, 256
SHAPES = {
    "E4B": {"qkv": (2048, HIDDEN), "o": (HIDDEN, 2048), "gate_up": (20480, HIDDEN), "down": (HIDDEN, 10240)},
    "E4B, half": {"qkv": (1024, HIDDEN), "o": (HIDDEN, 1024), "gate_up": (10240, HIDDEN), "down": (HIDDEN, 5120)},
}
ALWAYS = {"gate": (WIDE, HIDDEN), "projection": (HIDDEN, WIDE)}
LINGER = """
extern "C" __global__ void linger(unsigned* at, int ns) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    unsigned long long from, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(from));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - from < ns);
    if (threadIdx.x == 0) at[blockIdx.x] = (unsigned)now;
}
"""


class Chain:
    def __init__(self, model: str, layers: int) -> None:
        self.shapes, self.half = SHAPES[model] | ALWAYS, model != "E4B"
        packed = {}
        for name, (n, k) in self.shapes.items():
            codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
            scale = (torch.rand(n, k // 16, device="cuda") * 400 + 0.1).to(torch.float8_e4m3fn)
            packed[name] = pack(codes, scale)
        scale = torch.full((1,), 1e-4, device="cuda")  # each layer's its own, as it is read from memory, too
        self.made = [{n: (a.clone(), b.clone(), scale.clone()) for n, (a, b) in packed.items()} for _ in range(layers)]
        self.norms = torch.rand(layers, 3, 2, HIDDEN, device="cuda").bfloat16() + 0.5
        self.ahead = False  # weights of norms are loaded before the wait
        self.lingered = torch.zeros(64, dtype=torch.int32, device="cuda")
        self.linger = cuda.Kernel(LINGER, "linger")

    def make_room(self, rows: int, forms: dict[str, Form]) -> None:
        for name, (n, k) in self.shapes.items():
            small_batch_gemm._make_room(n, k, {rows: forms[name]}, name == "gate_up", torch.device("cuda", 0))

    def make_room_for(self, rows: int, name: str, form: Form, how: Launch) -> None:
        n, chunks = self.shapes[name][0], form.chunks(rows)
        floats = chunks * how.parts * n * form.rows
        small_batch_gemm.SCRATCH.reserve(torch.device("cuda", 0), floats, chunks * n // packing.ROWS)

    def wait(self, ns: int) -> None:
        self.linger(grid=(16, 1, 1), block=256, args=[self.lingered, ns])

    def __call__(self, start: Tensor, forms: dict[str, Form], how: dict[str, Launch]) -> Tensor:
        rows, hidden = len(start), start

        def product(layer: Any, name: str, x: Tensor, **rest: Any) -> Tensor:
            codes, scales, one = layer[name]
            return small_batch_gemm.gemm(x, codes, scales, one, form=forms[name], how=how.get(name), **rest)

        def normed(x: Tensor, weights: Tensor, summed: bool = True) -> Tensor:
            nonlocal hidden
            if self.half and summed:
                self.wait(1500)
            out, after = torch.empty_like(x), torch.empty_like(x)
            block = triton.next_power_of_2(HIDDEN)
            norms[(rows,)](
                x,
                hidden,
                *weights,
                out,
                after,
                HIDDEN,
                BLOCK=block,
                EARLY=True,
                AHEAD=self.ahead,
                num_warps=8,
                launch_pdl=True,
            )
            hidden = after
            return out

        x, by = start, torch.ones(rows, WIDE, device="cuda", dtype=torch.bfloat16)
        for layer, (first, second, third) in zip(self.made, self.norms, strict=True):
            x = product(layer, "qkv", x)
            queries = torch.empty_like(x)
            wide = x.shape[1]
            heads[(rows, wide // HEAD)](x, queries, wide, wide, HEAD=HEAD, EARLY=True, num_warps=2, launch_pdl=True)
            self.wait(3000)
            x = normed(product(layer, "o", queries), first)
            x = normed(product(layer, "down", product(layer, "gate_up", x, gelu=True)), second)
            x = normed(product(layer, "projection", product(layer, "gate", x, by=by)), third, summed=False)
        return x


def timed(chain: Chain, start: Tensor, forms: dict[str, Form], how: dict[str, Launch]) -> tuple[float, Tensor]:
    """Microseconds of a layer, and the chain's result."""
    ended: list[Tensor] = []
    us = graph_us(lambda: ended.append(chain(start, forms, how)), 25)
    return us / len(chain.made), ended[-1]


def compile_all(wanted: set[str]) -> None:
    """Side by side, as NVRTC takes a second for each."""
    architecture = cuda.this_card()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda text: cuda.compiled(text, architecture), wanted))


def forms_for(shapes: dict[str, tuple[int, int]], rows: int, variant: dict[str, Any]) -> dict[str, Form]:
    """Of each GEMM what the package takes where nothing was measured, but for what the variant says."""
    usual = {name: candidates(n, k, name == "gate_up", False, rows)[0] for name, (n, k) in shapes.items()}
    form, forms = variant.get("form", {}), variant.get("forms", {})
    return {name: replace(usual[name], **form | forms.get(name, {})) for name in shapes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16,20")
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    counts, usual = [int(r) for r in asked.rows.split(",")], small_batch_gemm.source
    variants = {name: VARIANTS[name] for name in asked.variants.split(",")}

    def text_of(variant: dict[str, Any], form: Form, gelu: int, scaled: bool = False) -> str:
        text = usual(form, gelu, scaled)
        for old, new in variant.get("text", ()):
            assert old in text, old
            text = text.replace(old, new)
        return text

    torch.manual_seed(0)
    chains = {model: Chain(model, asked.layers) for model in SHAPES}
    wanted = set()
    for v, rows, chain in itertools.product(variants.values(), counts, chains.values()):
        forms = forms_for(chain.shapes, rows, v)
        chain.make_room(rows, forms)
        wanted |= {text_of(v, form, gelu) for form in forms.values() for gelu in (0, 1, 2)}
    compile_all(wanted)
    found: dict[str, Any] = {"card": torch.cuda.get_device_name()}
    results: dict[Any, Tensor] = {}
    for turn in range(2):
        for name, variant in variants.items():
            small_batch_gemm.source = partial(text_of, variant)
            small_batch_gemm._kernel.cache_clear()
            how = {n: Launch(*v) for n, v in variant.get("launches", {}).items()}
            for model, chain in chains.items():
                chain.ahead = variant.get("ahead", False)
                for rows in counts:
                    torch.manual_seed(rows)
                    start = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
                    us, ended = timed(chain, start, forms_for(chain.shapes, rows, variant), how)
                    here = found.setdefault(f"{model}, {rows} rows", {})
                    here.setdefault(name, []).append(round(us, 2))
                    if not torch.equal(results.setdefault((model, rows), ended.clone()), ended):
                        here.setdefault("other bits than the first", []).append(name)
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"turn {turn} ended", flush=True)
    kinds = [what for what in found if what != "card"]
    print(f"us a layer: {'; '.join(kinds)}")
    for name in variants:
        print(f"{name:40s}", *(f"{min(found[what][name]):6.2f}" for what in kinds), flush=True)


# As the loads stood before: free to come behind griddepcontrol.wait, and they did.
_BEHIND = (
    ('asm volatile("ld.global.L1::no_allocate', 'asm("ld.global.nc.L1::no_allocate'),
    (' : "l"(at) : "memory");', ' : "l"(at));'),
)
# As the global scale was read before: when all sums are there.
_LAST = (("load_early(global_scale);", "0.0f;"), ("whole_scale * 256.0f", "*global_scale * 256.0f"))
_ONE_SUM = (("TWO_SUMS = MT * NT == 1", "TWO_SUMS = false"),)
VARIANTS: dict[str, dict[str, Any]] = {
    "behind the wait": {"text": _BEHIND + _ONE_SUM + _LAST, "form": {"registers": 0}},
    "one sum": {"text": _ONE_SUM + _LAST, "form": {"registers": 0}},
    "global scale last": {"text": _LAST},
    "now": {},
    "norm weights before the wait": {"ahead": True},
    "gate_up by two tiles": {"forms": {"gate_up": {"pair": 2, "roll": True, "whole": False, "registers": 0}}},
    **{f"{n} registers": {"form": {"registers": n}} for n in (128, 96, 88, 80, 72, 64)},
    **{
        f"{name} with {n} registers": {"forms": {name: {"registers": n}}}
        for name in ("qkv", "o", "gate_up", "down", "gate", "projection")
        for n in (80, 96)
    },
    "not whole": {"form": {"whole": False}},
    "gate_up by ten warps": {"launches": {"gate_up": (10, 5, 1)}},
}


if __name__ == "__main__":
    main()
