"""Grammars, thinking budgets and stop strings on a GPU, with async scheduling: the answers are those of plain decoding.

    TRITON_F32_DEFAULT=ieee python benchmarks/gpu_requests.py [--out requests.json]

Every case of ``tests/requests/test_requests_engine.py`` (the end of reasoning at every place of a step, each kind of
constraint, budgets, stop strings) on a tiny model with head_dim 256 / 512 in float32, with CUDA graphs. With async
scheduling drafts and bitmasks travel another way: a step is scheduled with placeholders, and drafts are validated
before it is sampled. Exits 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # tf32 would round differently in passes of different shape
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_GEMMA4_SPEC_CHECK", "0")  # tests/support turns it on, and then nothing is captured
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MEMORY = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 29}  # leaves the card to others, too
# Way -> drafter, k, async scheduling.
WAYS: dict[str, tuple[str | None, int, bool]] = {
    "plain": (None, 0, False),
    "plain-async": (None, 0, True),
    "near-3": ("near", 3, False),
    "near-3-async": ("near", 3, True),
    "self-5-async": ("target", 5, True),
    "near-8-async": ("near", 8, True),
    "near-1-async": ("near", 1, True),
}


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--ways", default=",".join(WAYS))
    ap.add_argument("--out", type=Path)
    args = ap.parse_args()

    from tests.requests.test_requests_engine import ask_all, told
    from tests.support import scripted

    heads = {"head_dim": 256, "global_head_dim": 512}
    folder = Path(tempfile.mkdtemp(prefix="requests-"))
    models = {
        "target": scripted.save(folder / "target", **heads),
        "near": scripted.save(folder / "near", scripted.mistakes(), **heads),
    }
    results: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for way in args.ways.split(","):
        drafter, k, asynchronous = WAYS[way]
        options: dict[str, Any] = {
            "enforce_eager": False,
            "async_scheduling": asynchronous,
            "max_num_seqs": 16,
            **MEMORY,
        }
        options["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        made = ask_all(models, drafter, k, options)
        plain = plain or made
        different = [
            f"{case} {place}"
            for case, outputs in made.items()
            if isinstance(outputs, list)
            for place, (a, b) in enumerate(zip(plain[case], outputs, strict=True))
            if told(a) != told(b)
        ]
        counts = made["counts"]
        results[way] = {
            "requests": sum(len(outputs) for outputs in made.values() if isinstance(outputs, list)),
            "different": different,
            "proposed": counts.proposed,
            "accepted": counts.accepted,
        }
        print(f"{way:14s} {json.dumps(results[way])}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    idle = [way for way, row in results.items() if WAYS[way][1] and not row["accepted"]]
    return 1 if idle or any(row["different"] for row in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
