"""What ``plan`` predicts from: pass times of ``benchmarks/full_shape.py``'s results, as a small table in the package.

``make plan-measured`` rewrites ``vllm_gemma4_spec/ops/plan/measured.json``; a test holds it to the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "vllm_gemma4_spec/ops/plan/measured.json"
# Results file -> the card it was run on. Their models are full-size shapes in NVFP4.
RESULTS = {"benchmarks/results/h200-31b-e4b.json": "H200", "benchmarks/results/h200-26b-e4b.json": "H200"}
MODELS = {"31B": "google/gemma-4-31B-it", "26B-A4B": "google/gemma-4-26B-A4B-it", "E4B": "google/gemma-4-E4B-it"}


def pair(file: str, card: str) -> dict[str, Any]:
    """One results file; milliseconds by requests at once."""
    found = json.loads((ROOT / file).read_text())
    args, spec = found["args"], found["engines"]["spec"]
    plain = {str(r["concurrency"]): r for r in found["engines"]["stock"]["runs"]}
    runs = {}
    for run in spec["runs"]:
        n = str(run["concurrency"])
        parts = spec["draft_parts"][n]
        scale = run["draft"] / parts["whole"]  # the parts were timed by themselves, the whole inside steps
        runs.setdefault(
            n,
            {
                "step": plain[n]["step"],
                "plain_pass": plain[n]["verify"],
                "verify": run["verify"],
                "first_draft": round(parts["first"] * scale, 3),
                "further_draft": round(parts["further"] * scale, 3),
                "rest": round(run["sampling"] + run["gap"], 3),
            },
        )
    return {
        "card": card,
        "source": file,
        "target": MODELS[args["target"]],
        "drafter": MODELS[args["drafter"]],
        "weights": "nvfp4",
        "context": args["prompt"] + args["tokens"] // 2,
        "k": args["k"],
        "ms": runs,
    }


def table() -> str:
    return json.dumps([pair(*item) for item in RESULTS.items()], indent=1) + "\n"


if __name__ == "__main__":
    OUT.write_text(table())
