"""What a drafter's first pass with many requests is made of: few-row NVFP4 GEMMs, form by form.

    python benchmarks/first_pass.py --out first-pass.json

Needs a Hopper card and vLLM 0.19.1. E4B's six GEMMs: forms and launches of ``nvfp4_rows.cu``, the streaming kernel and
Marlin, weights from memory, in CUDA graphs; errors to float64. In a process of its own and bounded; what is ready is
written as it comes. Attention: ``attention_forms.py``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_gemma4_spec.kernels import chosen_rows, cuda, packing, small_batch_gemm, stream_gemm
from vllm_gemma4_spec.kernels.small_batch_gemm import Form

# N x K, and whether the kernel gives gelu(gate) * up.
DEVICE = "cuda"
GEMMS = {
    "gate": (256, 2560, False),
    "projection": (2560, 256, False),
    "o": (2560, 2048, False),
    "qkv": (3072, 2560, False),
    "down": (2560, 10240, False),
    "gate_up": (20480, 2560, True),
    "o full": (2560, 4096, False),
    "qkv full": (6144, 2560, False),
}
ROWS = (80, 20, 5, 16, 40, 64)
FORMS = {
    "1x1": Form(1),
    "1x2r": Form(1, 2, roll=True),
    "2x1": Form(2),
    "2x2": Form(2, 2),
    "3x1": Form(3),
    "3x2": Form(3, 2),
    "3x2r4": Form(3, 2, roll=True, fit=4),
    "4x2r3": Form(4, 2, roll=True, fit=3),
    "5x1": Form(5),
    "5x2r3": Form(5, 2, roll=True, fit=3),
}
MORE = {form for form, _ in small_batch_gemm.all_forms()}  # compiled for a start's choice


def graph_us(call: Callable[[], Any], calls: int, repeat: int = 5) -> float:
    """Median microseconds of one of ``calls`` calls that ``call`` makes, as a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeat + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return round(sorted(times[1:])[repeat // 2] / calls, 2)


@dataclass
class Weights:
    """A GEMM's weights several times over, so that none is found in the L2, in both orders."""

    n: int
    k: int
    gelu: bool

    def __post_init__(self) -> None:
        from target_gemm import GLOBAL_SCALE, layer

        torch.manual_seed(self.n + self.k)
        made, before = layer(self.n, self.k, "cuda")
        size = self.n * self.k * 9 // 16
        copies = max(4, min(16, 100_000_000 // size))
        parts = (made.weight.data, made.weight_scale.data, *packing.pack(before.codes, before.scale))
        self.copies = [[p.clone() for p in parts] for _ in range(copies)]
        self.workspace, self.marlin_global_scale = made.workspace, made.weight_global_scale
        self.layer = made
        self.global_scale = torch.tensor([GLOBAL_SCALE], device="cuda")
        e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device="cuda")
        nibbles = torch.stack([before.codes & 15, before.codes >> 4], -1).flatten(1).long()
        w = torch.cat([e2m1, -e2m1])[nibbles] * before.scale.double().repeat_interleave(16, 1) * GLOBAL_SCALE
        self.x = torch.randn(128, self.k, device="cuda").bfloat16() / 64
        self.wanted = self.x.double() @ w.T
        if self.gelu:
            gate, up = self.wanted.chunk(2, -1)
            self.wanted = torch.nn.functional.gelu(gate, approximate="tanh") * up

    def error(self, y: torch.Tensor) -> float:
        wanted = self.wanted[: len(y)]
        return float(((y.double() - wanted).norm() / wanted.norm()).item())

    def rows(self, of: list[torch.Tensor], x: torch.Tensor, form: Form) -> torch.Tensor:
        return small_batch_gemm.gemm(x, of[2], of[3], self.global_scale, self.gelu, None, form)

    def choose(self) -> tuple[str, float]:
        """What a start of the engine would choose, and how long it takes to find out."""
        made = self.layer
        made.rows_codes, made.rows_scales, made.rows_global_scale = *self.copies[0][2:], self.global_scale
        made.rows_scaled, made.streamed, made.stream_gelu = False, stream_gemm.faster(made), False
        torch.cuda.synchronize()
        begun = time.time()
        small_batch_gemm.choose(made, self.gelu)
        took = round(time.time() - begun, 3)
        said = chosen_rows.of_card(chosen_rows.card())
        return said[f"{self.n}x{self.k}, few rows" + ", gelu" * self.gelu], took

    def other(self, of: list[torch.Tensor], x: torch.Tensor, streamed: int) -> torch.Tensor:
        y = stream_gemm.linear(x, None, of[0], of[1], self.marlin_global_scale, self.workspace, self.n, streamed)
        if self.gelu:
            both, y = y, y.new_empty(len(y), self.n // 2)
            torch.ops._C.gelu_tanh_and_mul(y, both)
        return y


def gemm_part(seconds: float, out: Path) -> None:
    import vllm._custom_ops
    import vllm.model_executor.layers.quantization.utils.marlin_utils_fp4  # noqa: F401

    begun = time.time()
    wanted = [(form, gelu) for form in dict.fromkeys((*FORMS.values(), *MORE)) for gelu in (False, True)]
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda w: cuda.compiled(small_batch_gemm.source(*w, False), "sm_90"), wanted))
        streams = stream_gemm.WGMMA_FORMS.items()
        stream_codes = list(pool.map(lambda f: cuda.compiled(stream_gemm.source(f[0], False, f[1]), "sm_90a"), streams))
    report: dict[str, Any] = {"compile_s": round(time.time() - begun, 1), "us": {}, "error": {}, "wrong": []}
    gc.collect()
    gc.freeze()  # capturing a graph collects garbage, which takes longer than what is measured
    begun = time.time()

    def loaded(code: bytes, name: str) -> Any:
        kernel = cuda.Kernel.__new__(cuda.Kernel)
        kernel._load(code, name, overlaps=True)
        return kernel

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    kernels = {(*w, False): loaded(code, "nvfp4_rows") for w, code in zip(wanted, codes, strict=True)}
    small_batch_gemm._kernel = lambda *what: kernels[what]  # type: ignore[assignment]
    streaming = {}
    for (tiles, form), code in zip(streams, stream_codes, strict=True):
        streaming[tiles, False, form] = loaded(code, "nvfp4_stream")
        streaming[tiles, False, form].allow_shared(stream_gemm.shared_bytes(tiles, form))
    stream_gemm.kernel = lambda tiles, scaled, form, *_: streaming[tiles, scaled, form]  # type: ignore[assignment]
    device = torch.device("cuda", 0)
    small_batch_gemm.SCRATCH.reserve(device, 4 * 128 * 20480 * 4, 1280 * 16)
    report["card"] = torch.cuda.get_device_name()
    all_weights = {name: Weights(*shape) for name, shape in GEMMS.items()}
    report["start_s"] = round(time.time() - begun, 1)

    def attempt(what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            report["wrong"].append(f"{what}: {str(error).splitlines()[0]}")
            return None

    for name, w in all_weights.items():
        marlin = w.error(w.other(w.copies[0], w.x, 0))
        worst = 0.0
        for label, form in FORMS.items():
            for rows in sorted({1, 5, form.rows - 1, form.rows, 80, 128}):
                x = w.x[:rows].contiguous()
                y = attempt(f"{name} {label} {rows} rows", functools.partial(w.rows, w.copies[0], x, form))
                if y is None:
                    continue
                worst = max(worst, error := w.error(y))
                if error > 1.03 * w.error(w.other(w.copies[0], x, 0)):
                    report["wrong"].append(f"{name} {label} {rows} rows: error {error:.2e}")
        report["error"][name] = {"worst": round(worst, 6), "marlin": round(marlin, 6)}
    print("errors", report["error"], flush=True)
    report["check_s"] = round(time.time() - begun, 1)
    for rows, (name, w) in itertools.product(ROWS, all_weights.items()):
        x = w.x[:rows].contiguous()
        calls: dict[str, Callable[[Any], Any]] = {
            "marlin": functools.partial(w.other, x=x, streamed=0),
            "stream": functools.partial(w.other, x=x, streamed=stream_gemm.ALL),
        }
        for label, form in FORMS.items():
            if form.chunks(rows) <= (10 if form.pair == 2 else 5) and form.rows < rows + 16:
                calls[label] = functools.partial(w.rows, x=x, form=form)
        here: dict[str, float] = {}
        for label, call in calls.items():
            if time.time() > begun + seconds:
                report["wrong"].append(f"no time for {name} {rows} rows {label}")
                break
            each = functools.partial(lambda one, copies: [one(c) for c in copies], call, w.copies)
            us = attempt(f"{name} {label} {rows}", functools.partial(graph_us, each, len(w.copies)))
            if us is not None:
                here[label] = us
        report["us"].setdefault(rows, {})[name] = here
        fastest = " ".join(f"{k} {v}" for k, v in sorted(here.items(), key=lambda i: i[1]))
        print(f"{rows:>3} rows {name:<10}", fastest, flush=True)
        out.write_text(json.dumps(report))
        if rows == ROWS[1] and name == "gate":
            for other, of in all_weights.items():
                said = attempt(f"{other} choice", of.choose)
                report.setdefault("chosen", {})[other] = said
                print("chosen", other, said, flush=True)
    for line in report["wrong"][:20]:
        print("WRONG", line)
    print({key: report[key] for key in ("card", "compile_s", "start_s", "check_s")})
    out.write_text(json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=95)
    parser.add_argument("--out", type=Path, required=True)
    asked, start = parser.parse_args(), time.time()
    spawn, part = multiprocessing.get_context("spawn"), asked.out.with_suffix(".part")
    child = spawn.Process(target=gemm_part, args=(asked.seconds - 45, part))
    child.start()
    child.join(asked.seconds)
    said = "" if child.exitcode == 0 else f"ended with {child.exitcode}"
    if child.is_alive():
        said = "did not end in time"
        child.kill()
        child.join()
    results = {"gemm": json.loads(part.read_text()) if part.exists() else {}}
    part.unlink(missing_ok=True)
    print(f"until {time.time() - start:.0f} s {said}", flush=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
