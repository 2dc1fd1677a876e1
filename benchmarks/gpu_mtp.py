"""An MTP assistant on a GPU in float32, head sizes 256 / 512: its drafts, the target's cache, the answers.

    TRITON_F32_DEFAULT=ieee python benchmarks/gpu_mtp.py [--kinds 31b,e4b] [--k 4]

Tiny random pairs. Per kind, eager and with graphs and async scheduling: answers equal plain decoding, every draft
equals that of the network in plain PyTorch on the keys and values that the engine's cache holds, and no byte of the
cache changes while a draft is made. Exits 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_GEMMA4_SPEC_CHECK", "0")  # with it nothing is captured
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LENGTHS, TOKENS = [5, 17, 40, 90, 150, 33, 64], 48


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--kinds", default="31b,26b-a4b,e4b,e2b")
    ap.add_argument("--k", type=int, default=4)
    ap.add_argument("--head-dim", type=int, default=256, help="sliding layers; full layers have twice that")
    ap.add_argument("--compile", type=int, default=0, choices=(0, 3))
    ap.add_argument("--out", type=Path)
    args = ap.parse_args()

    from verdict import verdict

    from tests.mtp import pairs
    from tests.mtp.drafts import Watched
    from tests.support import engine, tiny_models
    from vllm_gemma4_spec.performance.draft_graphs import GRAPHS

    folder, results = Path(tempfile.mkdtemp(prefix="mtp-")), {}
    prompts = engine.random_prompts(LENGTHS)
    limits = [TOKENS + 7 * i for i in range(len(prompts))]
    query = args.k + 1
    for name in args.kinds.split(","):
        kind = pairs.KINDS[name]()
        kind.target.head_dim, kind.target.global_head_dim = args.head_dim, 2 * args.head_dim
        target = tiny_models.save(kind.target, folder / name / "target")
        assistant = pairs.save_assistant(kind, folder / name / "assistant")
        answers: list[list[int]] | None = None
        for way in ("plain", "eager", "graphs", "async"):
            options: dict[str, Any] = {
                "enforce_eager": way == "eager",
                "max_num_seqs": 4,
                "gpu_memory_utilization": 0.05,
                "kv_cache_memory_bytes": 1 << 29,
            }
            if way != "eager":
                options["compilation_config"] = {
                    "mode": args.compile,
                    "cudagraph_mode": "FULL_AND_PIECEWISE" if args.compile else "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": [1, 2, 4] if way == "plain" else [query, 2 * query, 4 * query],
                }
            if way != "plain":
                options["async_scheduling"] = way == "async"
                options["speculative_config"] = {"model": str(assistant), "num_speculative_tokens": args.k}
            with engine.engine(target, **options) as llm:
                watched = Watched(llm, assistant) if way != "plain" else None
                tokens = engine.generate(llm, prompts, limits)
                captured = watched is not None and watched.runner.drafter.__dict__.get(GRAPHS) is not None
            answers = answers or tokens
            row: dict[str, Any] = {"equal": tokens == answers}
            if watched is not None:
                drafts = watched.drafts
                row |= {"drafts": len(drafts), "different": sum(d.made != d.wanted for d in drafts)}
                row |= {"first different": sum(d.made[0] != d.wanted[0] for d in drafts)}
                row |= {"bytes changed": watched.changed, "graphs": captured}
            results[f"{name} {way}"] = row
            print(f"{name:8s} {way:7s} {json.dumps(row)}", flush=True)
    bad = [
        way
        for way, r in results.items()
        if not r["equal"]
        or ("drafts" in r and (r["first different"] or r["different"] > 0.02 * r["drafts"] or r["bytes changed"]))
        or (way.endswith(("graphs", "async")) and not r["graphs"])
    ]
    return verdict("mtp", bad, results, args.out)


if __name__ == "__main__":
    sys.exit(main())
