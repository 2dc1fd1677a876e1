"""What NVFP4_AWQ costs on a GPU over NVFP4, in one run of some five minutes. Whether it is right: `make test-gpu`.

    python benchmarks/nvfp4_linear.py --out nvfp4.json

Needs vLLM 0.19.1 with CUDA; neither ModelOpt nor a network. Two questions, each in processes of its own, so that one
that fails leaves the other its answer; exit code 1 if an answer is above its limit or missing.

  cost         a decode step of 31B's and of E4B's layers under torch.compile and CUDA graphs, NVFP4_AWQ over NVFP4,
               as it is by default and with VLLM_GEMMA4_SPEC_SCALE_IN_PRODUCT=1
  load         the search for NaN block scales, as a share of loading

``--device cpu --small`` runs everything on a CPU with tiny shapes, as a check of this script: its times mean nothing
and are not judged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROUNDS = 7
LIMIT = 1.0  # percent of a decode step
# Name in the results -> quant_algo of the checkpoint, settings. The first one is what the others are compared with.
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "NVFP4": ("NVFP4", {}),
    "NVFP4_AWQ": ("NVFP4_AWQ", {"VLLM_GEMMA4_SPEC_SCALE_IN_PRODUCT": "0"}),
    "NVFP4_AWQ in GEMM": ("NVFP4_AWQ", {"VLLM_GEMMA4_SPEC_SCALE_IN_PRODUCT": "1"}),
}
# Engines start side by side, so Inductor would tune the same norm differently in each: 2 % of a layer, seen.
SAME_KERNELS = {"TORCHINDUCTOR_DETERMINISTIC": "1"}


class Part:
    """A part in a process of its own; its output goes to a file, the end of which a failure shows."""

    def __init__(
        self, name: str, options: argparse.Namespace, folder: Path, target: Path, settings: Any = (), **how: Any
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        size = "small" if options.small else "full"
        command = [sys.executable, str(HERE / "nvfp4_parts.py"), str(target), options.device, size, *name.split()]
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **dict(settings)}
        env["VLLM_CACHE_ROOT"] = str(folder / f"cache {name}".replace(" ", "-"))  # processes that start side by side
        self.process = subprocess.Popen(command, env=env, stderr=self.log.open("w"), text=True, cwd=HERE.parent, **how)

    def failed(self, why: str) -> dict[str, Any]:
        end = self.log.read_text()[-3000:]
        lines = [line for line in end.splitlines() if line.strip()]
        return {"ok": False, "what": f"FAILED: {why}; {lines[-1][:200] if lines else 'no output'}", "log": end}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def answer(part: Part, target: Path, limit: float) -> dict[str, Any]:
    try:
        code = part.process.wait(max(limit, 1))
    except subprocess.TimeoutExpired:
        part.stop()
        return part.failed(f"longer than {limit:.0f} s")
    if code or not target.exists():
        return part.failed(f"exit code {code}")
    found: dict[str, Any] = json.loads(target.read_text())
    return found


class Decoder:
    """One engine that times decode steps on request."""

    def __init__(self, model: str, variant: str, options: argparse.Namespace, folder: Path) -> None:
        path = folder / f"{model}-{variant}".replace(" ", "-")
        path.mkdir()
        from nvfp4_parts import config

        algorithm, settings = VARIANTS[variant]
        (path / "config.json").write_text(json.dumps(config(model, options.layers, algorithm, options.small)))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.part = Part(f"decoder {path.name}", options, folder, path, settings | SAME_KERNELS, **pipes)

    def read(self, prefix: str) -> str:
        for line in self.part.process.stdout or ():
            if line.startswith(prefix):
                return line.removeprefix(prefix)
        raise RuntimeError(self.part.failed("ended")["what"])

    def step(self, batch: int) -> dict[str, float]:
        assert self.part.process.stdin is not None
        self.part.process.stdin.write(f"{batch}\n")
        self.part.process.stdin.flush()
        found: dict[str, float] = json.loads(self.read("TIME "))
        return found


def cost(engines: dict[str, Decoder], small: bool) -> dict[str, Any]:
    """NVFP4_AWQ over NVFP4 in percent; all engines are up and take turns, so the card is the same for all."""
    out: dict[str, Any] = {}
    for decoder in engines.values():
        decoder.read("READY")
    plain, *others = engines
    for batch in (1, 4):
        rounds = [
            {name: engines[name].step(batch) for name in (order, *(set(engines) - {order}))}
            for order in [*engines] * ROUNDS
        ]
        if any(r[name]["graphs_per_step"] and not 0.9 < r[name]["graphs_per_step"] < 1.2 for r in rounds for name in r):
            raise RuntimeError(f"a step is not one graph: {rounds[-1]}")
        row: dict[str, Any] = {"us": {name: statistics.median(r[name]["us"] for r in rounds) for name in engines}}
        for name in others:
            ratios = [r[name]["us"] / r[plain]["us"] for r in rounds]
            row[name] = {
                "percent": 100 * (statistics.median(ratios) - 1),
                "percent_spread": [100 * (min(ratios) - 1), 100 * (max(ratios) - 1)],
            }
        out[f"batch {batch}"] = row
    worst = {name: max(row[name]["percent"] for row in out.values()) for name in others}
    shown = "; ".join(
        f"{name}: " + ", ".join(f"{row[name]['percent']:+.2f} %" for row in out.values()) for name in others
    )
    steps = ", ".join(f"{row['us'][plain]:.0f}" for row in out.values())
    return {
        "ok": small or min(worst.values()) <= LIMIT,
        "what": f"{shown} of {steps} us at {', '.join(out)} (limit {LIMIT:.0f} % for one of them)",
        **out,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="cost,load")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--layers", type=int, default=12, help="of each model in the cost; a multiple of six")
    parser.add_argument("--limit", type=float, default=480, help="seconds for all parts together")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    wanted = options.parts.split(",")
    start = time.monotonic()
    results: dict[str, Any] = {}

    def report(name: str, found: dict[str, Any]) -> None:
        results[name] = found | {"at_second": round(time.monotonic() - start)}
        print(f"{'pass' if found['ok'] else 'FAIL'}  {name:20s} {found['what']}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))

    with tempfile.TemporaryDirectory(prefix="nvfp4-") as made:
        folder = Path(made)
        pairs = {}
        if "cost" in wanted:
            for model in ("31B", "E4B"):
                pairs[model] = {variant: Decoder(model, variant, options, folder) for variant in VARIANTS}
        started: dict[str, Part] = {}
        decoders = [decoder for pair in pairs.values() for decoder in pair.values()]
        watch = threading.Timer(options.limit, lambda: [decoder.part.process.kill() for decoder in decoders])
        watch.start()  # reading from an engine that hangs would wait for ever
        left = lambda: options.limit - (time.monotonic() - start)  # noqa: E731
        try:
            for model, pair in pairs.items():
                try:
                    report(f"cost {model}", cost(pair, options.small))
                except (RuntimeError, OSError, ValueError) as error:
                    ends = {a: d.part.failed("")["log"] for a, d in pair.items()}
                    report(f"cost {model}", {"ok": False, "what": f"FAILED: {error}", "log": ends})
                for decoder in pair.values():
                    decoder.part.stop()
            if "load" in wanted:
                part = started["load"] = Part("load", options, folder, folder / "load.json", stdout=subprocess.DEVNULL)
                report("load", answer(part, folder / "load.json", max(left(), 60)))
        finally:
            watch.cancel()
            for part in (*started.values(), *(decoder.part for decoder in decoders)):
                part.stop()
    failed = [name for name, found in results.items() if not found["ok"]]
    print(f"{len(results) - len(failed)} of {len(results)} in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
