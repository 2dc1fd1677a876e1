"""Forms of the streaming NVFP4 kernel where a decode step has them: in a chain of layers, small kernels between GEMMs.

    python benchmarks/layer_chain.py --out layer-chain.json

Needs a Hopper card and vLLM 0.19.1. One CUDA graph holds several layers with weights of their own (more than the L2
holds): norm, qkv, a stand-in for attention, o, norm, gate_up, gelu * up, down. The small kernels are launched as
torch.compile launches them with ``triton.enable_pdl`` (attention without). ``early`` forms stand between small kernels
that let the next kernel start before they wait for the one before, where torch.compile says so behind its last load.

Each part of the forms runs in a process of its own, one after the other, so that one that hangs ends alone. Beside
microseconds a layer it says what is not as it should be: an error above Marlin's to float64, a row whose bits are not
those of the form in use, a chain whose result is not that of the first form with the same order of additions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from stream_forms import loaded
from target_gemm import GLOBAL_SCALE, SHAPES, gemm, graph_us, layer
from torch import Tensor

from vllm_gemma4_spec.kernels import cuda, stream_gemm
from vllm_gemma4_spec.kernels.stream_gemm import Form

HEAD = 256


@triton.jit
def _launch():
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def norms(  # type: ignore[no-untyped-def]
    x,
    residual,
    first,
    second,
    out,
    hidden,
    columns,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr = False,
):
    """hidden = residual + norm(x) * first; out = norm(hidden) * second; AHEAD: weights are loaded before the wait."""
    at = tl.arange(0, BLOCK)
    mask = at < columns
    row = tl.program_id(0).to(tl.int64) * columns
    if EARLY:
        _launch()
    if AHEAD:
        a = tl.load(first + at, mask, 0.0).to(tl.float32)
        b = tl.load(second + at, mask, 0.0).to(tl.float32)
    tl.extra.cuda.gdc_wait()
    v = tl.load(x + row + at, mask, 0.0).to(tl.float32)
    r = tl.load(residual + row + at, mask, 0.0).to(tl.float32)
    if not AHEAD:
        a = tl.load(first + at, mask, 0.0).to(tl.float32)
        b = tl.load(second + at, mask, 0.0).to(tl.float32)
    r += v * tl.rsqrt(tl.sum(v * v) / columns + 1e-6) * a
    r = r.to(tl.bfloat16).to(tl.float32)
    o = r * tl.rsqrt(tl.sum(r * r) / columns + 1e-6) * b
    if not EARLY:
        _launch()
    tl.store(hidden + row + at, r, mask)
    tl.store(out + row + at, o, mask)


@triton.jit
def heads(qkv, out, columns, wide, HEAD: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first ``wide`` of a row's ``columns``, each head normed."""
    at = tl.program_id(1) * HEAD + tl.arange(0, HEAD)
    row = tl.program_id(0).to(tl.int64)
    if EARLY:
        _launch()
    tl.extra.cuda.gdc_wait()
    v = tl.load(qkv + row * columns + at).to(tl.float32)
    v *= tl.rsqrt(tl.sum(v * v) / HEAD + 1e-6)
    if not EARLY:
        _launch()
    tl.store(out + row * wide + at, v)


@triton.jit
def attention(x, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A kernel without programmatic launch, as vLLM's attention is."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at).to(tl.float32) * 0.5)


@triton.jit
def activation(x, out, count, wide, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """gelu(gate) * up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    from_ = at // wide * (2 * wide) + at % wide
    if EARLY:
        _launch()
    tl.extra.cuda.gdc_wait()
    gate = tl.load(x + from_, mask, 0.0).to(tl.float32)
    up = tl.load(x + from_ + wide, mask, 0.0).to(tl.float32)
    if not EARLY:
        _launch()
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    tl.store(out + at, gate * tl.sigmoid(2.0 * inner) * up, mask)


@dataclass(frozen=True)
class Variant:
    forms: dict[int, Form] | None  # by tiles of eight rows; None: Marlin
    rows: tuple[int, ...]
    early: bool = False
    model: str = "31B"
    told: bool = False  # the kernel says where its time goes
    without: tuple[str, ...] = ()  # of LEFT_OUT; results mean nothing
    rank: int = 0  # of a low-rank branch
    beside: bool = False  # the branch as GEMMs of their own


def used_by(variant: Variant) -> set[int]:
    return {stream_gemm.tiles_for(r, variant.forms) for r in variant.rows} if variant.forms else set()


def both(name: str, forms: dict[int, Form] | None, rows: tuple[int, ...], **rest: Any) -> dict[str, Variant]:
    return {name: Variant(forms, rows, **rest), f"{name}, early": Variant(forms, rows, early=True, **rest)}


def early(forms: dict[int, Form] | None, rows: tuple[int, ...], **rest: Any) -> Variant:
    return Variant(forms, rows, early=True, **rest)


def changed(forms: dict[int, Form], **change: Any) -> dict[int, Form]:
    return {tiles: replace(form, **change) for tiles, form in forms.items()}


NOW = stream_gemm.WGMMA_FORMS
ROWS = (1, 4, 8, 16, 32, 33, 48, 64, 65, 80, 96, 128)

PARTS: dict[str, dict[str, Variant]] = {
    "31B": {
        "marlin": Variant(None, ROWS),
        **both("now", NOW, ROWS),
        "at once": early(changed(NOW, first=4, pace=0), (1, 16, 32, 64)),
        "little by little": early(changed({t: NOW[t] for t in (10, 16)}, first=2, pace=1000), (80, 128)),
        "mma": early(stream_gemm.MMA_FORMS, (1, 16, 32, 64)),
    },
    "E4B": {
        name: replace(v, model="E4B")
        for name, v in {
            "marlin": Variant(None, (1, 16, 32, 48, 64, 65, 80)),
            "now": Variant(NOW, (1, 16, 32, 48, 64, 65, 80)),
        }.items()
    },
    **{
        part: {
            f"without {' '.join(w)}" if w else "all": early(NOW, rows, without=w, model=part.removeprefix("out "))
            for w in (
                (),
                ("copies",),
                ("multiplication",),
                ("decoding",),
                ("x",),
                ("last",),
                ("copies", "x", "decoding"),
            )
        }
        for part, rows in (("out 31B", (1, 16, 64, 80)), ("out E4B", (64, 80)))
    },
    "branch": {
        "no branch": early(NOW, (1, 4, 16, 64)),
        "inside": early(NOW, (1, 4, 16, 64), rank=stream_gemm.RANK),
        "beside": early(NOW, (1, 4, 16, 64), rank=stream_gemm.RANK, beside=True),
        **{
            f"inside without {' '.join(w)}": early(NOW, (1, 16, 64), rank=stream_gemm.RANK, without=w)
            for w in (("t",), ("t", "up"))
        },
    },
    # Not measured but told: where a GEMM's time goes.
    "told": {"now": early(NOW, (1, 16, 64, 80), told=True)},
    "told E4B": {"now": early(NOW, (64, 80), told=True, model="E4B")},
}

LEFT_OUT = {
    "copies": [
        (
            "if (p == 0)\n                bring_tile(",
            "if (p == 0 && rows > 0) arrive(full + 8 * stage); else if (p == 0) bring_tile(",
        )
    ],
    # What would be multiplied is needed nevertheless: an empty statement would not keep it.
    "multiplication": [
        ("mma(acc[q][m], a[q], b0, b1);", "mix(acc[q][m][0], a[q]);"),
        ("mma_async(acc[0], a[0], rows_of_x);", "mix(acc[0][0][0], a[0]);"),
        ("mma_async(acc[1], a[1], rows_of_x);", "mix(acc[1][0][0], a[1]);"),
    ],
    "decoding": [
        (
            "a[q][0] = times_low(decode_even(word), both);",
            "a[q][0] = word, a[q][1] = high, a[q][2] = both, a[q][3] = word; continue;",
        )
    ],
    "x": [("if (p == 32) bring_x(", "if (p == 32 && rows > 0) arrive(full + 8 * stage); else if (p == 32) bring_x(")],
    "t": [
        ("branch(of, p / 32 - 2, lane", "if (K < 0) branch(of, p / 32 - 2, lane"),
        ("wait(base + THERE_AT, 0);", ""),
    ],
    "up": [("copy_x(base + up_at(eight, r), up", "if (K < 0) copy_x(base + up_at(eight, r), up")],
    "last": [
        ("const bool complete = count > 1;", "const bool complete = count > 1 && K < 0;"),
        ("if (one <= (tail > head)) {", "if (K < 0 && one <= (tail > head)) {"),
        ("if (count > 1) add_tile(again", "if (count > 1 && K < 0) add_tile(again"),
    ],
}
MIX = """
__device__ void mix(float& sum, const unsigned (&a)[4]) {
    sum = __uint_as_float(__float_as_uint(sum) ^ a[0] ^ a[1] ^ a[2] ^ a[3]);
}
"""

# What the kernel says the time of, when, and behind which text ("<": before).
TOLD = (
    ("starts", "threadIdx.x == 0", "    let_next_grid_start();\n"),
    ("the kernel before has ended", "p % 32 == 0", "        wait_for_previous_grid();\n"),
    ("first stage", "threadIdx.x == 0 && !seen++", "            wait(full + 8 * stage, parity);\n"),
    ("last stage multiplied", "threadIdx.x == 0", "<        // The tile ends here"),
    ("parts written", "threadIdx.x == 0", "        block = 0, tile++;\n"),
    ("all parts there", "threadIdx.x == 0", "<#pragma unroll 1\n    for (int of = head"),
)


def text_of(of: Variant, tiles: int) -> str:
    """The kernel's text, without what is left out, or saying where its time goes."""
    source = stream_gemm.source(tiles, False, of.forms[tiles], 0 if of.beside else of.rank)  # type: ignore[index]
    for name in of.without:
        for old, new in LEFT_OUT[name]:
            assert old in source, name
            source = source.replace(old, new)
    source = MIX * ("multiplication" in of.without) + source
    return told(source) if of.told else source


def told(source: str) -> str:
    """The kernel's text; each block says the time into one argument more, in front of ``y``."""

    def say(i: int, when: str) -> str:
        return f"if ({when}) told[blockIdx.x * 16 + {i}] = now();\n"

    head, kernel = source.split('extern "C" __global__')
    kernel = kernel.replace("    u16* y,", "    u64* told, u16* y,")
    head += '__device__ __forceinline__ u64 now() { u64 v; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(v) :: '
    head += '"memory"); return v; }\n'
    head += head.splitlines()[-1].replace("now()", "ticks()").replace("globaltimer", "clock64") + "\n"
    for i, (_, when, text) in enumerate(TOLD):
        said = text.removeprefix("<")
        assert said in kernel, text
        kernel = kernel.replace(said, say(i, when) + said if text != said else said + say(i, when))
    kernel = kernel.replace("buffer = 0;", "buffer = 0, seen = 0;")
    first = TOLD[0][2]
    kernel = kernel.replace(first, f"{first}const u64 began = ticks();\n")
    end = kernel.rindex("}")
    last = say(len(TOLD), "threadIdx.x == 0") + say(15, "threadIdx.x == 0").replace("now()", "ticks() - began")
    return f'{head}extern "C" __global__{kernel[:end]}{last}}}\n'


class Chain:
    """Layers of one model and what stands between their GEMMs."""

    def __init__(self, model: str, layers: int, rank: int = 0) -> None:
        self.shapes = SHAPES[model]
        self.made = [{n: layer(*s, "cuda", rank)[0] for n, s in self.shapes.items()} for _ in range(layers)]
        self.hidden = self.shapes["o"][0]
        self.told = torch.zeros(4 * layers, 256, 16, dtype=torch.int64, device="cuda")
        self.says = self.told[0]  # where the next GEMM says its times
        self.weights = torch.rand(2, self.hidden, device="cuda").bfloat16() + 0.5

    def start(self, rows: int) -> Tensor:
        torch.manual_seed(rows)
        return torch.randn(rows, self.hidden, device="cuda").bfloat16()

    def __call__(self, variant: Variant, start: Tensor) -> Tensor:
        rows, early, hidden, told = len(start), variant.early, start, iter(self.told)
        (wide, _), (_, q), (_, ff) = (self.shapes[n] for n in ("qkv", "o", "down"))

        def product(made: Any, name: str, x: Tensor) -> Tensor:
            one = made[name]
            if variant.forms is None:
                return gemm(one, x, 0)
            tiles = stream_gemm.tiles_for(rows, variant.forms)
            weights = (one.weight, one.weight_scale, one.weight_global_scale)
            if variant.told:
                self.says = next(told)
            low_rank = (one.a, one.b) if variant.rank and not variant.beside else None
            n = one.output_size_per_partition
            y = stream_gemm.launch(tiles, variant.forms[tiles], x, None, *weights, n, low_rank)
            linear = torch.nn.functional.linear
            return y + linear(linear(x, one.a), one.b) if variant.beside else y

        def normed(x: Tensor) -> Tensor:
            nonlocal hidden
            out, after, block = torch.empty_like(x), torch.empty_like(x), triton.next_power_of_2(self.hidden)
            norms[(rows,)](
                x,
                hidden,
                *self.weights,
                out,
                after,
                self.hidden,
                BLOCK=block,
                EARLY=early,
                num_warps=8,
                launch_pdl=True,
            )
            hidden = after
            return out

        x = normed(start)
        for made in self.made:
            x = product(made, "qkv", x)
            queries, attended = x.new_empty(rows, q), x.new_empty(rows, q)
            heads[(rows, q // HEAD)](x, queries, wide, q, HEAD=HEAD, EARLY=early, num_warps=2, launch_pdl=True)
            attention[(rows * q // 1024,)](queries, attended, BLOCK=1024, num_warps=4)
            x = product(made, "gate_up", normed(product(made, "o", attended)))
            y = x.new_empty(rows, ff)
            grid = (triton.cdiv(y.numel(), 1024),)
            activation[grid](x, y, y.numel(), ff, BLOCK=1024, EARLY=early, num_warps=4, launch_pdl=True)
            x = normed(product(made, "down", y))
        return x


def timed(chain: Chain, variant: Variant, rows: int) -> tuple[float, list[Tensor]]:
    """Microseconds of a replay, and what the chain gave when run as it is and as a graph."""
    x, ended = chain.start(rows), []
    return graph_us(lambda: ended.append(chain(variant, x)), 21), ended


def where(chain: Chain, variant: Variant, rows: int) -> dict[str, dict[str, list[float]]]:
    """Of the second layer's GEMMs: us after the GEMM before had ended, of the first, the median and the last block."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    x = chain.start(rows)
    graph = torch.cuda.CUDAGraph()
    chain(variant, x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        chain(variant, x)
    for _ in range(12):
        chain.told.zero_()
        graph.replay()
        all_times = chain.told.cpu()
        for i, name in enumerate(chain.shapes, 4):
            before, mine = all_times[i - 1], all_times[i]
            ended = before[:, len(TOLD)].max()
            for j, what in enumerate([*(what for what, _, _ in TOLD), "ends"]):
                if not (mine[:, j] > 0).any():
                    continue
                us = (mine[:, j][mine[:, j] > 0] - ended).sort().values / 1000
                found.setdefault(name, {}).setdefault(what, []).append(
                    [us[0].item(), us.median().item(), us[-1].item()]
                )
            clock = mine[:, 15] / (mine[:, len(TOLD)] - mine[:, 0]).clamp(min=1) * 1000
            found[name].setdefault("MHz", []).append([clock[mine[:, 15] > 0].median().item()])
    return {
        name: {what: [round(sorted(v)[len(v) // 2], 1) for v in zip(*times, strict=True)] for what, times in by.items()}
        for name, by in found.items()
    }


class Check:
    """One GEMM, shared by many blocks, against float64 and against the bits of the form in use."""

    def __init__(self, n: int, k: int) -> None:
        torch.manual_seed(n)
        self.made, before = layer(n, k, "cuda")
        e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device="cuda")
        nibbles = torch.stack([before.codes & 15, before.codes >> 4], -1).flatten(1).long()
        w = torch.cat([e2m1, -e2m1])[nibbles] * before.scale.double().repeat_interleave(16, 1) * GLOBAL_SCALE
        self.x = torch.randn(128, k, device="cuda").bfloat16()
        self.wanted = self.x.double() @ w.T
        self.marlin = self.error(gemm(self.made, self.x, 0))
        self.bits: dict[tuple[Any, ...], Tensor] = {}

    def error(self, y: Tensor) -> float:
        wanted = self.wanted[: len(y)]
        return float(((y.double() - wanted).norm() / wanted.norm()).item())

    def __call__(self, tiles: int, form: Form) -> list[str]:
        said, one = [], self.made
        weights = (one.weight, one.weight_scale, one.weight_global_scale)
        order = (form.groups, form.sharing)  # wgmma and mma may round differently: seen here
        few = range(1, 8 * tiles + 1) if tiles < 3 else {1, 5, 8 * tiles - 5, 8 * tiles}
        for rows in sorted(few):
            x = self.x[:rows].contiguous()
            y = stream_gemm.launch(tiles, form, x, None, *weights, one.output_size_per_partition)
            if (error := self.error(y)) > self.marlin * 1.05:
                said.append(f"{rows} rows of {tiles}: error {error:.1e}, Marlin's {self.marlin:.1e}")
            known = self.bits.setdefault(order, y)
            both = min(len(known), rows)
            if not torch.equal(y[:both], known[:both]):
                said.append(f"{rows} rows of {tiles}: other bits than the first form of this order")
            if rows > len(known):
                self.bits[order] = y
        return said


def run(part: str, layers: int, asked_rows: set[int], out: Path, ready: Any, go: Any) -> None:
    """One part of the forms, in a process of its own: what needs no card, then, when told, the rest."""
    import vllm.model_executor.layers.quantization.utils.marlin_utils_fp4  # noqa: F401

    variants = PARTS[part]
    wanted = {text_of(v, t): v.forms[t] for v in variants.values() if v.forms for t in used_by(v)}

    def compiled(text: str) -> bytes | str:
        try:
            return cuda.compiled(text, "sm_90a" if wanted[text].wgmma else "sm_90")
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        codes = dict(zip(wanted, pool.map(compiled, wanted), strict=True))
    ready.set()
    go.wait()
    report: dict[str, Any] = {"card": torch.cuda.get_device_name(), "us": {}, "told": {}, "wrong": {}, "seconds": {}}

    def say() -> None:
        out.write_text(json.dumps(report))

    kernels: dict[Any, Any] = {}

    current: Variant | None = None

    def kernel(tiles: int, scaled: bool, form: Form, rank: int, gelu: bool) -> Any:
        text = text_of(current, tiles)  # type: ignore[arg-type]
        if text not in kernels:
            code = codes[text]
            if isinstance(code, str):
                raise RuntimeError(code)
            kernels[text] = loaded(tiles, form, code, rank)
        return partial(saying, kernels[text]) if current.told else kernels[text]  # type: ignore[union-attr]

    def saying(made: Any, args: list[Any], **rest: Any) -> None:
        at = chains[current.model].says  # type: ignore[union-attr]
        made(args=[*args[:-7], at, *args[-7:]], **rest)

    stream_gemm.kernel = kernel  # type: ignore[assignment]
    start = time.time()
    models = {v.model for v in variants.values()}
    rank = max(v.rank for v in variants.values())
    chains = {m: Chain(m, layers if m == "31B" else 2 * layers, rank) for m in models}
    check = Check(*SHAPES[min(models)]["o"])
    report["seconds"]["start"] = round(time.time() - start, 1)
    results: dict[Any, Tensor] = {}

    def measure(name: str, v: Variant, wrong: list[str]) -> None:
        if v.told:
            for rows in v.rows:
                report["told"].setdefault(name, {})[rows] = where(chains[v.model], v, rows)
            return
        if not v.without and not v.rank and v.model == min(models):
            for tiles in sorted(used_by(v)):
                wrong += check(tiles, v.forms[tiles])  # type: ignore[index]
        for rows in [r for r in v.rows if not asked_rows or r in asked_rows]:
            chain = chains[v.model]
            us, ended = timed(chain, v, rows)
            report["us"].setdefault(v.model, {}).setdefault(rows, {})[name] = round(us / len(chain.made), 1)
            form = v.forms[stream_gemm.tiles_for(rows, v.forms)] if v.forms else None
            order = form and not v.without and (form.groups, form.sharing, v.rank, v.beside)
            known = results.setdefault((v.model, rows, order), ended[0].clone())
            if order and not all(torch.equal(y, known) for y in ended):
                wrong.append(f"chain of {rows} rows: another result")

    for name, v in variants.items():
        start, wrong, current = time.time(), [], v
        try:
            measure(name, v, wrong)
        except RuntimeError as error:  # a form that the card does not take
            wrong.append(str(error).partition("\n")[0])
        if wrong:
            report["wrong"][name] = wrong
        report["seconds"][name] = round(time.time() - start, 1)
        say()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rows", default="", help="of those that a form takes; all if empty")
    parser.add_argument("--layers", type=int, default=3, help="of 31B; twice as many of a smaller model")
    parser.add_argument("--seconds", type=float, default=85, help="of all parts together")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    rows, start = {int(r) for r in asked.rows.split(",") if r}, time.time()
    spawn = multiprocessing.get_context("spawn")
    started = []
    for i, name in enumerate(asked.parts.split(",")):
        part, ready, go = asked.out.with_suffix(f".{i}.part"), spawn.Event(), spawn.Event()
        child = spawn.Process(target=run, args=(name, asked.layers, rows, part, ready, go))
        child.start()
        started.append((name, part, ready, go, child))
    results: dict[str, Any] = {}
    for i, (name, part, ready, go, child) in enumerate(started):
        ready.wait(max(1.0, asked.seconds - (time.time() - start)))
        begun = time.time()
        left = asked.seconds - (begun - start)
        go.set()
        child.join(max(3.0, min(left, 2 * left / (len(started) - i))))
        said = "" if child.exitcode == 0 else f"ended with {child.exitcode}"
        if child.is_alive():
            said = "did not end"
            child.kill()
            child.join()
        found = results[name] = json.loads(part.read_text()) if part.exists() else {}
        part.unlink(missing_ok=True)
        print(f"== {name}: ready at {begun - start:.0f} s, {time.time() - begun:.0f} s {said} {found.get('card')}")
        for model, by_rows in found.get("us", {}).items():
            for count, us in by_rows.items():
                print(f"  {model} {count:>3} rows:", "; ".join(f"{v} {t}" for v, t in us.items()), flush=True)
        for variant, by_rows in found.get("told", {}).items():
            for count, by_gemm in by_rows.items():
                print(
                    f"  {variant}, {count} rows: us after the GEMM before, of the first, the median and the last block"
                )
                for gemm_name, times in by_gemm.items():
                    print(f"    {gemm_name}:", "; ".join(f"{what} {t}" for what, t in times.items()), flush=True)
        for variant, wrong in found.get("wrong", {}).items():
            print("  WRONG", variant, *wrong, sep="\n    ", flush=True)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
