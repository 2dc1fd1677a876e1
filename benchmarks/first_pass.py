"""What a drafter's first pass with many requests is made of: few-row NVFP4 GEMMs and attention, form by form.

    python benchmarks/first_pass.py --out first-pass.json

Needs a Hopper card and vLLM 0.19.1. Two parts, each in a process of its own and bounded; what is ready is written as it
comes.

  gemm       E4B's six GEMMs: forms and launches of ``nvfp4_rows.cu``, the streaming kernel and Marlin, weights from
             memory, in CUDA graphs; errors to float64
  attention  vLLM's two attention kernels with other tiles, warps, stages, segments and rows of a query block, for E4B's
             and 31B's layers
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
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
MORE = {form for forms in small_batch_gemm.CANDIDATES.values() for form in forms}  # compiled for a start's choice


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
        made.rows_scaled, made.streamed = False, stream_gemm.faster(made)
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


def gemm_part(seconds: float, out: Path, ready: Any, go: Any) -> None:
    import vllm._custom_ops
    import vllm.model_executor.layers.quantization.utils.marlin_utils_fp4  # noqa: F401

    begun = time.time()
    wanted = [(form, gelu) for form in dict.fromkeys((*FORMS.values(), *MORE)) for gelu in (False, True)]
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda w: cuda.compiled(small_batch_gemm.source(*w, False), "sm_90"), wanted))
        streams = stream_gemm.WGMMA_FORMS.items()
        stream_codes = list(pool.map(lambda f: cuda.compiled(stream_gemm.source(f[0], False, f[1]), "sm_90a"), streams))
    report: dict[str, Any] = {"compile_s": round(time.time() - begun, 1), "us": {}, "error": {}, "wrong": []}
    ready.set()
    go.wait()
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
    stream_gemm.kernel = lambda tiles, scaled, form, rank: streaming[tiles, scaled, form]  # type: ignore[assignment]
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


# Attention: query heads, KV heads, head size, window (0: none), tokens of a cache block.
LAYERS = {
    "E4B sliding": (8, 2, 256, 512, 16),
    "E4B full": (8, 2, 512, 0, 16),
    "31B sliding": (32, 16, 256, 1024, 16),
    "31B full": (32, 4, 512, 0, 32),
}
QUERIES = {"E4B": (5, 1), "31B": (4, 1)}
CONTEXTS = (256, 2048, 30000)


@dataclass(frozen=True)
class How:
    """One of vLLM's kernels with other numbers; None: its own."""

    segments: int = 0  # 0: the kernel without
    tile: int | None = None
    warps: int | None = None
    stages: int | None = None
    rows: int = 16  # of a query block

    def __str__(self) -> str:
        name = f"3d/{self.segments}" if self.segments else "2d"
        given = {"t": self.tile, "w": self.warps, "s": self.stages, "m": self.rows if self.rows != 16 else None}
        return name + "".join(f" {k}{v}" for k, v in given.items() if v)


HOWS = [
    How(),
    How(16),
    *(How(tile=t, warps=w, stages=s) for t, w, s in [(64, 8, 2), (64, 4, 2), (32, 4, 2), (32, 8, 2)]),
    How(8, 32, 4, 2),
]


def useful(name: str, how: How, queries: int) -> bool:
    """A larger block of query rows only where a smaller one has not room for a request's."""
    heads, kv_heads = LAYERS[name][:2]
    return how.rows == 16 or queries * heads // kv_heads > 16


class Changed:
    """Stands where vLLM's module has a kernel, and calls it with other numbers."""

    how = How()

    def __init__(self, kernel: Any, dimensions: int) -> None:
        self.kernel, self.dimensions = kernel, dimensions

    def __getitem__(self, grid: Any) -> Any:
        how = Changed.how

        def launch(**given: Any) -> None:
            where = grid
            if how.rows != 16 and self.dimensions:
                block = how.rows // given["num_queries_per_kv"]
                given |= {"BLOCK_M": how.rows, "BLOCK_Q": block}
                where = (given["query_ptr"].shape[0] // block + given["num_seqs"], *grid[1:])
            if how.tile:
                given["TILE_SIZE"] = how.tile
            if self.dimensions:
                given |= {k: v for k, v in (("num_warps", how.warps), ("num_stages", how.stages)) if v}
            self.kernel[where](**given)

        return launch


class Attention:
    """One kind of layer: its cache, and batches of it."""

    def __init__(self, name: str, ops: Any, tokens: int) -> None:
        self.heads, kv_heads, self.size, self.window, self.block = LAYERS[name]
        self.ops, blocks = ops, tokens // self.block + 64
        torch.manual_seed(0)
        self.k = torch.empty(blocks, self.block, kv_heads, self.size, device=DEVICE, dtype=torch.bfloat16).normal_()
        self.v = torch.empty_like(self.k).normal_()
        self.scratch: dict[int, Any] = {}

    def batch(self, requests: int, queries: int, context: int, count: int) -> list[Any]:
        found = []
        pages = -(-(context + queries) // self.block)
        for i in range(count):
            table = torch.randperm(len(self.k), device=DEVICE)[: requests * pages].view(requests, pages).int()
            torch.manual_seed(i)
            q = torch.randn(requests * queries, self.heads, self.size, device=DEVICE).bfloat16() / 4
            found.append((q, torch.empty_like(q), table))
        self.lengths = torch.full((requests,), context + queries, dtype=torch.int32, device=DEVICE)
        self.starts = torch.arange(0, requests * queries + 1, queries, dtype=torch.int32, device=DEVICE)
        return found

    def each(self, how: How, batches: list[Any], queries: int) -> None:
        for batch in batches:
            self(how, *batch, queries)

    def __call__(self, how: How, q: Any, out: Any, table: Any, queries: int) -> None:
        segments = how.segments
        if segments and segments not in self.scratch:
            sizes = (80, self.heads, segments)
            self.scratch[segments] = [torch.empty(*sizes, *s, device=DEVICE) for s in ((self.size,), (), ())]
        output, maxima, sums = self.scratch[segments] if segments else (None,) * 3
        Changed.how = how
        self.ops.unified_attention(
            q=q,
            k=self.k,
            v=self.v,
            out=out,
            cu_seqlens_q=self.starts,
            max_seqlen_q=1 if segments else max(queries, 2),
            seqused_k=self.lengths,
            max_seqlen_k=int(table.shape[1]) * self.block,
            softmax_scale=1.0,
            causal=True,
            window_size=(self.window - 1, 0) if self.window else (-1, -1),
            block_table=table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=len(self.lengths),
            num_par_softmax_segments=segments or None,
            softmax_segm_output=output,
            softmax_segm_max=maxima,
            softmax_segm_expsum=sums,
        )


def compile_attention(share: list[tuple[str, How]], ops: Any, ready: Any) -> None:
    """Into Triton's cache on disk, saying what is there."""
    layers: dict[str, Attention] = {}
    for name, how in share:
        try:
            layer = layers.setdefault(name, Attention(name, ops, 4096))
            layer(how, *layer.batch(2, 5, 256, 1)[0], 5)
            torch.cuda.synchronize()
        except Exception as error:
            ready.put((name, str(how), (str(error).splitlines() or ["?"])[0][:120]))
        else:
            ready.put((name, str(how), ""))


def attention_part(seconds: float, out: Path, ready: Any, go: Any) -> None:
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU starts no CUDA, so that this process may fork
    from vllm.v1.attention.ops import triton_unified_attention as ops

    begun = time.time()
    kernels = {"kernel_unified_attention_2d": 2, "kernel_unified_attention_3d": 3, "reduce_segments": 0}
    for kernel, dimensions in kernels.items():
        setattr(ops, kernel, Changed(getattr(ops, kernel), dimensions))
    every = [(name, how) for how in HOWS for name in LAYERS if useful(name, how, 5)]
    workers, fork = max(2, min(9, (os.cpu_count() or 2) - 2)), multiprocessing.get_context("fork")
    queue = fork.Queue()
    compiling = [fork.Process(target=compile_attention, args=(every[i::workers], ops, queue)) for i in range(workers)]
    for process in compiling:
        process.start()
    report: dict[str, Any] = {"us": {}, "wrong": []}
    compiled = set()
    for _ in every:
        with contextlib.suppress(Empty):  # nothing more comes in time
            name, form, wrong = queue.get(timeout=max(0.01, begun + 35 - time.time()))
            if wrong:
                report["wrong"].append(f"{name} {form}: {wrong}")
            else:
                compiled.add((name, form))
    for process in compiling:
        process.kill()
    report["compile_s"] = round(time.time() - begun, 1)
    print(f"attention: {len(compiled)} of {len(every)} compiled in", report["compile_s"], "s", flush=True)
    ready.set()
    go.wait()
    gc.collect()
    gc.freeze()  # capturing a graph collects garbage, which takes longer than what is measured
    begun = time.time()
    for name in reversed(LAYERS):
        layer = Attention(name, ops, 16 * 30064)
        for context, requests in itertools.product(CONTEXTS, (16, 4)):
            for queries in QUERIES[name.split()[0]]:
                calls = 16 if context < 1000 else 6 if context < 10000 else 2
                batches = layer.batch(requests, queries, context, calls)
                here: dict[str, float] = {}
                wanted = None
                for how in HOWS:
                    label = str(how)
                    if (name, label) not in compiled or not useful(name, how, queries):
                        continue
                    if time.time() > begun + seconds:
                        report["wrong"].append(f"no time for {name} {context} {requests} {queries} {label}")
                        break
                    try:
                        layer(how, *batches[0], queries)
                        got = batches[0][1].clone().float()
                        wanted = got if wanted is None else wanted
                        if (difference := (got - wanted).norm() / wanted.norm()) > 0.01:
                            report["wrong"].append(f"{name} {how} {context} {requests} {queries}: {difference:.1e}")
                        each = functools.partial(layer.each, how, batches, queries)
                        here[label] = graph_us(each, calls, 3)
                    except Exception as error:
                        compiled.discard((name, label))
                        report["wrong"].append(f"{name} {how}: {(str(error).splitlines() or ['?'])[0][:120]}")
                key = f"{name} {requests}x{queries} at {context}"
                report["us"][key] = here
                fastest = "; ".join(f"{h} {us}" for h, us in sorted(here.items(), key=lambda i: i[1]))
                print(f"{key:<26}", fastest, flush=True)
                out.write_text(json.dumps(report))
        del layer, batches
        torch.cuda.empty_cache()
    for line in report["wrong"][:20]:
        print("WRONG", line)
    out.write_text(json.dumps(report))


PARTS = {"attention": attention_part, "gemm": gemm_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=95, help="of all parts together")
    parser.add_argument("--out", type=Path, required=True)
    asked, start = parser.parse_args(), time.time()
    spawn, started = multiprocessing.get_context("spawn"), []
    names = asked.parts.split(",")
    for name in names:
        part, ready, go = asked.out.with_suffix(f".{name}.part"), spawn.Event(), spawn.Event()
        child = spawn.Process(target=PARTS[name], args=((asked.seconds - 45) / len(names), part, ready, go))
        child.start()
        started.append(SimpleNamespace(name=name, part=part, ready=ready, go=go, child=child))
    for s in started:  # nothing is measured while another part compiles on the card
        s.ready.wait(max(1.0, start + 50 - time.time()))
    print(f"all ready at {time.time() - start:.0f} s", flush=True)
    results: dict[str, Any] = {}
    for i, s in enumerate(started):
        left = start + asked.seconds - time.time()
        s.go.set()
        s.child.join(max(3.0, left / (len(started) - i)))
        said = "" if s.child.exitcode == 0 else f"ended with {s.child.exitcode}"
        if s.child.is_alive():
            said = "did not end in time"
            s.child.kill()
            s.child.join()
        results[s.name] = json.loads(s.part.read_text()) if s.part.exists() else {}
        s.part.unlink(missing_ok=True)
        print(f"== {s.name} until {time.time() - start:.0f} s {said}", flush=True)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
