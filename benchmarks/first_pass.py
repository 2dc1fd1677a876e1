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
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vllm_gemma4_spec.kernels import cuda, packing, small_batch_gemm, stream_gemm
from vllm_gemma4_spec.kernels.small_batch_gemm import Form, Launch

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
ROWS = (80, 16, 20, 64, 32, 40, 8, 24, 48, 5, 128, 96, 17, 33, 65)
PLAIN = [*map(Form, (1, 2, 3, 4, 5, 8, 10)), *(Form(t, 2) for t in (1, 2, 3, 4, 5))]
FORMS = PLAIN + [Form(f.tiles, f.pair, True) for f in PLAIN if f not in (Form(1), Form(4), Form(1, 2))]


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


def launches(n: int, k: int, form: Form, chunks: int, gelu: bool, multiprocessors: int) -> Iterator[Launch]:
    """The plan's first, then others that leave no warp without work."""
    planned = small_batch_gemm.plan(n, k, form, chunks, gelu, multiprocessors)
    yield planned
    group, blocks = (2 if gelu and form.pair == 1 else 1), k // packing.COLUMNS
    outputs = n // packing.ROWS // form.pair
    for split, parts, slots in itertools.product((1, 2, 4, 5, 8, 10), (1, 2, 4), (group, 2 * group, 4 * group)):
        how, warps = Launch(split * slots, split, parts), outputs * chunks * split * parts
        fits = how.warps <= form.most_warps and outputs % slots == 0 and split * parts <= blocks
        even = blocks % (split * parts) == 0 or parts > 1
        if fits and even and how != planned and how.warps > 1 and 2 <= warps / multiprocessors <= 36:
            yield how


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
        copies = max(4, min(40, 100_000_000 // size))
        parts = (made.weight.data, made.weight_scale.data, *packing.pack(before.codes, before.scale))
        self.copies = [[p.clone() for p in parts] for _ in range(copies)]
        self.workspace, self.marlin_global_scale = made.workspace, made.weight_global_scale
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

    def rows(self, of: list[torch.Tensor], x: torch.Tensor, form: Form, how: Launch | None = None) -> torch.Tensor:
        return small_batch_gemm.gemm(x, of[2], of[3], self.global_scale, self.gelu, None, form, how)

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
    wanted = [(form, gelu) for form in FORMS for gelu in (False, True)]
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda w: cuda.compiled(small_batch_gemm.source(*w, False), "sm_90"), wanted))
        streams = stream_gemm.WGMMA_FORMS.items()
        stream_codes = list(pool.map(lambda f: cuda.compiled(stream_gemm.source(f[0], False, f[1]), "sm_90a"), streams))
    report: dict[str, Any] = {"compile_s": round(time.time() - begun, 1), "us": {}, "error": {}, "wrong": []}
    ready.set()
    go.wait()
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
    stream_gemm.kernel = lambda *what: streaming[what]  # type: ignore[assignment]
    device = torch.device("cuda", 0)
    small_batch_gemm.SCRATCH.reserve(device, 4 * 128 * 20480 * 4, 1280 * 16)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
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
        for form in FORMS:
            for rows in sorted({1, 5, form.rows - 1, form.rows, 80, 128}):
                y = attempt(f"{name} {form} {rows} rows", lambda: w.rows(w.copies[0], w.x[:rows].contiguous(), form))  # noqa: B023
                if y is None:
                    continue
                worst = max(worst, error := w.error(y))
                if error > 1.02 * w.error(w.other(w.copies[0], w.x[:rows].contiguous(), 0)):
                    report["wrong"].append(f"{name} {form} {rows} rows: error {error:.2e}")
        report["error"][name] = {"worst": round(worst, 6), "marlin": round(marlin, 6)}
        print(name, report["error"][name], flush=True)
    checked, turn = time.time() - begun, 0
    report["check_s"] = round(checked, 1)
    for rows, (name, w) in itertools.product(ROWS, all_weights.items()):
        turn += 1
        left = (begun + seconds - time.time()) / (len(ROWS) * len(all_weights) - turn + 1)
        until = time.time() + 1.6 * left
        x = w.x[:rows].contiguous()
        here: dict[str, Any] = {}
        for what, streamed in (("marlin", 0), ("stream", stream_gemm.ALL)):
            call = lambda s=streamed: [w.other(c, x, s) for c in w.copies]  # noqa: B023, E731
            here[what] = attempt(f"{name} {what} {rows}", lambda: graph_us(call, len(w.copies)))  # noqa: B023
        forms = [f for f in FORMS if f.chunks(rows) <= 10 and f.rows < rows + 16]
        found: dict[str, tuple[float, list[int]]] = {}
        queues = {f: launches(w.n, w.k, f, f.chunks(rows), w.gelu, multiprocessors) for f in forms}
        first = True
        while queues and (first or time.time() < until):  # the plan's launch of every form, then others in turn
            for form in list(queues):
                how = next(queues[form], None)
                if how is None:
                    del queues[form]
                    continue
                call = lambda f=form, h=how: [w.rows(c, x, f, h) for c in w.copies]  # noqa: B023, E731
                us = attempt(f"{name} {form} {how} {rows}", lambda: graph_us(call, len(w.copies)))  # noqa: B023
                label = f"{form.tiles}x{form.pair}{'s' * form.swap}"
                if us is not None and first:
                    here[label] = us
                if us is not None and us < found.get(label, (1e9, []))[0]:
                    found[label] = us, [how.warps, how.split, how.parts]
                if not first and time.time() > until:
                    break
            first = False
        report["us"].setdefault(rows, {})[name] = {**here, "best": found}
        plan = " ".join(f"{k} {v}" for k, v in here.items())
        best = " ".join(
            f"{k} {us} {'/'.join(map(str, how))}" for k, (us, how) in sorted(found.items(), key=lambda i: i[1][0])[:3]
        )
        print(f"{rows:>3} rows {name:<10} {plan} | best {best}", flush=True)
        out.write_text(json.dumps(report))
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
QUERIES = {"E4B": (1, 5), "31B": (1, 4, 5)}
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
    *(How(tile=t, warps=w, stages=s) for t, w, s in [(32, 8, 3), (32, 2, 3), (32, 4, 2), (32, 4, 4), (32, 8, 2)]),
    *(How(tile=t, warps=w, stages=s) for t, w, s in [(64, 4, 2), (64, 8, 2), (16, 4, 4), (16, 2, 4)]),
    *(How(tile=t, warps=w, stages=s, rows=32) for t, w, s in [(32, 4, 3), (32, 8, 2), (64, 8, 2)]),
    How(16),
    *(How(g, t, w, s) for g in (4, 8, 16) for t, w, s in [(32, 4, 2), (32, 8, 2)]),
    *(How(g, t, w, s) for g, t, w, s in [(8, 16, 4, 3), (16, 16, 2, 3), (32, 16, 4, 3), (8, 64, 8, 2)]),
    *(How(g, t, w, s, 32) for g, t, w, s in [(4, 32, 4, 2), (8, 32, 8, 2)]),
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


def compile_attention(share: list[tuple[str, How]], ops: Any) -> None:
    """Into Triton's cache on disk; a form that does not compile is noticed when it is measured."""
    for name, how in share:
        layer = Attention(name, ops, 4096)
        for requests, queries in ((2, 5), (1, 5)):  # 1: Triton makes a kernel of its own for it
            for batch in layer.batch(requests, queries, 256, 1):
                with contextlib.suppress(Exception):
                    layer(how, *batch, queries)


def attention_part(seconds: float, out: Path, ready: Any, go: Any) -> None:
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU starts no CUDA, so that this process may fork
    from vllm.v1.attention.ops import triton_unified_attention as ops

    begun = time.time()
    for kernel, dimensions in (
        ("kernel_unified_attention_2d", 2),
        ("kernel_unified_attention_3d", 3),
        ("reduce_segments", 0),
    ):
        setattr(ops, kernel, Changed(getattr(ops, kernel), dimensions))
    every, workers = (
        [(name, how) for how in HOWS for name in LAYERS if useful(name, how, 5)],
        max(2, min(14, (os.cpu_count() or 2) - 2)),
    )
    fork = multiprocessing.get_context("fork")
    compiling = [fork.Process(target=compile_attention, args=(every[i::workers], ops)) for i in range(workers)]
    for process in compiling:
        process.start()
    for process in compiling:
        process.join(max(1.0, begun + 45 - time.time()))
        if process.is_alive():
            process.kill()
    report: dict[str, Any] = {"compile_s": round(time.time() - begun, 1), "us": {}, "wrong": []}
    ready.set()
    go.wait()
    begun = time.time()
    cases = list(itertools.product(CONTEXTS, (16, 4, 1)))
    broken: set[tuple[str, How]] = set()
    for name in LAYERS:
        layer = Attention(name, ops, 16 * 30064)
        for context, requests in cases:
            for queries in QUERIES[name.split()[0]]:
                if time.time() > begun + seconds:
                    report["wrong"].append(f"no time for {name} {context} {requests} {queries}")
                    continue
                calls = 16 if context < 1000 else 6 if context < 10000 else 2
                batches = layer.batch(requests, queries, context, calls)
                here: dict[str, float] = {}
                wanted = None
                for how in HOWS:
                    if (name, how) in broken or not useful(name, how, queries):
                        continue
                    try:
                        layer(how, *batches[0], queries)
                        got = batches[0][1].clone().float()
                        wanted = got if wanted is None else wanted
                        if (difference := (got - wanted).norm() / wanted.norm()) > 0.01:
                            report["wrong"].append(f"{name} {how} {context} {requests} {queries}: {difference:.1e}")
                        call = lambda h=how: [layer(h, *b, queries) for b in batches]  # noqa: B023, E731
                        here[str(how)] = graph_us(call, calls, 3)
                    except Exception as error:
                        broken.add((name, how))
                        report["wrong"].append(f"{name} {how}: {(str(error).splitlines() or ['?'])[0][:120]}")
                key = f"{name} {requests}x{queries} at {context}"
                report["us"][key] = here
                best = "; ".join(f"{h} {us}" for h, us in sorted(here.items(), key=lambda i: i[1])[:4])
                print(f"{key:<28} 2d {here.get('2d')} 3d/16 {here.get('3d/16')} | {best}", flush=True)
                out.write_text(json.dumps(report))
    for line in report["wrong"][:20]:
        print("WRONG", line)
    print("attention compiled in", report["compile_s"], "s")
    out.write_text(json.dumps(report))


PARTS = {"gemm": gemm_part, "attention": attention_part}


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
