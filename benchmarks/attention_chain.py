"""Attention of a small drafter where a draft has it: in a chain of layers, as two kernels and as one over a cluster.

    python benchmarks/attention_chain.py --out attention-chain.json

Needs a Hopper card and vLLM 0.19.1. First the kernel over clusters beside float64, by itself. Then one CUDA graph holds
several layers of E4B with weights and caches of their own: norm, qkv's GEMM, the heads' norm, the cache write,
attention, o's GEMM; ``none`` leaves attention out, ``shared`` layers write no cache. After each pass kernels without
programmatic launch make the contexts one token longer, as between the passes of a draft, and a request's prefix has a
page that another one writes. What reads lengths before the kernel ahead has ended (``cluster``), or brings keys into
the L2 (``l2``), must give the bits of what does not (``late``). What is ready is written as it comes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from first_pass import graph_us
from layer_chain import heads as head_norm
from layer_chain import norms

from vllm_gemma4_spec.kernels import cluster_attention, cuda, packing, small_batch_gemm
from vllm_gemma4_spec.kernels.cluster_attention import Form
from vllm_gemma4_spec.performance import split_attention

HIDDEN, PAGE, SCALE = 2560, 16, 1 / 16
# Query heads, KV heads, head size, window (0: none); E4B's and, of the same hidden size, 31B's sliding layers.
KINDS = {"sliding": (8, 2, 256, 512), "full": (8, 2, 512, 0), "31B sliding": (32, 16, 256, 1024)}
Change = Callable[[Form], Form | None]
VARIANTS: dict[str, Change | None] = {
    "now": None,
    "late": lambda form: replace(form, early=0),
    "cluster": lambda form: replace(form, early=1),
    "l2": lambda form: replace(form, early=2),
}
MORE: dict[str, dict[str, Change]] = {
    "sliding": {},
    "31B sliding": {},
    "full": {
        "two stages": lambda form: replace(form, stages=2),
        "alone 512": lambda form: replace(form, alone=512),
        "alone 2048": lambda form: replace(form, alone=2048),
    },
}


def forms() -> dict[str, list[Form]]:
    found: dict[str, list[Form]] = {}
    for kind, (heads, kv_heads, size, window) in KINDS.items():
        for queries in (1, 4):
            form = cluster_attention.form(size, heads // kv_heads, window, PAGE, queries)
            assert form is not None
            changes = [c for c in (*VARIANTS.values(), *MORE[kind].values()) if c]
            found.setdefault(kind, []).extend(f for f in (c(form) for c in changes) if f)
    return {kind: list(dict.fromkeys(of)) for kind, of in found.items()}


def load_all(workers: int) -> float:
    """Compile every form side by side, and put it where the kernel is looked up."""
    begun = time.time()
    every = [f for of in forms().values() for f in of]
    with ThreadPoolExecutor(workers) as pool:
        codes = list(pool.map(lambda f: cuda.compiled(cluster_attention.source(f), "sm_90"), every))
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    made = {}
    for form, code in zip(every, codes, strict=True):
        kernel = cuda.Kernel.__new__(cuda.Kernel)
        kernel._load(code, "cluster_attention", overlaps=True)
        kernel.allow_shared(form.shared_bytes)
        made[form] = kernel
    cluster_attention.kernel = made.__getitem__  # type: ignore[assignment]
    return round(time.time() - begun, 1)


class Cache:
    """Paged keys and values of one layer and a batch's requests, pages in no order."""

    def __init__(self, kind: str, lengths: list[int], queries: int, more: int = 0) -> None:
        _, kv_heads, size, _ = KINDS[kind]
        pages = [-(-(n + more) // PAGE) + 1 for n in lengths]
        order = (torch.randperm(sum(pages)) + 1).int().split(pages)
        self.table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
        for request, mine in enumerate(order):
            self.table[request, : len(mine)] = mine
        self.table = self.table.cuda()
        self.cache = torch.randn(sum(pages) + 1, 2, PAGE, kv_heads, size, device="cuda").bfloat16()
        self.k, self.v = self.cache.unbind(1)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(0, len(lengths) * queries + 1, queries, dtype=torch.int32, device="cuda")


def wanted(q: Any, of: Cache, queries: int, window: int) -> Any:
    out, group = torch.zeros_like(q, dtype=torch.float64), q.shape[1] // of.k.shape[2]
    for request, length in enumerate(of.lengths.tolist()):
        for i in range(queries):
            last = length - queries + i
            if last < 0:
                continue
            at = torch.arange(max(0, last - window + 1) if window else 0, last + 1, device="cuda")
            page, within = of.table[request].long()[at // PAGE], at % PAGE
            keys, values = (x[page, within].double().repeat_interleave(group, 1) for x in (of.k, of.v))
            weights = (torch.einsum("hd,thd->ht", q[request * queries + i].double(), keys) * SCALE).softmax(-1)
            out[request * queries + i] = torch.einsum("ht,thd->hd", weights, values)
    return out


def check(until: float) -> list[str]:
    """What is not right of the kernel by itself."""
    wrong, cases = [], 0
    for kind, of in forms().items():
        heads, kv_heads, size, window = KINDS[kind]
        for form in of:
            batches = [([1], 1), ([0, 16, 17], 1), ([511, 512, 513, 1000], 5), ([300] * 16, 1)]
            batches += [([5000, 129], 5)] if window else [([3000], 3), ([5000, 40, 2049, 1023], 1)]
            for lengths, queries in batches:
                if time.time() > until:
                    return [*wrong, f"no time after {cases} checks"]
                torch.manual_seed(cases)
                cache = Cache(kind, lengths, queries)
                q = torch.randn(len(lengths) * queries, heads, size, device="cuda").bfloat16()
                out = torch.full_like(q, torch.nan)
                units = len(lengths) * kv_heads * form.tiles(queries)
                count = cluster_attention.clusters(window, units)
                scratch = torch.full((max(1, form.scratch(units, count)),), torch.nan, device="cuda")
                arrivals = torch.zeros(units * 8, dtype=torch.int32, device="cuda")
                batch = cache.table, cache.lengths, cache.starts, SCALE, scratch, arrivals, queries
                for _ in range(2):
                    cluster_attention.attention(form, out, q, cache.k, cache.v, *batch)
                torch.cuda.synchronize()
                want = wanted(q, cache, queries, window)
                error = float((out.double() - want).norm() / want.norm().clamp(min=1e-9))
                if not error < 0.01 or arrivals.any():
                    wrong.append(f"{kind} {form} {lengths}: {error:.2e}, arrivals {int(arrivals.sum())}")
                cases += 1
    print(cases, "checks", flush=True)
    return wrong


class Chain:
    """Layers of one kind and a batch of requests."""

    def __init__(self, kind: str, requests: int, queries: int, context: int, layers: int, ops: Any) -> None:
        kind, _, shared = kind.partition(", ")
        self.writes = not shared
        self.kind, self.queries, self.ops = kind, queries, ops
        self.heads, self.kv_heads, self.size, self.window = KINDS[kind]
        torch.manual_seed(requests + queries)
        lengths = [context + queries + i % 3 for i in range(requests)]
        self.first = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.layers = [Cache(kind, lengths, queries, 64) for _ in range(layers)]
        one = self.layers[0]
        if requests > 1:  # the last one's prefix has the page that the first one writes
            last = (lengths[0] - 1) // PAGE
            one.table[-1, last - 2] = one.table[0, last]
        for layer in self.layers[1:]:
            layer.table, layer.lengths, layer.starts = one.table, one.lengths, one.starts
        self.before = [layer.cache.clone() for layer in self.layers]
        self.slots = torch.zeros(requests * queries, dtype=torch.int64, device="cuda")
        self.hidden = torch.randn(requests * queries, HIDDEN, device="cuda").bfloat16()
        self.norm = torch.ones(2, HIDDEN, device="cuda").bfloat16()
        self.one = torch.ones(1, device="cuda")
        self.global_scale = torch.tensor([3e-5], device="cuda")
        q, kv = self.heads * self.size, self.kv_heads * self.size
        self.weights = [
            [self.packed(q + 2 * kv, HIDDEN), self.packed(HIDDEN, q)] for _ in range(min(layers, 24))
        ]  # more than the L2 holds
        self.scratch = torch.empty(64, self.heads, 16, 512, device="cuda")
        self.outputs = torch.empty(layers, requests * queries, self.heads, self.size, device="cuda").bfloat16()

    @staticmethod
    def packed(n: int, k: int) -> Any:
        small_batch_gemm.SCRATCH.reserve(torch.device("cuda", 0), 4 * 128 * 20480 * 4, 1280 * 16)
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scale = (torch.rand(n, k // 16, device="cuda") * 400 + 0.1).to(torch.float8_e4m3fn)
        return packing.pack(codes, scale)

    def start(self) -> None:
        self.layers[0].lengths.copy_(self.first)
        for layer, before in zip(self.layers, self.before, strict=True):
            layer.cache.copy_(before)

    def given(self, layer: Cache, q: Any, out: Any) -> dict[str, Any]:
        return {
            "q": q,
            "k": layer.k,
            "v": layer.v,
            "out": out,
            "cu_seqlens_q": layer.starts,
            "max_seqlen_q": self.queries,
            "seqused_k": layer.lengths,
            "max_seqlen_k": int(layer.table.shape[1]) * PAGE,
            "softmax_scale": SCALE,
            "causal": True,
            "window_size": (self.window - 1, 0) if self.window else (-1, -1),
            "block_table": layer.table,
            "softcap": 0,
            "q_descale": None,
            "k_descale": None,
            "v_descale": None,
            "seq_threshold_3D": 64,
            "num_par_softmax_segments": 16,
            "softmax_segm_output": None,
            "softmax_segm_max": None,
            "softmax_segm_expsum": None,
        }

    def __call__(self, few: split_attention.FewQueries | None) -> None:
        """One pass; ``few`` attends."""
        from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

        x, rows, one = self.hidden, len(self.hidden), self.layers[0]
        within = torch.arange(self.queries, device="cuda")
        positions = (one.lengths[:, None] - self.queries + within).long()
        self.slots.copy_((one.table.gather(1, positions // PAGE).long() * PAGE + positions % PAGE).flatten())
        x = x.clone()
        q_size, kv_size = self.heads * self.size, self.kv_heads * self.size
        for i, layer in enumerate(self.layers):
            qkv_weights, o_weights = self.weights[i % len(self.weights)]
            normed, after = torch.empty_like(x), torch.empty_like(x)
            norms[(rows,)](
                x, x, *self.norm, normed, after, HIDDEN, BLOCK=4096, EARLY=False, num_warps=8, launch_pdl=True
            )
            qkv = small_batch_gemm.gemm(normed, *qkv_weights, self.global_scale)
            q = qkv.new_empty(rows, self.heads, self.size)
            grid = rows, self.heads
            wide = q_size + 2 * kv_size
            head_norm[grid](qkv, q, wide, q_size, HEAD=self.size, EARLY=False, num_warps=2, launch_pdl=True)
            k, v = (t.view(rows, self.kv_heads, self.size) for t in qkv[:, q_size:].split(kv_size, 1))
            if self.writes:
                triton_reshape_and_cache_flash(k, v, layer.k, layer.v, self.slots, "auto", self.one, self.one)
            out = self.outputs[i]
            if few is not None and not few(self.ops.unified_attention, self.given(layer, q, out)):
                raise RuntimeError("left to vLLM")
            x = small_batch_gemm.gemm((q if few is None else out).view(rows, q_size), *o_weights, self.global_scale)
        one.lengths.add_(1)


def usual(q: Any, k: Any, requests: int, window: int, queries: int) -> Form:
    """In place of ``split_attention.cluster``: wherever there is a form."""
    form = cluster_attention.form(q.shape[2], q.shape[1] // k.shape[2], window, PAGE, queries)
    if form is None or form.tiles(queries) * requests * k.shape[2] > split_attention._UNITS:
        raise ValueError("no room for arrivals")
    return form


def with_form(change: Change | None) -> split_attention.FewQueries:
    few = split_attention.FewQueries()
    few.clusters = change is not None
    return few


def measured(chain: Chain, variants: dict[str, Change | None], replays: int) -> tuple[dict[str, float], list[str]]:
    """Microseconds a layer, and what differs from ``late``."""
    times, wrong, results = {}, [], {}
    choose = split_attention.cluster
    layers = len(chain.layers)
    for name, change in {**variants, "none": None}.items():
        chain.start()
        few = None if name == "none" else with_form(change)

        def changed(*given: Any, change: Change | None = change) -> Form | None:
            return change(usual(*given)) if change else None

        split_attention.cluster = changed  # type: ignore[assignment]
        try:
            chain(few)
            torch.cuda.synchronize()
            chain.start()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain(few)
            all_outputs = []
            for _ in range(3):
                graph.replay()
                all_outputs.append(chain.outputs.clone())
            results[name] = torch.stack(all_outputs)
            for _ in range(replays):
                graph.replay()
            chain.start()
            spent = []
            for _ in range(7):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                spent.append(begin.elapsed_time(end) * 1000)
            times[name] = round(sorted(spent)[3] / layers, 2)
        except Exception as error:
            wrong.append(f"{name}: {(str(error).splitlines() or ['?'])[0][:160]}")
        finally:
            split_attention.cluster = choose
    for name, got in results.items():
        if name in ("late", "none") or "late" not in results:
            continue
        if name in ("cluster", "l2") and not torch.equal(got, results["late"]):
            count = int((got != results["late"]).any(-1).any(-1).any(-1).sum())
            wrong.append(f"{name}: {count} of {got.shape[0] * got.shape[1]} layers have not the bits of late")
        first, want = got[0, 0].float(), results["late"][0, 0].float()
        error = float((first - want).norm() / want.norm())
        if not error < 0.01:
            wrong.append(f"{name}: first layer {error:.1e} from late")
    return times, wrong


def alone(chain: Chain, change: Change | None) -> float:
    """Microseconds of attention by itself, layer after layer."""
    few, choose = with_form(change), split_attention.cluster
    split_attention.cluster = lambda *given: change(usual(*given)) if change else None  # type: ignore
    chain.start()
    queries = [torch.randn_like(chain.outputs[0]) for _ in chain.layers]

    def call() -> None:
        for i, layer in enumerate(chain.layers):
            few(chain.ops.unified_attention, chain.given(layer, queries[i], chain.outputs[i]))

    try:
        return graph_us(call, len(chain.layers), 5)
    finally:
        split_attention.cluster = choose


def cases() -> list[tuple[str, int, int, int, int]]:
    """Kind, requests, queries, context, layers."""
    found = [("sliding", r, q, 256, 16) for q in (1, 5) for r in (1, 4)] + [("sliding", 16, 1, 256, 16)]
    found += [("full", r, 1, c, n) for r in (1, 4, 16) for c, n in ((256, 8), (2048, 8), (700, 8))]
    found += [
        ("full", r, 1, c, n) for r, c, n in ((1, 30000, 3), (4, 30000, 3), (16, 8000, 3), (1, 120000, 2), (8, 2048, 8))
    ]
    several = (1, 256, 8), (1, 2048, 8), (1, 30000, 3), (4, 256, 8), (4, 2048, 8)
    found += [("full", r, 5, c, n) for r, c, n in several]
    found += [("31B sliding", 1, q, c, 8) for c in (256, 2048) for q in (1, 4)]
    found += [("sliding", r, q, 2048, 16) for r, q in ((1, 1), (4, 1), (16, 1), (1, 5), (4, 5), (8, 1), (5, 5))]
    found += [("sliding, shared", r, 1, c, 16) for c in (256, 2048) for r in (1, 4, 16)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--out", type=Path, required=True)
    asked, begun = parser.parse_args(), time.time()
    from vllm.v1.attention.ops import triton_unified_attention as ops

    report: dict[str, Any] = {"us": {}, "alone": {}, "wrong": []}
    report["compile_s"] = load_all(asked.workers)
    report["card"] = torch.cuda.get_device_name()
    print(report["card"], "compiled in", report["compile_s"], "s", flush=True)
    report["wrong"] += check(begun + asked.seconds * 0.35)
    for line in report["wrong"]:
        print("WRONG", line, flush=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    for name in ("kernel_unified_attention_2d", "kernel_unified_attention_3d"):
        setattr(ops, name, split_attention.attention_kernel(getattr(ops, name)))
    ops.reduce_segments = split_attention.reduce_kernel(ops.reduce_segments)
    gc.collect()
    gc.freeze()  # capturing a graph collects garbage, which takes longer than what is measured
    for kind, requests, queries, context, layers in cases():
        if time.time() > begun + asked.seconds:
            print("no time for the rest", flush=True)
            break
        key = f"{kind} {requests}x{queries} at {context}"
        chain = Chain(kind, requests, queries, context, layers, ops)
        times, wrong = measured(chain, VARIANTS | MORE[chain.kind], 10)
        report["us"][key] = times
        report["alone"][key] = {
            name: alone(chain, change) for name, change in VARIANTS.items() if name in times and name != "late"
        }
        report["wrong"] += [f"{key}: {w}" for w in wrong]
        shown = " ".join(f"{n} {us}" for n, us in times.items())
        print(f"{key:<24} {shown} | alone {report['alone'][key]}", *(f"\n  WRONG {w}" for w in wrong), flush=True)
        report["seconds"] = round(time.time() - begun, 1)
        asked.out.write_text(json.dumps(report, indent=1) + "\n")
        del chain
    print("until", round(time.time() - begun, 1), "s;", len(report["wrong"]), "wrong", flush=True)


if __name__ == "__main__":
    main()
