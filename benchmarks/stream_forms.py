"""Forms of the streaming NVFP4 kernel side by side with vLLM's Marlin: right, independent of other rows, and how fast.

    python benchmarks/stream_forms.py --out stream-forms.json

Needs a Hopper card and vLLM 0.19.1. Every form runs in a process of its own, so that one that hangs or faults ends
alone; all of them are compiled side by side first. A large error, or a row whose bits depend on the others, is reported
and ends nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from target_gemm import GLOBAL_SCALE, SHAPES, graph_us, layer

from vllm_gemma4_spec.kernels import chosen_rows, cuda, stream_gemm
from vllm_gemma4_spec.kernels.stream_gemm import Form

ROWS = (1, 4, 8, 16, 32, 64, 80, 128)


def forms(stages: dict[int, int], **rest: Any) -> dict[int, Form]:
    return {tiles: Form(count, **rest) for tiles, count in stages.items()}


W = {"wgmma": True}
FORMS: dict[str, dict[int, Form]] = {
    "mma": stream_gemm.MMA_FORMS,
    "mma-deep": forms({1: 8, 2: 8, 4: 6, 8: 5}),
    "wgmma": stream_gemm.WGMMA_FORMS,
    "wgmma-deep": forms({1: 8, 2: 8, 4: 6, 8: 5}, **W),
    "wgmma-whole": forms({1: 8, 2: 8, 4: 8, 8: 6, 10: 5, 16: 4}, groups=1, **W),
    # What reading alone takes: the same without decoding, and results that mean nothing.
    "no-decoding": forms({1: 8}, **W),
}


def text(name: str, tiles: int, form: Form) -> str:
    source = stream_gemm.source(tiles, False, form)
    if name != "no-decoding":
        return source
    head, tail = source.split("a[q][0] = ", 1)
    return f"{head}for (int i = 0; i < 4; i++) a[q][i] = word + both + high;\n}}\n{tail.split('}', 1)[1]}"


def loaded(tiles: int, form: Form, code: bytes, rank: int = 0) -> Any:
    made = cuda.Kernel.__new__(cuda.Kernel)
    made._load(code, "nvfp4_stream", overlaps=True)
    made.allow_shared(stream_gemm.shared_bytes(tiles, form, rank))
    return made


def gemm(by: dict[int, Form] | None, made: Any, x: torch.Tensor) -> torch.Tensor:
    n = made.output_size_per_partition
    if by is None:
        weights = (made.weight, made.weight_scale, made.weight_global_scale, made.workspace)
        return stream_gemm.linear(x, None, *weights, n, 0)
    tiles = stream_gemm.tiles_for(len(x), by)
    return stream_gemm.launch(tiles, by[tiles], x, None, made.weight, made.weight_scale, made.weight_global_scale, n)


def check(by: dict[int, Form] | None, shapes: dict[str, tuple[int, int]], most: int) -> dict[str, Any]:
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device="cuda")
    found: dict[str, Any] = {}
    for name, (n, k) in shapes.items():
        torch.manual_seed(n)
        made, before = layer(n, k, "cuda")
        nibbles = torch.stack([before.codes & 15, before.codes >> 4], -1).flatten(1).long()
        w = torch.cat([e2m1, -e2m1])[nibbles] * before.scale.double().repeat_interleave(16, 1) * GLOBAL_SCALE
        x = torch.randn(most, k, device="cuda").bfloat16()
        wanted = x.double() @ w.T
        whole = {
            rows: gemm(by, made, x[:rows].contiguous())
            for rows in (1, 4, 5, 8, 13, 16, 32, 33, 64, 80, 128)
            if rows <= most
        }
        among = {r: y for r, y in whole.items() if r <= 64}
        found[name] = {
            "error": {
                r: round(((y.double() - wanted[:r]).norm() / wanted[:r].norm()).item(), 6) for r, y in whole.items()
            },
            "bits_of_64": [r for r, y in among.items() if torch.equal(y, whole[min(64, most)][:r])],
            "bits_of_80_are_64s": most >= 80 and torch.equal(whole[80][:64], whole[64]),
            "steady": all(torch.equal(gemm(by, made, x[:r].contiguous()), y) for r, y in whole.items()),
        }
    return found


def read_speed() -> float:
    big = torch.empty(2**28, dtype=torch.float32, device="cuda")
    return round(2**30 / graph_us(lambda: torch.sum(big.view(1024, -1), 1)) / 1e6, 2)


def run(name: str, models: list[str], out: Path, ready: Any, go: Any) -> None:
    """One form, in a process of its own: everything that needs no card, then, when told, the rest."""
    import vllm.model_executor.layers.quantization.utils.marlin_utils_fp4  # noqa: F401

    by = FORMS.get(name)
    report: dict[str, Any] = {"form": name, "us": {}}
    codes: dict[int, bytes] = {}
    for tiles, form in (by or {}).items():
        start = time.time()
        codes[tiles] = cuda.compiled(text(name, tiles, form), "sm_90a" if form.wgmma else "sm_90")
        report.setdefault("compile_s", {})[tiles] = round(time.time() - start, 1)
    ready.set()
    go.wait()
    report["card"], report["read_TB_s"] = torch.cuda.get_device_name(), read_speed()
    for tiles, code in codes.items():
        _KERNELS[tiles, by[tiles]] = loaded(tiles, by[tiles], code)  # type: ignore[index]
    stream_gemm.kernel = lambda tiles, scaled, form, *_: _KERNELS[tiles, form]  # type: ignore[assignment]
    most = 128 if by is None else 8 * max(by)

    def say() -> None:
        out.write_text(json.dumps(report))

    for model in models:
        shapes = {n: s for n, s in SHAPES[model].items() if not s[0] % 64 and not s[1] % 64}
        if by is not None and name != "no-decoding":
            report.setdefault("check", {})[model] = check(by, shapes, most)
            say()
        made = [{n: layer(*s, "cuda")[0] for n, s in shapes.items()} for _ in range(3 if model == "31B" else 12)]
        if by is stream_gemm.WGMMA_FORMS:  # as a start of the engine measures them
            start = time.time()
            times = {n: stream_gemm._times(made[0][n]) for n in shapes}
            report.setdefault("chosen", {})[model] = {n: chosen_rows.described(t) for n, t in times.items()}
            report["chosen"][model]["seconds"] = round(time.time() - start, 2)
        for rows in [r for r in ROWS if r <= most]:
            inputs = {n: torch.randn(rows, k, device="cuda").bfloat16() for n, (_, k) in shapes.items()}
            here = report["us"].setdefault(model, {}).setdefault(rows, {})
            for names in [list(shapes), *([n] for n in shapes)]:

                def call(names: list[str] = names, inputs: Any = inputs, made: Any = made) -> None:
                    for layers in made:
                        for n in names:
                            gemm(by, layers[n], inputs[n])

                here[names[0] if len(names) == 1 else "layer"] = round(graph_us(call, 9) / len(made), 1)
            say()


_KERNELS: dict[Any, Any] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default="marlin,wgmma-deep,wgmma,no-decoding,mma-deep,wgmma-whole,mma")
    parser.add_argument("--models", default="31B,E4B,26B-A4B", help="of Marlin and of the kernel as it is used")
    parser.add_argument("--seconds", type=float, default=100, help="of all forms together")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    names, models, start = asked.forms.split(","), asked.models.split(","), time.time()
    spawn = multiprocessing.get_context("spawn")
    started = []
    for name in names:
        part, ready, go = asked.out.with_suffix(f".{name}.part"), spawn.Event(), spawn.Event()
        mine = models if name in ("marlin", "wgmma") else models[:1]
        child = spawn.Process(target=run, args=(name, mine, part, ready, go))
        child.start()
        started.append((name, part, ready, go, child))
    results: dict[str, Any] = {}
    for i, (name, part, ready, go, child) in enumerate(started):
        ready.wait(max(1.0, asked.seconds - (time.time() - start)))
        begun, left = time.time(), asked.seconds - (time.time() - start)
        go.set()
        child.join(max(3.0, min(left, 2 * left / (len(names) - i))))
        said = "" if child.exitcode == 0 else f"ended with {child.exitcode}"
        if child.is_alive():
            said = "did not end"
            child.kill()
            child.join()
        results[name] = json.loads(part.read_text()) if part.exists() else {}
        part.unlink(missing_ok=True)
        results[name]["ended"] = said
        print(f"== {name}: ready at {begun - start:.0f} s, {time.time() - begun:.0f} s", said, flush=True)
        print("  ", *(results[name].get(key) for key in ("card", "read_TB_s", "compile_s", "chosen")))
        for model, found in results[name].get("check", {}).items():
            for gemm_name, checked in found.items():
                print(" ", model, gemm_name, json.dumps(checked), flush=True)
        for model, us in results[name].get("us", {}).items():
            for rows, row in us.items():
                print(" ", model, f"{rows:>4} rows", json.dumps(row), flush=True)
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
