"""The MLP of a layer whose streaming GEMM gives gelu(gate) * up, beside that GEMM with a kernel for it behind.

    python benchmarks/gated_stream.py --out gated-stream.json

Needs a Hopper card. One CUDA graph holds layers with weights of their own (more than the L2 holds), each of them
gate_up, the activation (``apart``: a kernel of its own, launched early as torch.compile launches its own) and down,
then the norms that stand before the next one. ``half`` has the shapes of each of two tensor-parallel ranks, without
their sums. Graphs of both are replayed in turn. First it compares both with float64, and rows alone with the same rows
among 64.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from layer_chain import activation, norms
from target_gemm import GLOBAL_SCALE, layer
from torch import Tensor

from vllm_gemma4_spec.kernels import stream_gemm

HIDDEN = 5376
WIDE = {"31B": 21504, "31B, half": 10752}
SMALL = 0.004  # inputs times this: gates of some units, as a model has, where gelu is neither the identity nor zero


def product(made: Any, x: Tensor, gelu: bool = False) -> Tensor:
    weights = (made.weight, made.weight_scale, made.weight_global_scale)
    return stream_gemm.stream_gemm(x, None, *weights, made.output_size_per_partition, None, gelu)


def gated(made: Any, x: Tensor, fused: bool) -> Tensor:
    """gelu(gate) * up."""
    if fused:
        return product(made, x, gelu=True)
    both = product(made, x)
    wide = both.shape[1] // 2
    y = torch.empty(len(x), wide, dtype=x.dtype, device=x.device)
    activation[(triton.cdiv(y.numel(), 1024),)](both, y, y.numel(), wide, BLOCK=1024, EARLY=True, launch_pdl=True)
    return y


class Chain:
    def __init__(self, wide: int, layers: int) -> None:
        self.made = [
            (layer(2 * wide, HIDDEN, "cuda")[0], layer(HIDDEN, wide, "cuda")[0], torch.rand(2, HIDDEN, device="cuda"))
            for _ in range(layers)
        ]
        for gate_up, _, weights in self.made:
            stream_gemm.reserve(gate_up.output_size_per_partition, HIDDEN, torch.device("cuda", 0), gelu=True)
            weights[1] *= SMALL
        self.made = [(gate_up, down, weights.bfloat16()) for gate_up, down, weights in self.made]

    def __call__(self, start: Tensor, fused: bool) -> Tensor:
        x, hidden = start * SMALL, start
        for gate_up, down, weights in self.made:
            y = product(down, gated(gate_up, x, fused))
            x, after = torch.empty_like(y), torch.empty_like(y)
            norms[(len(y),)](
                y,
                hidden,
                *weights,
                x,
                after,
                HIDDEN,
                BLOCK=triton.next_power_of_2(HIDDEN),
                EARLY=True,
                AHEAD=False,
                num_warps=8,
                launch_pdl=True,
            )
            hidden = after
        return hidden


def check(wide: int) -> dict[str, Any]:
    """Of one layer: both ways' errors by rows, whether rows up to 64 have the bits that they have among 64, and whether
    the same bits come again and again."""
    made, before = layer(2 * wide, HIDDEN, "cuda")
    stream_gemm.reserve(2 * wide, HIDDEN, torch.device("cuda", 0), gelu=True)
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device="cuda")
    nibbles = torch.stack([before.codes & 15, before.codes >> 4], -1).flatten(1).long()
    w = torch.cat([e2m1, -e2m1])[nibbles] * before.scale.double().repeat_interleave(16, 1) * GLOBAL_SCALE
    del nibbles
    x = torch.randn(128, HIDDEN, device="cuda").bfloat16() * SMALL
    gate, up = (x.double() @ w.T).chunk(2, 1)
    wanted = torch.nn.functional.gelu(gate, approximate="tanh") * up
    found: dict[str, Any] = {"error": {}}
    for rows in (1, 5, 8, 16, 33, 64, 80, 128):
        few = x[:rows].contiguous()
        found["error"][rows] = {
            what: float((gated(made, few, fused).double() - wanted[:rows]).norm() / wanted[:rows].norm())
            for what, fused in (("apart", False), ("fused", True))
        }
    whole = gated(made, x[:64].contiguous(), True)
    counts = (1, 2, 5, 8, 9, 16, 17, 32, 33, 48, 49, 63)
    found["rows_with_the_bits_of_64"] = [
        r for r in counts if torch.equal(gated(made, x[:r].contiguous(), True), whole[:r])
    ]
    found["same_bits"] = len(found["rows_with_the_bits_of_64"]) == len(counts)
    found["unsteady"] = []
    for rows in (8, 16, 32, 48, 64, 80, 128):
        few = x[:rows].contiguous()
        first = gated(made, few, True)
        if not all(torch.equal(gated(made, few, True), first) for _ in range(20)):
            found["unsteady"].append(rows)
    counters = stream_gemm.SCRATCH.on(x.device)[1]
    found["counters_are_zero"] = not bool(counters.any())
    return found


def replays(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of it, and what it gives."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end) * 1000)


def compare(chain: Chain, rows: int, repeats: int) -> dict[str, float]:
    """Median microseconds of a layer each way, and how far their results are apart."""
    start = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
    ways = {"apart": replays(lambda: chain(start, False)), "fused": replays(lambda: chain(start, True))}
    times: dict[str, list[float]] = {what: [] for what in ways}
    for turn in range(repeats + 3):
        for what in list(ways)[:: 1 if turn % 2 else -1]:
            took = us(ways[what][0]) / len(chain.made)
            if turn >= 3:
                times[what].append(took)
    apart, fused = (ways[what][1].double() for what in ("apart", "fused"))
    medians = {what: round(statistics.median(of), 2) for what, of in times.items()}
    return {**medians, "results_apart": float((apart - fused).norm() / apart.norm())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,5,8,16,33,64,80")
    parser.add_argument("--layers", type=int, default=4, help="of 31B; twice as many halves")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)
    for gelu in (False, True):
        stream_gemm.compile_forms((False, 0), gelu=gelu)
    report: dict[str, Any] = {"card": torch.cuda.get_device_name(), "check": {}, "us": {}}
    print(report["card"])
    for name, wide in WIDE.items():
        found = report["check"][name] = check(wide)
        errors = "; ".join(f"{r}: {e['apart']:.2e} {e['fused']:.2e}" for r, e in found["error"].items())
        print(f"{name}: errors by rows, apart and fused: {errors}")
        print(f"  bits of rows alone are those among 64: {found['same_bits']}, {found['rows_with_the_bits_of_64']}")
        print(
            f"  rows whose bits change: {found['unsteady']}; counters are zero: {found['counters_are_zero']}",
            flush=True,
        )
        torch.cuda.empty_cache()
    print(f"{'us a layer (gate_up, activation, down, norms)':46s} {'apart':>8s} {'fused':>8s} {'saved':>7s}")
    for name, wide in WIDE.items():
        chain = Chain(wide, asked.layers * (max(WIDE.values()) // wide))
        for rows in map(int, asked.rows.split(",")):
            here = report["us"][f"{name}, {rows} rows"] = compare(chain, rows, asked.repeats)
            apart, fused = here["apart"], here["fused"]
            print(f"{name + f', {rows} rows':46s} {apart:8.2f} {fused:8.2f} {apart - fused:7.2f}", flush=True)
            if asked.out:
                asked.out.write_text(json.dumps(report, indent=1) + "\n")
        del chain
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
