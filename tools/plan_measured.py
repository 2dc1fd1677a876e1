"""What ``plan`` predicts from: pass times of ``benchmarks/full_shape.py``'s results, as a small table in the package.

``make plan-measured`` rewrites ``vllm_gemma4_spec/ops/plan/measured.json``; a test holds it to the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KINDS = ("spe", "mtp")  # engines of full_shape.py that draft begin so
OUT = ROOT / "vllm_gemma4_spec/ops/plan/measured.json"
# Results file, the card it was run on and the engine whose drafts are taken. Targets and E4B are full-size shapes in
# NVFP4, assistants in bfloat16.
RESULTS = (
    ("benchmarks/results/h200-31b-e4b.json", "H200", "spec"),
    ("benchmarks/results/h200-26b-e4b.json", "H200", "spec"),
    ("benchmarks/results/h200-31b-mtp.json", "H200", "mtp@4"),
    ("benchmarks/results/h200-26b-mtp.json", "H200", "mtp@4"),
)
MODELS = {"31B": "google/gemma-4-31B-it", "26B-A4B": "google/gemma-4-26B-A4B-it", "E4B": "google/gemma-4-E4B-it"}


def first_runs(engine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The first run at each number of requests."""
    return {str(r["concurrency"]): r for r in reversed(engine["runs"])}


def pair(file: str, card: str, engine: str) -> dict[str, Any]:
    """One engine of a results file; milliseconds by requests at once, ``verify@K`` of every K that the file has."""
    found = json.loads((ROOT / file).read_text())
    args, engines = found["args"], found["engines"]
    assistant, plain = engine.startswith("mtp"), first_runs(engines["stock"])
    drafting = {int(e.partition("@")[2] or args["k"]): first_runs(of) for e, of in engines.items() if e[:3] in KINDS}
    k, runs = int(engine.partition("@")[2] or args["k"]), {}
    for n, run in sorted(first_runs(engines[engine]).items(), key=lambda item: int(item[0])):
        parts = engines[engine]["draft_parts"][n]
        scale = run["draft"] / parts["whole"]  # the parts were timed by themselves, the whole inside steps
        first, further = (parts["pass" if assistant else part] * scale for part in ("first", "further"))
        runs[n] = {
            "step": plain[n]["step"],
            "plain_pass": plain[n]["verify"],
            **{f"verify@{k}": of[n]["verify"] for k, of in sorted(drafting.items())},
            "first_draft": round(first, 3),
            "further_draft": round(further, 3),
            "rest": round(run["sampling"] + run["gap"], 3),
        }
    target = MODELS[args["target"]]
    return {
        "card": card,
        "source": file,
        "target": target,
        "drafter": f"{target}-assistant" if assistant else MODELS[args["drafter"]],
        "weights": "nvfp4",
        "drafter_weights": "bf16" if assistant else "nvfp4",
        "context": args["prompt"] + args["tokens"] // 2,
        "k": k,
        "ms": runs,
    }


def table() -> str:
    return json.dumps([pair(*item) for item in RESULTS], indent=1) + "\n"


if __name__ == "__main__":
    OUT.write_text(table())
