"""What ``plan`` predicts from: pass times of ``benchmarks/full_shape.py``'s results, as a small table in the package.

``make plan-measured`` rewrites ``vllm_gemma4_spec/ops/plan/measured.json``; a test holds it to the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "vllm_gemma4_spec/ops/plan/measured.json"
# Results file, the card it was run on, the engine that drafted, the one that did not. Targets and E4B are full-size
# shapes in NVFP4, assistants in bfloat16.
RESULTS = (
    ("benchmarks/results/h200-31b-before-bf16.json", "H200", "spec@3", "plain"),
    ("benchmarks/results/h200-26b-e4b.json", "H200", "spec", "stock"),  # before the target's kernels
    ("benchmarks/results/h200-31b.json", "H200", "mtp@4", "plain"),
    ("benchmarks/results/h200-26b-mtp.json", "H200", "mtp@4", "plain"),
)
MODELS = {"31B": "google/gemma-4-31B-it", "26B-A4B": "google/gemma-4-26B-A4B-it", "E4B": "google/gemma-4-E4B-it"}


def first_runs(engine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The first run at each number of requests."""
    return {str(r["concurrency"]): r for r in reversed(engine["runs"])}


def k_of(engine: str, k: int) -> int:
    return int(engine.partition("@")[2] or k)


def pair(file: str, card: str, engine: str, without: str) -> dict[str, Any]:
    """One results file; milliseconds by requests at once."""
    found = json.loads((ROOT / file).read_text())
    args, spec = found["args"], found["engines"][engine]
    target, assistant = MODELS[args["target"]], engine.startswith("mtp")
    plain = first_runs(found["engines"][without])
    # The target's pass at every k that the file has, whichever drafter was with it.
    passes = {int(e.partition("@")[2]): first_runs(of) for e, of in found["engines"].items() if "@" in e}
    passes |= {k_of(engine, args["k"]): first_runs(spec)}
    runs = {}
    for run in spec["runs"]:
        n = str(run["concurrency"])
        parts = spec["draft_parts"][n]
        if assistant:  # its passes are alike
            parts = parts | {"first": parts["pass"], "further": parts["pass"]}
        scale = run["draft"] / parts["whole"]  # the parts were timed by themselves, the whole inside steps
        runs.setdefault(
            n,
            {
                "step": plain[n]["step"],
                "plain_pass": plain[n]["verify"],
                **{f"verify@{k}": of[n]["verify"] for k, of in sorted(passes.items())},
                "first_draft": round(parts["first"] * scale, 3),
                "further_draft": round(parts["further"] * scale, 3),
                "rest": round(run["sampling"] + run["gap"], 3),
            },
        )
    return {
        "card": card,
        "source": file,
        "target": target,
        "drafter": f"{target}-assistant" if assistant else MODELS[args["drafter"]],
        "weights": "nvfp4",
        "drafter_weights": "bf16" if assistant else "nvfp4",
        "context": int(args["prompt"]) + args["tokens"] // 2,
        "k": k_of(engine, args["k"]),
        "ms": runs,
    }


def table() -> str:
    return json.dumps([pair(*of) for of in RESULTS], indent=1) + "\n"


if __name__ == "__main__":
    OUT.write_text(table())
