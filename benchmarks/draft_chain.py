"""The few-row NVFP4 GEMMs of an E4B draft pass: forms and launches alone, then in a chain of 42 layers.

    python benchmarks/draft_chain.py --out draft-chain.json

Needs a Hopper card. Each group of forms runs in a process of its own, so that one that hangs or fails ends alone:
errors to float64, then microseconds in a CUDA graph with weights from memory. The last process runs a whole pass's
layers, small kernels between GEMMs launched as torch.compile launches them with ``triton.enable_pdl``, with what was
fastest alone.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_gemma4_spec.kernels import cuda, gated_input, packing, small_batch_gemm
from vllm_gemma4_spec.kernels.small_batch_gemm import Form, Launch

GEMMS = {
    "gate_up": (20480, 2560, True),
    "down": (2560, 10240, False),
    "qkv": (3072, 2560, False),
    "o": (2560, 2048, False),
    "gate": (256, 2560, False),
    "projection": (2560, 256, False),
}
MULTIPROCESSORS = 132
OLD = "before change 60"
WIDE = Form(1, 2, roll=True)
_40 = Form(5, 2, roll=True, fit=3)


def named(*forms: Form) -> dict[str, Form]:
    return {str(f) + "r" * f.roll: f for f in forms}


# Groups of forms, and the numbers of rows that they are for.
GROUPS: dict[str, tuple[tuple[int, ...], dict[str, Form]]] = {
    "few": (
        (1, 5, 8),
        {OLD: Form(1)}
        | named(
            Form(1),
            Form(1, whole=True),
            Form(1, chains=2),
            Form(1, whole=True, chains=2),
            WIDE,
            replace(WIDE, chains=2),
            replace(WIDE, whole=True),
        ),
    ),
    "some": (
        (16, 20),
        named(
            Form(1),
            Form(1, whole=True, chains=2),
            WIDE,
            Form(2),
            Form(2, whole=True),
            Form(2, chains=2),
            Form(2, 2),
            Form(2, 2, chains=2),
            Form(3),
            Form(3, 2),
        ),
    ),
    "many": ((80,), named(Form(2, 2), Form(2, 2, chains=2), _40)),
}


def launches(n: int, k: int, form: Form, chunks: int, gelu: bool) -> list[Launch]:
    """The plan's first, then others that cut a GEMM up otherwise."""
    found = [small_batch_gemm.plan(n, k, form, chunks, gelu, MULTIPROCESSORS)]
    blocks, outputs, group = k // packing.COLUMNS, n // packing.ROWS // form.pair, 2 if gelu and form.pair == 1 else 1
    for parts in (1, 4):
        for split in (1, 2, 4, 5, 8, 10):
            if -(-blocks // (split * parts)) * split * parts > 1.25 * blocks:
                continue
            for slots in (group, 2 * group, 4 * group):
                how = Launch(split * slots, split, parts)
                warps = outputs * split * parts * chunks / MULTIPROCESSORS
                if how.warps > form.most_warps or outputs % slots or not (how.warps > 2 or warps < 4):
                    continue
                if 9 <= warps <= 52 or (n * k < 2**23 and warps > 1):
                    found.append(how)
    return list(dict.fromkeys(found))


def graph_us(call: Any, calls: int, repeat: int = 5) -> float:
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


class OldKernel:
    """The kernel as it was before change 60: tiles along x, parts along y."""

    def __init__(self, code: bytes) -> None:
        self.kernel = load(code)

    def __call__(self, grid: tuple[int, int, int], block: int, args: Any, shared_bytes: int) -> None:
        self.kernel(grid, block, args[:-1], shared_bytes)


def load(code: bytes, name: str = "nvfp4_rows") -> Any:
    kernel = cuda.Kernel.__new__(cuda.Kernel)
    kernel._load(code, name, overlaps=True)
    return kernel


def text_of(label: str, form: Form, gelu: bool) -> str:
    if label == OLD:
        old = Path(__file__).with_name("old_rows.cu").read_text()
        return f"#define MT 1\n#define GELU {int(gelu)}\n#define SCALED 0\n{old}"
    return small_batch_gemm.source(form, gelu, False)


class Forms:
    """Compiled forms by name."""

    def __init__(self, forms: dict[str, Form]) -> None:
        self.forms, self.wrong = forms, []
        wanted = [(label, gelu) for label in forms for gelu in (False, True)]

        def compiled(what: tuple[str, bool]) -> bytes | str:
            try:
                return cuda.compiled(text_of(what[0], forms[what[0]], what[1]), "sm_90")
            except RuntimeError as error:
                return str(error)

        with ThreadPoolExecutor(8) as pool:
            self.codes = dict(zip(wanted, pool.map(compiled, wanted), strict=True))

    def load(self) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self.kernels: dict[Any, Any] = {}
        for (label, gelu), code in self.codes.items():
            if isinstance(code, str):
                self.wrong.append(f"{label}: {code[:200]}")
            elif label == OLD:
                self.kernels[label, gelu] = OldKernel(code)
            else:
                self.kernels[label, gelu] = load(code)
        small_batch_gemm.SCRATCH.reserve(torch.device("cuda", 0), 4 * 128 * 20480 * 4, 1280 * 16)

    def __call__(self, label: str, how: Launch | None, x: Tensor, w: Any, gelu: bool) -> Tensor:
        small_batch_gemm._kernel = lambda *_: self.kernels[label, gelu]  # type: ignore[assignment]
        return small_batch_gemm.gemm(x, *w, gelu, None, self.forms[label], how)


def random_weights(n: int, k: int) -> list[Tensor]:
    codes = torch.randint(-(2**31), 2**31 - 1, (n // 16, k // 256, 4, 32, 4), dtype=torch.int32, device="cuda")
    scales = torch.randint(60, 110, (n // 16, k // 256, 32, 8), dtype=torch.uint8, device="cuda")
    return [codes, scales, torch.tensor([0.001], device="cuda")]


class Checked:
    """A GEMM with its result in float64."""

    def __init__(self, n: int, k: int, gelu: bool) -> None:
        torch.manual_seed(n + k)
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scale = (torch.rand(n, k // 16, device="cuda") * 400 + 0.1).to(torch.float8_e4m3fn)
        self.w = [*packing.pack(codes, scale), torch.tensor([0.01], device="cuda")]
        e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device="cuda")
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()
        w = torch.cat([e2m1, -e2m1])[nibbles] * scale.double().repeat_interleave(16, 1) * 0.01
        self.dense = w
        self.x = torch.randn(80, k, device="cuda").bfloat16() / 64
        self.wanted = self.x.double() @ w.T
        if gelu:
            gate, up = self.wanted.chunk(2, -1)
            self.wanted = torch.nn.functional.gelu(gate, approximate="tanh") * up

    def error(self, y: Tensor) -> float:
        wanted = self.wanted[: len(y)]
        return float(((y.double() - wanted).norm() / wanted.norm()).item())


def run_group(name: str, seconds: float, out: Path, before: Path, ready: Any, go: Any) -> None:
    rows_of, forms = GROUPS[name]
    made = Forms(forms)
    ready.set()
    go.wait()
    begun = time.time()
    made.load()
    gc.collect()
    gc.freeze()
    report: dict[str, Any] = {"us": {}, "errors": {}, "wrong": made.wrong}
    checked, copies = {}, {}
    for gemm, (n, k, gelu) in GEMMS.items():
        checked[gemm] = Checked(n, k, gelu)
        copies[gemm] = [random_weights(n, k) for _ in range(max(4, min(16, 100_000_000 // (n * k * 9 // 16))))]
    report["start_s"] = round(time.time() - begun, 1)
    for rows in rows_of:
        for gemm, (n, k, gelu) in GEMMS.items():
            one, here = checked[gemm], {}
            x = one.x[:rows].contiguous()
            for label, form in forms.items():
                if (label, gelu) not in made.kernels or n // 16 % form.pair:
                    continue
                if time.time() > begun + seconds:
                    report["wrong"].append(f"no time for {rows} {gemm} {label}")
                    continue
                some = launches(n, k, form, form.chunks(rows), gelu)
                if name != "few" and rows == 20:
                    some = some[:1]
                if rows != rows_of[0] and report["us"].get(str(rows_of[0]), {}).get(gemm, {}).get(label):
                    first = report["us"][str(rows_of[0])][gemm][label]
                    some = [some[0], *(Launch(*h) for _, h in first[1:4] if rows < 16)] if rows < 16 else some
                if label == OLD:
                    some = some[:1]
                us = []
                for how in dict.fromkeys(some):
                    try:
                        error = one.error(made(label, how, x, one.w, gelu))
                        if not error < (0.0045 if gelu else 0.0025):
                            report["wrong"].append(f"{rows} {gemm} {label} {how}: error {error:.1e}")
                            continue

                        def each(how: Launch = how, label: str = label, gemm: str = gemm, x: Tensor = x) -> None:
                            for w in copies[gemm]:
                                made(label, how, x, w, GEMMS[gemm][2])

                        us.append((graph_us(each, len(copies[gemm])), (how.warps, how.split, how.parts)))
                        report["errors"][gemm] = max(report["errors"].get(gemm, 0), round(error, 6))
                    except RuntimeError as wrong:
                        report["wrong"].append(f"{rows} {gemm} {label} {how}: {str(wrong).splitlines()[0]}")
                if us:
                    here[label] = [us[0], *sorted(us)]
            report["us"].setdefault(str(rows), {})[gemm] = here
            print(f"{name} {rows:>2} rows {gemm:<10}", flush=True)
            for label, us in sorted(here.items(), key=lambda i: i[1][1][0]):
                best = "; ".join(f"{u} {'/'.join(map(str, h))}" for u, h in us[1:4])
                print(f"    {label:<18} {us[0][0]:>6} as planned; best {best}", flush=True)
            out.write_text(json.dumps(report))
    for line in report["wrong"][:20]:
        print("WRONG", line, flush=True)
    report["seconds"] = round(time.time() - begun, 1)
    out.write_text(json.dumps(report))


TWO = "two kernels"
GATED = named(Form(1), Form(1, chains=2, whole=True), Form(1, 2), Form(2))


def load_gated() -> dict[str, Any]:
    """The kernel of the per-layer input, by form, and the gate's that multiplies."""
    texts = {label: gated_input.source(form) for label, form in GATED.items()}
    texts[TWO] = small_batch_gemm.source(Form(1), 2, False)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(texts, pool.map(lambda text: cuda.compiled(text, "sm_90"), texts.values()), strict=True))


def run_gated(name: str, seconds: float, out: Path, before: Path, ready: Any, go: Any) -> None:
    codes = load_gated()
    ready.set()
    go.wait()
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    kernels = {label: load(code, "nvfp4_rows" if label == TWO else "nvfp4_gated") for label, code in codes.items()}
    small_batch_gemm.SCRATCH.reserve(torch.device("cuda", 0), 1, 1)
    report: dict[str, Any] = {"us": {}, "wrong": []}
    for k in (2560, 1536):
        gate, up = Checked(256, k, False), Checked(k, 256, False)
        copies = [(random_weights(256, k), random_weights(k, 256)) for _ in range(42)]
        for rows in (1, 5, 8, 16, 20, 80):
            torch.manual_seed(rows)
            by = torch.randn(rows, 42, 256, device="cuda").bfloat16()[:, 3]
            x = gate.x[:rows].contiguous()
            inner = torch.nn.functional.gelu((x.double() @ gate.dense.T).bfloat16().float(), approximate="tanh") * by
            wanted = inner.bfloat16().double() @ up.dense.T
            small_batch_gemm._kernel = lambda *_: kernels[TWO]  # type: ignore[assignment]
            y = small_batch_gemm.gemm(x, *gate.w, form=Form(1), by=by)
            error = float(((y.double() - inner).norm() / inner.norm()).item())
            if not error < 0.004:
                report["wrong"].append(f"{k} {rows} {TWO}: error {error:.1e}")
            for label, form in GATED.items():
                try:
                    gated_input._kernel = lambda _, label=label: kernels[label]  # type: ignore[assignment]
                    y = gated_input.gated(x, by, tuple(gate.w), tuple(up.w), form)
                    error = float(((y.double() - wanted).norm() / wanted.norm()).item())
                    if not error < 0.004:
                        report["wrong"].append(f"{k} {rows} {label}: error {error:.1e}")

                    def each(form: Form = form, x: Tensor = x, by: Tensor = by, copies: Any = copies) -> None:
                        for one, other in copies:
                            gated_input.gated(x, by, tuple(one), tuple(other), form)

                    report["us"].setdefault(f"{rows} rows {k}", {})[label] = graph_us(each, len(copies))
                except RuntimeError as wrong:
                    report["wrong"].append(f"{k} {rows} {label}: {str(wrong).splitlines()[0]}")
            print("gated", k, rows, "rows", report["us"].get(f"{rows} rows {k}"), f"error {error:.1e}", flush=True)
            out.write_text(json.dumps(report))
    for line in report["wrong"][:20]:
        print("WRONG", line, flush=True)


Choice = dict[str, tuple[str, Launch | None]]


def run_chain(name: str, seconds: float, out: Path, before: Path, ready: Any, go: Any) -> None:
    import triton
    import triton.language as tl  # noqa: F401
    from layer_chain import attention, heads, norms

    made = Forms({label: form for _, forms in GROUPS.values() for label, form in forms.items()})
    gated_codes = load_gated()
    ready.set()
    go.wait()
    begun = time.time()
    made.load()
    kernels = {
        label: load(code, "nvfp4_rows" if label == TWO else "nvfp4_gated") for label, code in gated_codes.items()
    }
    gc.collect()
    gc.freeze()
    alone = json.loads(before.read_text()) if before.exists() else {}
    layers = [{g: random_weights(n, k) for g, (n, k, _) in GEMMS.items()} for _ in range(42)]
    hidden = 2560
    weights = torch.rand(2, hidden, device="cuda").bfloat16() + 0.5
    block = triton.next_power_of_2(hidden)
    report: dict[str, Any] = {"us": {}, "wrong": made.wrong, "start_s": round(time.time() - begun, 1)}

    def chain(choice: Choice, rows: int, without: tuple[str, ...], early: bool) -> None:
        after = torch.randn(rows, hidden, device="cuda").bfloat16()
        ple = torch.randn(rows, 256, device="cuda").bfloat16()

        def gemm(layer: dict[str, list[Tensor]], which: str, x: Tensor) -> Tensor:
            if which in without:
                n, _, gelu = GEMMS[which]
                return x.new_empty(rows, n // 2 if gelu else n)
            label, how = choice[which]
            return made(label, how, x, layer[which], GEMMS[which][2])

        def normed(x: Tensor, what: str) -> Tensor:
            nonlocal after
            if what in without:
                return x[:, :hidden]
            y, new = torch.empty_like(x), torch.empty_like(x)
            norms[(rows,)](x, after, *weights, y, new, hidden, BLOCK=block, EARLY=early, num_warps=8, launch_pdl=True)
            after = new
            return y

        whole = next((w for w in without if w in kernels), None)
        if whole in GATED:
            gated_input._kernel = lambda _: kernels[whole]  # type: ignore[assignment]
        x = normed(after, "")
        for layer in layers:
            x = gemm(layer, "qkv", x)
            q, attended = x.new_empty(rows, 2048), x.new_empty(rows, 2048)
            if "heads" not in without:
                heads[(rows, 8)](x, q, 3072, 2048, HEAD=256, EARLY=early, num_warps=2, launch_pdl=True)
            for _ in range(1 + ("attention" not in without)):
                attention[(rows * 2,)](q, attended, BLOCK=1024, num_warps=4)
            x = normed(gemm(layer, "o", attended), "norm 2")
            x = normed(gemm(layer, "down", gemm(layer, "gate_up", x)), "norm 3")
            if whole == TWO:
                small_batch_gemm._kernel = lambda *_: kernels[TWO]  # type: ignore[assignment]
                x = small_batch_gemm.gemm(x, *layer["gate"], form=Form(1), by=ple)
                x = normed(gemm(layer, "projection", x), "norm 1")
                continue
            if whole:
                x = gated_input.gated(x, ple, tuple(layer["gate"]), tuple(layer["projection"]), GATED[whole])
                x = normed(x, "norm 1")
                continue
            x = gemm(layer, "gate", x)
            if "act" not in without:
                y = torch.empty_like(x)
                gated[(triton.cdiv(x.numel(), 512),)](
                    x, ple, y, x.numel(), BLOCK=512, EARLY=early, num_warps=4, launch_pdl=True
                )
                x = y
            x = normed(gemm(layer, "projection", x), "norm 1")

    gated = gated_kernel()

    def best(rows: int, groups: tuple[str, ...], labels: tuple[str, ...] = (), planned: bool = False) -> Choice:
        found: Choice = {}
        for gemm in GEMMS:
            every = [
                (us[0] if planned else us[1], label)
                for group in groups
                for label, us in alone.get(group, {}).get("us", {}).get(str(rows), {}).get(gemm, {}).items()
                if not labels or label in labels
            ]
            (_, how), label = min(every, key=lambda e: e[0][0])
            found[gemm] = (label, Launch(*how))
        return found

    def measure(what: str, rows: int, choose: Any, without: tuple[str, ...] = (), early: bool = False) -> None:
        if time.time() > begun + seconds:
            report["wrong"].append(f"no time for {what} {rows}")
            return
        try:
            choice = choose()
            us = graph_us(functools.partial(chain, choice, rows, without, early), 42, 7)
        except (RuntimeError, ValueError) as error:
            report["wrong"].append(f"{what} {rows}: {(str(error).splitlines() or ['?'])[0][:200]}")
            return
        report["us"].setdefault(str(rows), {})[what] = us
        said = "; ".join(
            f"{g} {label}/{how and (how.warps, how.split, how.parts)}" for g, (label, how) in choice.items()
        )
        print(f"chain {rows:>2} rows {us:>7} us a layer  {what:<30} {said if not without else ''}", flush=True)
        out.write_text(json.dumps(report))

    def only(label: str) -> Choice:
        return dict.fromkeys(GEMMS, (label, None))

    for again in ("", ", again"):
        for rows in (1, 5):
            for label in GROUPS["few"][1]:
                for early in (False, True):
                    measure(label + ", early" * early + again, rows, functools.partial(only, label), early=early)
            for early in (False, True):
                measure(
                    "best launches" + ", early" * early + again,
                    rows,
                    functools.partial(best, rows, ("few",)),
                    early=early,
                )
        for rows, group in ((1, "few"), (5, "few"), (16, "some"), (20, "some"), (80, "many")):
            for early in (False, True):
                choose = functools.partial(best, rows, (group,), (), True)
                measure("best planned" + ", early" * early + again, rows, choose, early=early)
                for label in (TWO, *GATED):
                    measure(f"gated {label}" + ", early" * early + again, rows, choose, (label,), early)
    for left in (("act",), ("act", "projection"), ("gate_up",), ("down",), ("heads",), ("attention",), tuple(GEMMS)):
        measure(f"without {' '.join(left)}", 1, functools.partial(best, 1, ("few",), (), True), left)
    for line in report["wrong"][:20]:
        print("WRONG", line, flush=True)
    out.write_text(json.dumps(report))


def gated_kernel() -> Any:
    from draft_small import gated

    return gated


PARTS = {**dict.fromkeys(GROUPS, run_group), "gated": run_gated, "chain": run_chain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=60, help="of all parts together")
    parser.add_argument("--out", type=Path, required=True)
    asked, start = parser.parse_args(), time.time()
    spawn, started = multiprocessing.get_context("spawn"), []
    names = asked.parts.split(",")
    for name in names:
        part, ready, go = asked.out.with_suffix(f".{name}.part"), spawn.Event(), spawn.Event()
        share = (asked.seconds - 15) * {"chain": 0.5, "gated": 0.08}.get(name, 0.14)
        child = spawn.Process(target=PARTS[name], args=(name, share, part, asked.out, ready, go))
        child.start()
        started.append((name, part, ready, go, child, share))
    for _, _, ready, _, _, _ in started:  # nothing is measured while another part compiles
        ready.wait(max(1.0, start + 60 - time.time()))
    print(f"all ready at {time.time() - start:.0f} s", flush=True)
    results: dict[str, Any] = {}
    for name, part, _, go, child, share in started:
        go.set()
        child.join(max(3.0, min(share + 15, start + asked.seconds - time.time())))
        said = "" if child.exitcode == 0 else f"ended with {child.exitcode}"
        if child.is_alive():
            said = "did not end in time"
            child.kill()
            child.join()
        results[name] = json.loads(part.read_text()) if part.exists() else {}
        part.unlink(missing_ok=True)
        print(f"== {name} until {time.time() - start:.0f} s {said}", flush=True)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
