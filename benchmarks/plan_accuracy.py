"""How far off ``vllm-gemma4-spec plan`` is: its floors and its tok/s beside a run of ``full_shape.py``.

    GEMMA4_ARTIFACTS=… python benchmarks/plan_accuracy.py results.json       # prints Markdown; needs no GPU

The plan gets the bandwidth that the run measured. The first table has one pass after the other; in the second the plan
works with the measured times, so it shows whether a step is the sum of its parts and tokens are those of the formula.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import shapes

from vllm_gemma4_spec.ops.plan import model, report, timing


def plan(args: dict[str, Any], requests: int, bandwidth: float, rate: float, given: report.Given) -> Any:
    """The plan for the pair of a results file when half of each answer is written; ``bandwidth`` in GB/s."""
    pair = [
        model.load(shapes.artifacts() / "gemma4/models" / shapes.MODELS[args[role]], "nvfp4")
        for role in ("target", "drafter")
    ]
    return report.make(
        *pair,
        [timing.Hardware("measured", 141e9, bandwidth * 1e9, "full_shape.py")],
        {"rate": timing.curve(str(rate))},
        report.Asked(requests, int(args["prompt"]) + args["tokens"] // 2, "bf16", 0.8, given),
    )


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Lines on bytes, and the cells of the two tables."""
    args, engines = results["args"], results["engines"]
    if args.get("target_layers"):
        raise SystemExit("the run has a cut target (--target-layers); the plan is for the whole one")
    k, spec = args["k"], engines["spec"]
    plain = {r["concurrency"]: r for r in engines.get("stock", engines.get("plain"))["runs"]}
    lines, passes, speeds = [], [], []
    for n in sorted(plain):
        runs = [r for r in spec["runs"] if r["concurrency"] == n]
        if not runs:
            continue
        floor = plan(args, n, spec["bandwidth"], 1.0, report.Given())
        if not lines:
            for role, key in (("target", "target_step"), ("drafter", "draft_step")):
                read = (getattr(floor, f"bytes_per_{key}") - getattr(floor, f"kv_bytes_per_{key}")) / 1e9
                lines.append(f"{role}: {read:.2f} GB of weights a pass by plan, {spec[role]:.2f} as loaded")
        machine, one = floor.machines[0], runs[0]
        draft = one["draft"] / k
        parts = spec.get("draft_parts", {}).get(str(n), {})
        for name, low, seen in (
            ("target, plain step", machine.target_ms, plain[n]["step"]),
            (f"target, verifies {k} drafts", machine.verify_ms[k], one["verify"]),
            ("drafter, first pass", machine.draft_ms, parts.get("first")),
            ("drafter, further pass", machine.draft_ms, parts.get("further")),
            ("drafter, mean of its passes", machine.draft_ms, draft),
            (f"whole step, k = {k}", machine.step_ms[k], one["step"]),
        ):
            if seen is not None:
                passes.append([str(n), name, f"{low:.2f}", f"{seen:.2f}", f"{seen / low:.1f}"])
        for run in runs:
            other = (run["sampling"] + run["gap"]) / 1e3
            given = report.Given(one["verify"] / 1e3, draft / 1e3, other)
            (speed,) = plan(args, n, spec["bandwidth"], run["acceptance"], given).machines[0].acceptance.values()
            said, seen = (speed.tok_s or speed.tok_s_at_most)[k], run["tokens_per_s"]
            speeds.append([str(n), f"{run['acceptance']}", f"{said:.0f}", f"{seen:.0f}", f"{seen / said:.2f}"])
    return lines, passes, speeds


def table(head: list[str], cells: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells])


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("results", type=Path, help="written by full_shape.py with the engines spec, and stock or plain")
    lines, passes, speeds = rows(json.loads(ap.parse_args().results.read_text()))
    print("\n".join(lines), end="\n\n")
    print(table(["requests", "pass", "floor ms", "measured ms", "measured / floor"], passes), end="\n\n")
    print(table(["requests", "acceptance", "tok/s by plan", "measured", "measured / plan"], speeds))


if __name__ == "__main__":
    main()
