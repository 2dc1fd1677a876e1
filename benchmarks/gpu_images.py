"""Images that attend both ways, on a GPU in float32: logits of transformers, and with speculation the same answers.

    TRITON_F32_DEFAULT=ieee python benchmarks/gpu_images.py [--head-dim 256] [--out images.json]

The cases of ``tests/multimodal/images_by_triton.py`` with the kernels compiled and CUDA graphs on: per case the largest
distance of a log-probability from transformers' (``narrow``: with Google's mask). Without the patch (``stock``) it is
near 1 for images. Exits 1 if any other case is further off than a tenth of that, or answers otherwise than ``plain``.
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
os.environ.setdefault("VLLM_GEMMA4_SPEC_CHECK", "0")  # tests/support turns it on, and then nothing is captured
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--head-dim", type=int, default=256, help="sliding layers; full layers have twice that")
    ap.add_argument("--cases", default="plain,stock,narrow,speculation,chunks,prefix-caching")
    ap.add_argument("--out", type=Path)
    args = ap.parse_args()

    from verdict import verdict

    from tests.multimodal.images_by_triton import run
    from tests.support import images

    folder = Path(tempfile.mkdtemp(prefix="images-"))
    images.save_both_ways(folder, head_dim=args.head_dim, global_head_dim=2 * args.head_dim)
    options: dict[str, Any] = {
        "enforce_eager": False,
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 1 << 29,
        "mm_encoder_attn_backend": "TORCH_SDPA",
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8],
        },
    }
    results: dict[str, Any] = {}
    answers: dict[tuple[int, ...], list[int]] = {}
    bad = []
    for case in args.cases.split(","):
        found = run(folder, case, **options)
        target = folder / ("target-narrow" if case == "narrow" else "target")
        far = images.distance(target, found["answers"], by_hand=case == "narrow")
        given = {tuple(a["prompt"]): a["answer"] for a in found["answers"]}
        if case == "plain":
            answers = given
        same = case in ("stock", "narrow") or given == answers
        counts = found["counts"]
        results[case] = {"distance": max(far), "equal": same, "proposed": counts.proposed, "accepted": counts.accepted}
        print(f"{case:15s} {json.dumps(results[case])}", flush=True)
        wrong = max(far[:2]) < 0.1 if case == "stock" else max(far) > 0.1
        if wrong or not same:
            bad.append(case)
    return verdict("right", bad, results, args.out)


if __name__ == "__main__":
    sys.exit(main())
