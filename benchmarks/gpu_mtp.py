"""A full-size MTP assistant's draft on one GPU: milliseconds by batch size, context and head.

    GEMMA4_ARTIFACTS=… python benchmarks/gpu_mtp.py --target 31B --k 4 --concurrency 1,16 --out mtp-draft.json

The target, whose speed is not measured, is cut to ``--layers`` layers; head sizes, KV heads, widths and vocabulary are
the published ones, weights random. Per context a replay of the whole draft, first with the NVFP4 copy of the head and
then with the head in bfloat16. ``full_shape.py --engines stock,spec@3,mtp@4`` measures whole steps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_GEMMA4_SPEC_CHECK", "0")  # with it nothing is captured


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--target", default="31B", choices=("31B", "26B-A4B", "E4B"))
    ap.add_argument("--layers", type=int, default=12, help="of the target")
    ap.add_argument("--k", type=int, default=4)
    ap.add_argument("--concurrency", default="1,16")
    ap.add_argument("--contexts", default="256,4096")
    ap.add_argument("--compile", type=int, default=3, choices=(0, 3), help="vLLM's compilation mode")
    ap.add_argument("--kernels", action="store_true", help="list the kernels of one draft")
    ap.add_argument("--out", type=Path)
    args = ap.parse_args()

    import probes
    import shapes
    import vllm.model_executor.model_loader.dummy_loader as loader
    from full_shape import kernel_table
    from vllm import LLM

    loader.initialize_dummy_weights = shapes.random_weights
    sizes = [int(n) for n in args.concurrency.split(",")]
    contexts = [int(n) for n in args.contexts.split(",")]
    work = Path(tempfile.gettempdir()) / f"gemma4-mtp-{args.target}-{args.layers}"
    began = time.perf_counter()
    llm = LLM(
        str(shapes.write_model(args.target, work / "target", args.layers)),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(contexts) + 64,
        max_num_seqs=max(sizes),
        max_num_batched_tokens=max(4096, max(contexts) + 64),
        gpu_memory_utilization=0.1,  # checked at the start only: the next line sizes the cache
        kv_cache_memory_bytes=4 << 30,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        speculative_config={
            "method": "mtp",
            "model": str(shapes.write_assistant(args.target, work / "assistant")),
            "num_speculative_tokens": args.k,
        },
        compilation_config={
            "mode": args.compile,
            "cudagraph_mode": "FULL_AND_PIECEWISE" if args.compile else "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sorted({n * (args.k + 1) for n in sizes}),
        },
    )
    rpc = llm.collective_rpc
    found: dict[str, Any] = {"start_s": round(time.perf_counter() - began, 1), **rpc(probes.bandwidth_and_bytes)[0]}
    found["floor_ms"] = round(found["drafter"] / found["bandwidth"] * 1e3 * args.k, 3)
    for head in ("nvfp4", "bfloat16"):
        if head == "bfloat16" and not rpc(probes.without_head)[0]:
            break
        for context in contexts:
            found[f"{head} {context}"] = rows = rpc(probes.draft_parts, args=(sizes, context))[0]
            for n, row in rows.items():
                print(f"head {head:8s} context {context:6d} requests {n:>3s}: {json.dumps(row)}", flush=True)
        if args.kernels and head == "nvfp4":
            for n in sizes:
                found[f"kernels {n}"] = kernels = rpc(probes.profile_replay, args=(n,))[0]
                print(kernel_table(kernels), flush=True)
    print(f"floor of {args.k} passes {found['floor_ms']} ms: {found['drafter']} GB a pass at {found['bandwidth']} GB/s")
    if args.out:
        args.out.write_text(json.dumps({"args": vars(args) | {"out": str(args.out)}, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
