"""The NVFP4 GEMMs of a decode step: the streaming kernel beside vLLM's Marlin, on the same weights.

    python benchmarks/target_gemm.py --model 31B --rows 1,4,8,16,32,64 --out target-gemm.json

Needs a Hopper card and vLLM 0.19.1. First it compares both with float64, and a row's bits alone with those among 64
rows; then it times each GEMM in a CUDA graph over enough layers that no weight is found in the L2.

With ``--rank 32`` the same of a low-rank branch: in the kernel (``inside``), and as two GEMMs and an addition behind it
(``beside``). ``scaled`` multiplies by ``pre_quant_scale`` first: inside the kernel up to 8 rows, before it above.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vllm_gemma4_spec.kernels import stream_gemm

# N x K of a layer; a full layer of 31B has other attention, of the same size to 6 %.
SHAPES = {
    "31B": {"qkv": (16384, 5376), "o": (5376, 8192), "gate_up": (43008, 5376), "down": (5376, 21504)},
    "E4B": {"qkv": (3072, 2560), "o": (2560, 2048), "gate_up": (20480, 2560), "down": (2560, 10240)},
    "26B-A4B": {"qkv": (8192, 2816), "o": (2816, 4096), "gate_up": (4224, 2816), "down": (2816, 2112)},
}
GLOBAL_SCALE = 0.01


def layer(n: int, k: int, device: str, rank: int = 0) -> Any:
    """Random weights as vLLM prepares them for Marlin."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_fp4_layer_for_marlin

    made = torch.nn.Module()
    made.output_size_per_partition, made.input_size_per_partition, made.params_dtype = n, k, torch.bfloat16
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    scale = (torch.rand(n, k // 16, device=device) * 400 + 0.1).to(torch.float8_e4m3fn)
    made.weight, made.weight_scale = (torch.nn.Parameter(t, requires_grad=False) for t in (codes, scale))
    made.weight_global_scale = torch.nn.Parameter(torch.tensor([GLOBAL_SCALE], device=device), requires_grad=False)
    before = SimpleNamespace(codes=codes.clone(), scale=scale.clone())
    prepare_fp4_layer_for_marlin(made)
    stream_gemm.reserve(n, k, torch.device(device, 0))
    made.pre = (torch.rand(k, device=device) + 0.5).bfloat16()
    if rank:
        made.a = (torch.randn(rank, k, device=device) * k**-0.5).bfloat16()
        made.b = (torch.randn(n, rank, device=device) * k**0.5).bfloat16()
        stream_gemm.reserve_branch(torch.device(device, 0))
    return made, before


def gemm(
    made: Any, x: torch.Tensor, streamed: int, pre_quant_scale: torch.Tensor | None = None, inside: bool = False
) -> torch.Tensor:
    """By the streaming kernel (``stream_gemm.ALL``) or by Marlin (0); ``inside``: with its branch."""
    weights = (made.weight, made.weight_scale, made.weight_global_scale, made.workspace)
    branch = (made.a, made.b) if inside else ()
    return stream_gemm.linear(x, pre_quant_scale, *weights, made.output_size_per_partition, streamed, *branch)


def beside(made: Any, x: torch.Tensor) -> torch.Tensor:
    """The branch as GEMMs of their own."""
    linear = torch.nn.functional.linear
    return gemm(made, x, stream_gemm.ALL) + linear(linear(x, made.a), made.b)


def check_branch(made: Any, main: torch.Tensor, x: torch.Tensor) -> dict[str, Any]:
    """``main``: what the rest of the layer should give for ``x``."""
    wanted = main + x.double() @ made.a.double().T @ made.b.double().T
    found = {
        what: ((y.double() - wanted).norm() / wanted.norm()).item()
        for what, y in (
            ("inside", gemm(made, x, stream_gemm.ALL, inside=True)),
            ("beside", beside(made, x)),
            ("left_out", main),
        )
    }
    whole = gemm(made, x[:64].contiguous(), stream_gemm.ALL, inside=True)
    rows = (1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 48, 49, 63)
    same = [r for r in rows if torch.equal(gemm(made, x[:r].contiguous(), stream_gemm.ALL, inside=True), whole[:r])]
    steady = all(torch.equal(gemm(made, x[:64].contiguous(), stream_gemm.ALL, inside=True), whole) for _ in range(20))
    return found | {"rows_with_the_bits_of_64": same, "all": len(same) == len(rows), "steady": steady}


def check(shapes: dict[str, tuple[int, int]], device: str, rank: int = 0) -> list[dict[str, Any]]:
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device=device)
    found = []
    for name, (n, k) in shapes.items():
        torch.manual_seed(n)
        made, before = layer(n, k, device, rank)
        nibbles = torch.stack([before.codes & 15, before.codes >> 4], -1).flatten(1).long()
        w = torch.cat([e2m1, -e2m1])[nibbles] * before.scale.double().repeat_interleave(16, 1) * GLOBAL_SCALE
        x = torch.randn(64, k, device=device).bfloat16()
        wanted = x.double() @ w.T
        ours, marlin = gemm(made, x, stream_gemm.ALL), gemm(made, x, 0)
        errors = [((y.double() - wanted).norm() / wanted.norm()).item() for y in (ours, marlin)]
        rows = (1, 2, 4, 5, 8, 9, 16, 17, 33, 63)
        same = {
            what: [r for r in rows if torch.equal(gemm(made, x[:r].contiguous(), most), whole[:r])]
            for what, most, whole in (("ours", stream_gemm.ALL, ours), ("marlin", 0, marlin))
        }
        pre = (torch.rand(k, device=device) + 0.5).bfloat16()
        scaled = [
            r
            for r in (*rows, 64)
            if torch.equal(
                gemm(made, x[:r].contiguous(), stream_gemm.ALL, pre), gemm(made, x[:r] * pre, stream_gemm.ALL)
            )
        ]
        found.append(
            {
                "gemm": name,
                "error": errors[0],
                "marlin_error": errors[1],
                "rows_with_the_bits_of_64": same,
                "rows_scaled_as_before": scaled,
            }
        )
        if rank:
            many = torch.randn(128, k, device=device).bfloat16()
            for count in (1, 64, 128):
                found[-1][f"branch of {count} rows"] = check_branch(made, many[:count].double() @ w.T, many[:count])
        print(json.dumps(found[-1]), flush=True)
        assert errors[0] <= errors[1] * 1.01, "less exact than Marlin"
        for of in (value for what, value in found[-1].items() if what.startswith("branch")):
            assert of["inside"] <= of["beside"] * 1.01, "less exact than the branch beside the kernel"
            assert of["all"], "a row of a layer with a branch depends on the rows beside it"
            assert of["steady"], "a layer with a branch gives something else each time"
        assert same["ours"] == list(rows), "a row depends on the rows beside it"
        assert scaled == [*rows, 64], "pre_quant_scale in the kernel is not x * pre_quant_scale before it"
    return found


FORMS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "stream": lambda made, x: gemm(made, x, stream_gemm.ALL),
    "marlin": lambda made, x: gemm(made, x, 0),
    "scaled": lambda made, x: gemm(made, x, stream_gemm.ALL, made.pre),
    "inside": lambda made, x: gemm(made, x, stream_gemm.ALL, inside=True),
    "beside": beside,
}


def graph_us(call: Any, repeat: int = 15) -> float:
    """Median microseconds of a replay of ``call`` as one CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="31B")
    parser.add_argument("--rows", default="1,4,8,16,32,64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=0, help="of a low-rank branch to measure, too")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    stream_gemm.compile_forms((False, 0), (True, 0), *([(False, asked.rank)] if asked.rank else []))
    device, shapes = "cuda", {n: s for n, s in SHAPES[asked.model].items() if not s[0] % 64 and not s[1] % 64}
    report: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "model": asked.model,
        "check": check(shapes, device, asked.rank),
    }
    made = [{name: layer(n, k, device, asked.rank)[0] for name, (n, k) in shapes.items()} for _ in range(asked.layers)]
    big = torch.empty(2**28, dtype=torch.float32, device=device)
    report["read_TB_s"] = round(2**30 / graph_us(lambda: torch.sum(big.view(1024, -1), 1)) / 1e6, 2)
    print(report["card"], report["read_TB_s"], "TB/s read")
    report["us"] = []
    for rows in map(int, asked.rows.split(",")):
        row: dict[str, Any] = {"rows": rows}
        inputs = {name: torch.randn(rows, k, device=device).bfloat16() for name, (_, k) in shapes.items()}
        for names in [*([name] for name in shapes), list(shapes)]:
            for what, run in FORMS.items() if asked.rank else list(FORMS.items())[:3]:

                def call(names: list[str] = names, run: Any = run, inputs: Any = inputs) -> None:
                    for layers in made:
                        for name in names:
                            run(layers[name], inputs[name])

                label = names[0] if len(names) == 1 else "layer"
                row.setdefault(label, {})[what] = round(graph_us(call) / len(made), 2)
        report["us"].append(row)
        print(json.dumps(row), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
