"""Loading a checkpoint on the CPU: with the package against vLLM alone, and the share of the search for NaN scales.

    python benchmarks/load_time.py --out benchmarks/results/cpu-load-time.json

Random weights in a 31B's layers, narrowed to what a CPU can attend with: 1.4 GB in bfloat16 and 1.1 GB in NVFP4_AWQ.
vLLM alone refuses NVFP4 on a CPU, so what the two are compared on is bfloat16. Each side is a process of its own that
stays up and loads when told to, in turns, from a warm page cache; the first load of each is not counted. A load is
vLLM's ``get_model``: the model made, its weights read, and what is done to them afterwards. Processor time is that of
all threads.

In NVFP4 the search for NaN block scales, the search with the repair of what it found (1 % of the rows of every
down_proj), the headers' check and the whole are timed. ``packed`` leaves the weights as they are after that, which
makes the shares as large as they can be; ``dequantized`` is what a CPU does by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
Times = dict[str, float]

WIDTHS = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 4}
WIDTHS |= {"num_global_key_value_heads": 2, "head_dim": 128, "global_head_dim": 256}
LAYERS = {"bf16": 12, "nvfp4": 36}
LIMIT = 2.0  # per cent of a load
OPTIONS = {"dtype": "bfloat16", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 64}
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


def write(folder: Path, form: str, small: bool) -> int:
    """A random checkpoint; how many bytes its weights have."""
    import torch
    from nvfp4_parts import config, shard_tensors
    from safetensors.torch import save_file

    settings = config("31B", 6 if small else LAYERS[form], "NVFP4_AWQ", small) | ({} if small else WIDTHS)
    tensors = dict(shard_tensors(settings))
    if form == "bf16":
        del settings["quantization_config"]
        tensors = {name: value for name, value in tensors.items() if "scale" not in name}
        for name, value in tensors.items():
            if value.dtype == torch.uint8:
                tensors[name] = torch.randn(value.shape[0], 2 * value.shape[1], dtype=torch.bfloat16)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    return (folder / "model.safetensors").stat().st_size


def serve_loads() -> None:
    """Loads the folder in each line of stdin and answers with its times, a JSON object a line."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    spent = _watched() if os.environ.get("VLLM_GEMMA4_SPEC") != "0" else {}
    configs: dict[str, Any] = {}
    for line in sys.stdin:
        folder = line.strip()
        if folder not in configs:
            configs[folder] = EngineArgs(folder, **OPTIONS).create_engine_config()
        config = configs[folder]
        config.compilation_config.static_forward_context.clear()
        with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as store:
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{store.name}", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
            spent.update(dict.fromkeys(spent, 0.0))
            wall, cpu = time.perf_counter(), time.process_time()
            model = get_model(vllm_config=config)
            times = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        times["layers"] = float(sum(hasattr(module, "modelopt_checked") for module in model.modules()))
        del model
        print("TIMES " + json.dumps(times | spent), flush=True)


def _watched() -> Times:
    """Processor seconds of what is done for NaN scales and of the headers' check, filled in while a model loads."""
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    from vllm_gemma4_spec.checkpoints import files, nvfp4
    from vllm_gemma4_spec.quantization import linear

    spent = {"search_cpu_s": 0.0, "search_and_repair_cpu_s": 0.0, "headers_cpu_s": 0.0}

    def timing(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            spent[what] += time.process_time() - start
            return result

        return timed

    nvfp4.survey = timing("search_cpu_s", nvfp4.survey)
    linear.repair = timing("search_and_repair_cpu_s", linear.repair)
    files.read_headers = timing("headers_cpu_s", files.read_headers)
    return spent


class Loader:
    """A process that loads when told to."""

    def __init__(self, log: Path, **settings: str) -> None:
        env = {**os.environ, **QUIET, **settings, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(__file__).resolve()), "--loader"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.log = log
        self.process = subprocess.Popen(command, env=env, stderr=log.open("w"), text=True, cwd=ROOT, **pipes)

    def load(self, folder: Path) -> Times:
        assert self.process.stdin is not None
        print(folder, file=self.process.stdin, flush=True)
        for line in self.process.stdout or ():
            if line.startswith("TIMES "):
                found: Times = json.loads(line.removeprefix("TIMES "))
                return found
        raise SystemExit(f"a load failed: {self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def median(runs: list[Times]) -> Times:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def share(runs: list[Times], what: str) -> float:
    return 100 * statistics.median(run[what] / run["cpu_s"] for run in runs)


def report(folder: Path, rounds: int, small: bool) -> dict[str, Any]:
    sizes = {form: write(folder / form, form, small) for form in LAYERS}
    sides = {
        "vllm": Loader(folder / "vllm.log", VLLM_GEMMA4_SPEC="0"),
        "package": Loader(folder / "package.log", VLLM_GEMMA4_SPEC_NVFP4_WEIGHTS="packed"),
        "dequantized": Loader(folder / "dequantized.log", VLLM_GEMMA4_SPEC_NVFP4_WEIGHTS="dequantized"),
    }
    try:
        runs: dict[str, list[Times]] = {"vllm": [], "package": [], "packed": [], "dequantized": []}
        for turn in range(rounds + 1):
            pair = ["vllm", "package"][:: 1 if turn % 2 else -1]
            for name in pair:
                runs[name].append(sides[name].load(folder / "bf16"))
        sides["vllm"].stop()
        for _ in range(rounds + 1):
            runs["packed"].append(sides["package"].load(folder / "nvfp4"))
        sides["package"].stop()
        for _ in range(2):  # a minute each
            runs["dequantized"].append(sides["dequantized"].load(folder / "nvfp4"))
    finally:
        for side in sides.values():
            side.stop()
    counted = {name: found[1:] for name, found in runs.items()}
    ratios = {
        clock: [ours[clock] / theirs[clock] for ours, theirs in zip(counted["package"], counted["vllm"], strict=True)]
        for clock in ("cpu_s", "wall_s")
    }
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
        "bytes": sizes,
        "medians": {name: median(found) for name, found in counted.items()},
        "package_over_vllm": {
            clock: {"median": statistics.median(found), "least": min(found), "most": max(found)}
            for clock, found in ratios.items()
        },
        "percent": {
            name: {what: share(counted[name], f"{what}_cpu_s") for what in ("search", "search_and_repair", "headers")}
            for name in ("packed", "dequantized")
        },
        "runs": runs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="tiny shapes, as a check of this script")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--loader", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loader:
        serve_loads()
        return 0
    with tempfile.TemporaryDirectory(prefix="load-time-") as made:
        found = report(Path(made), options.rounds, options.small)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, times in found["medians"].items():
        print(f"{name:12s} {times['cpu_s']:.2f} s of processor time, {times['wall_s']:.2f} s")
    for clock, ratio in found["package_over_vllm"].items():
        print(f"package over vLLM alone, {clock}: {ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f})")
    for name, shares in found["percent"].items():
        shown = ", ".join(f"{what.replace('_', ' ')} {percent:.2f} %" for what, percent in shares.items())
        print(f"share of a load, {name}: {shown}")
    search = max(shares["search"] for shares in found["percent"].values())
    return 0 if options.small or max(search, found["percent"]["dequantized"]["search_and_repair"]) < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
