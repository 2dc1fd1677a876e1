"""Attention of few queries, form by form: vLLM's two kernels with other numbers, and this package's.

    python benchmarks/attention_forms.py --out attention-forms.json [--layers 31B,26B-A4B,E4B]

Needs a GPU and vLLM 0.19.1. Layers of Gemma 4 at full size, 1, 4 and 16 requests of 1 and 5 queries, contexts of 256 to
120,000 tokens, in CUDA graphs; every batch has blocks of its own. Beside the times (microseconds) the floor: bytes of
the keys and values that are seen, at 4.2 TB/s. What is ready is written as it comes; ``--seconds`` bounds compiling
and measuring together.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from first_pass import graph_us

DEVICE = "cuda"
BANDWIDTH = 4.2e6  # bytes a microsecond
# Query heads, KV heads, head size, window (0: none), tokens of a cache block.
LAYERS = {
    "31B sliding": (32, 16, 256, 1024, 16),
    "31B full": (32, 4, 512, 0, 32),
    "26B-A4B sliding": (16, 8, 256, 1024, 16),
    "26B-A4B full": (16, 2, 512, 0, 32),
    "E4B sliding": (8, 2, 256, 512, 16),
    "E4B full": (8, 2, 512, 0, 16),
}


@dataclass(frozen=True)
class How:
    """One of vLLM's kernels with other numbers, or (``own``) this package's; None: as they are."""

    segments: int = 0  # 0: the kernel without
    tile: int | None = None
    warps: int | None = None
    stages: int | None = None
    own: bool = False
    rows: int = 16  # of a query block
    early: bool = True

    def __str__(self) -> str:
        name = f"own/{self.segments}" if self.own else f"3d/{self.segments}" if self.segments else "2d"
        given = {"t": self.tile, "w": self.warps, "s": self.stages, "m": self.rows if self.rows != 16 else None}
        return name + "".join(f" {k}{v}" for k, v in given.items() if v) + ("" if self.early else " late")

    def compiled(self) -> How:
        """What the compiler is told of it: its own segments are no constant, up to 32."""
        return replace(self, segments=0 if self.segments <= 32 else 64) if self.own else self


STOCK = {
    "sliding": [
        How(),
        How(16),
        How(tile=64, warps=4, stages=2),
        How(tile=64, warps=8, stages=2),
        *(How(tile=32, warps=4, stages=n) for n in (2, 1)),
        *(How(n, 32, 4, 2) for n in (16, 8)),
        How(16, 32, 4, 1),
        *(How(n, 64, 4, 2) for n in (4, 8)),
    ],
    "full": [
        How(),
        How(16),
        How(tile=32, warps=4, stages=2),
        How(tile=64, warps=8, stages=2),
        *(How(n, 32, 4, 2) for n in (8, 16, 32, 64)),
        How(16, 32, 4, 1),
        How(16, 16, 4, 2),
    ],
}
OWN = {
    "sliding": [(32, 4, 2), (64, 8, 2), (64, 4, 2), (32, 4, 1), (32, 8, 2)],
    "full": [(32, 4, 2), (64, 8, 2), (32, 4, 1)],
}
SPLITS = {  # requests -> parts; the first is tried with every tile
    "sliding": {1: (8, 4, 16), 4: (4, 8, 2), 16: (2, 4, 1)},
    "full": {1: (32, 64, 16), 4: (16, 32, 8), 16: (16, 8, 4)},
}


def own(kind: str, segments: int) -> list[How]:
    return [How(segments, t, w, s, own=True) for t, w, s in OWN[kind]]


class Changed:
    """Stands where vLLM's module has a kernel, and calls it with other numbers."""

    how = How()

    def __init__(self, kernel: Any, dimensions: int) -> None:
        self.kernel, self.dimensions = kernel, dimensions

    def __getitem__(self, grid: Any) -> Any:
        how = Changed.how

        def launch(**given: Any) -> None:
            if how.tile:
                given["TILE_SIZE"] = how.tile
            if self.dimensions:
                given |= {k: v for k, v in (("num_warps", how.warps), ("num_stages", how.stages)) if v}
            self.kernel[grid](**given)

        return launch


class Attention:
    """One kind of layer: its cache, and batches of it."""

    def __init__(self, name: str, ops: Any, tokens: int, fp8: bool = False) -> None:
        self.heads, self.kv_heads, self.size, self.window, self.block = LAYERS[name]
        self.ops, self.fp8, blocks = ops, fp8, tokens // self.block + 64
        torch.manual_seed(0)
        shape = blocks, 2, self.block, self.kv_heads, self.size
        self.cache = torch.empty(*shape, device=DEVICE, dtype=torch.bfloat16).normal_()
        if fp8:
            self.cache = self.cache.to(torch.float8_e4m3fn)
        self.k, self.v = self.cache.unbind(1)
        self.floats = torch.zeros(0, device=DEVICE)
        self.scratch: dict[int, Any] = {}

    def batch(self, requests: int, queries: int, context: int, count: int) -> list[Any]:
        found = []
        pages = -(-(context + queries) // self.block)
        for i in range(count):
            table = torch.randperm(len(self.k), device=DEVICE)[: requests * pages].view(requests, pages).int()
            torch.manual_seed(i)
            q = torch.randn(requests * queries, self.heads, self.size, device=DEVICE).bfloat16() / 4
            out = torch.empty_like(q)
            found.append((q.to(torch.float8_e4m3fn) if self.fp8 else q, out, table))
        self.lengths = torch.full((requests,), context + queries, dtype=torch.int32, device=DEVICE)
        self.starts = torch.arange(0, requests * queries + 1, queries, dtype=torch.int32, device=DEVICE)
        return found

    def floor(self, requests: int, queries: int, context: int) -> float:
        seen = context + queries
        if self.window:
            seen = min(seen, self.window + queries - 1)
        return round(requests * seen * self.kv_heads * self.size * 2 * self.cache.element_size() / BANDWIDTH, 1)

    def each(self, how: How, batches: list[Any], queries: int) -> None:
        for batch in batches:
            self(how, *batch, queries)

    def __call__(self, how: How, q: Any, out: Any, table: Any, queries: int) -> None:
        if how.own:
            self.own(how, q, out, table, queries)
            return
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

    def own(self, how: How, q: Any, out: Any, table: Any, queries: int) -> None:
        from vllm_gemma4_spec.kernels import few_query_attention as few

        form = few.Form(how.segments or 4, how.tile or 32, how.warps or 4, how.stages or 2, how.rows, how.early)
        floats = form.scratch(len(q), self.heads, self.size, self.window)
        if floats > len(self.floats):
            self.floats = torch.empty(floats, device=DEVICE)
        few.attention(
            form,
            out,
            q,
            self.k,
            self.v,
            table,
            self.lengths,
            self.starts,
            1.0,
            self.window,
            self.floats,
            one=queries == 1,
        )


Key = tuple[str, bool, bool, How]  # layers, fp8, several queries (own kernel), form


def compile_share(share: list[Key], ops: Any, ready: Any) -> None:
    """Into Triton's cache on disk, saying what is there."""
    layers: dict[tuple[str, bool], Attention] = {}
    for key in share:
        name, fp8, several, how = key
        try:
            layer = layers.setdefault((name, fp8), Attention(name, ops, 4096, fp8))
            layer(how, *layer.batch(2, 5 if several else 1, 256, 1)[0], 5 if several else 1)
            torch.cuda.synchronize()
        except Exception as error:
            ready.put((key, (str(error).splitlines() or ["?"])[0][:120]))
        else:
            ready.put((key, ""))


def kernels_to_compile(names: list[str]) -> list[Key]:
    """Most promising first."""
    found: list[Key] = []
    for name in names:
        kind = name.split()[1]
        found += [(name, False, False, how) for how in STOCK[kind]]
        found += [(name, False, several, how) for how in own(kind, 0) for several in (False, True)]
    for name in names:
        kind = name.split()[1]
        if kind == "full":
            found += [(name, False, False, how) for how in own(kind, 64)]
        found += [(name, False, False, replace(own(kind, 0)[0], early=False))]
        found += [(name, True, False, how) for how in [*STOCK[kind], *own(kind, 0)] if name.startswith("31B")]
    return found


def cases(names: list[str]) -> list[tuple[str, bool, int, int, int]]:
    """Layers, fp8, context, requests, queries."""
    found = [(n, False, 256, r, q) for n in names for r in (16, 4, 1) for q in (1, 5)]
    found += [(n, False, 30000, r, q) for n in names for r in (16, 4, 1) for q in (1, 5)]
    found += [(n, True, c, r, 1) for n in names if n.startswith("31B") for r in (16, 4, 1) for c in (256, 30000)]
    found += [(n, False, 120000, 1, q) for n in names for q in (1, 5)]
    found += [(n, False, 2048, r, 1) for n in names for r in (16, 4, 1)]
    return found


class Measured:
    """Times of one case, form by form, each compared with vLLM's result."""

    def __init__(self, report: dict[str, Any], compiled: set[Key], until: float) -> None:
        self.report, self.compiled, self.until = report, compiled, until

    def case(self, layer: Attention, case: tuple[str, bool, int, int, int]) -> dict[str, float]:
        name, fp8, context, requests, queries = case
        kind, here = name.split()[1], {}
        calls = 16 if context < 1000 else 6 if context < 10000 else 2
        batches = layer.batch(requests, queries, context, calls)
        wanted: list[torch.Tensor] = []

        def measure(how: How) -> float:
            key = name, fp8, queries > 1 and how.own, how.compiled()
            if key not in self.compiled or str(how) in here:
                return here.get(str(how), float("inf"))
            if time.time() > self.until:
                self.report["wrong"].append(f"no time for {case} {how}")
                return float("inf")
            try:
                layer(how, *batches[0], queries)
                got = batches[0][1].float()
                wanted.append(got) if not wanted else None
                difference = float((got - wanted[0]).norm() / wanted[0].norm())
                if not difference < (0.06 if fp8 else 0.01):
                    self.report["wrong"].append(f"{case} {how}: {difference:.1e}")
                here[str(how)] = graph_us(functools.partial(layer.each, how, batches, queries), calls, 3)
            except Exception as error:
                self.compiled.discard(key)
                self.report["wrong"].append(f"{case} {how}: {(str(error).splitlines() or ['?'])[0][:120]}")
                return float("inf")
            return here[str(how)]

        for how in STOCK[kind]:
            measure(how)
        splits = SPLITS[kind][requests]
        best = min(own(kind, splits[0]), key=measure)
        best = min([replace(best, segments=n) for n in splits], key=measure)
        for n in splits:
            measure(replace(own(kind, n)[0], segments=n))
        measure(replace(own(kind, best.segments)[0], early=False))
        return here


def measure_all(names: list[str], seconds: float, out: Path) -> None:
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU starts no CUDA, so that this process may fork
    from vllm.v1.attention.ops import triton_unified_attention as ops

    import vllm_gemma4_spec.kernels.few_query_attention  # noqa: F401 - for all forks

    began = time.time()
    kernels = {"kernel_unified_attention_2d": 2, "kernel_unified_attention_3d": 3, "reduce_segments": 0}
    for kernel, dimensions in kernels.items():
        for parameter in getattr(ops, kernel).params:
            parameter.do_not_specialize |= parameter.name == "num_seqs"  # one compilation for 1, 4 and 16
        setattr(ops, kernel, Changed(getattr(ops, kernel), dimensions))
    every = kernels_to_compile(names)
    workers, fork = max(2, min(14, (os.cpu_count() or 2) - 2)), multiprocessing.get_context("fork")
    queue = fork.Queue()
    compiling = [fork.Process(target=compile_share, args=(every[i::workers], ops, queue)) for i in range(workers)]
    for process in compiling:
        process.start()
    report: dict[str, Any] = {"us": {}, "floor": {}, "wrong": []}
    compiled: set[Key] = set()
    for _ in every:
        with contextlib.suppress(Empty):  # nothing more comes in time
            key, wrong = queue.get(timeout=max(0.01, began + seconds * 0.45 - time.time()))
            if wrong:
                report["wrong"].append(f"{key}: {wrong}")
            else:
                compiled.add(key)
    for process in compiling:
        process.kill()
    report["compile_s"] = round(time.time() - began, 1)
    print(f"{len(compiled)} of {len(every)} compiled in", report["compile_s"], "s", flush=True)
    gc.collect()
    gc.freeze()  # capturing a graph collects garbage, which takes longer than what is measured
    report["card"] = torch.cuda.get_device_name()
    measured = Measured(report, compiled, began + seconds)
    layers: dict[tuple[str, bool], Attention] = {}
    for case in cases(names):
        name, fp8, context, requests, queries = case
        if time.time() > began + seconds:
            break
        if (name, fp8) not in layers:
            layers[name, fp8] = Attention(name, ops, 16 * 30064, fp8)
        layer = layers[name, fp8]
        here = measured.case(layer, case)
        key = f"{name}{' fp8' * fp8} {requests}x{queries} at {context}"
        report["us"][key], report["floor"][key] = here, layer.floor(requests, queries, context)
        fastest = "; ".join(f"{h} {us}" for h, us in sorted(here.items(), key=lambda i: i[1]))
        print(f"{key:<28} floor {report['floor'][key]}:", fastest, flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    for line in report["wrong"][:30]:
        print("WRONG", line)
    report["seconds"] = round(time.time() - began, 1)
    out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="31B,26B-A4B,E4B", help="models")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    names = [n for model in asked.layers.split(",") for n in LAYERS if n.split()[0] == model]
    measure_all(names, asked.seconds, asked.out)


if __name__ == "__main__":
    main()
