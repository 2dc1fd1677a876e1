"""What a prefill step pays for images that attend both ways: TRITON_ATTN in a sliding layer of 31B, on a GPU.

    python benchmarks/image_attention_cost.py [--out image-attention.json]

A step of 2,048 tokens at the end of a context holds images of 280 tokens. Without ranges the kernel starts at the
window's edge; with them 0.19.1's walks the whole context. Microseconds a layer, medians of 20 after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

HEADS, KV_HEADS, HEAD_DIM, WINDOW, BLOCK = 32, 16, 256, 1024, 16
STEP, IMAGE, LAYERS = 2048, 280, 50


def run(context: int, images: int) -> float:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    from vllm_gemma4_spec.multimodal.image_attention import _parts

    device = torch.device("cuda")
    blocks = context // BLOCK
    q = torch.randn(STEP, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    k, v = torch.randn(2, blocks, BLOCK, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    first = context - STEP
    ranges = [(first + i * 400, first + i * 400 + IMAGE - 1) for i in range(images)]
    options: dict[str, Any] = {"mm_prefix_range": None}
    if images:
        parts = _parts(WINDOW, ranges)
        options["mm_prefix_range"] = torch.tensor([parts], dtype=torch.int32, device=device)
    call = {
        "q": q,
        "k": k,
        "v": v,
        "out": torch.empty_like(q),
        "cu_seqlens_q": torch.tensor([0, STEP], dtype=torch.int32, device=device),
        "max_seqlen_q": STEP,
        "seqused_k": torch.tensor([context], dtype=torch.int32, device=device),
        "max_seqlen_k": context,
        "softmax_scale": 1.0,
        "causal": True,
        "window_size": (WINDOW - 1, 0),
        "block_table": torch.arange(blocks, dtype=torch.int32, device=device)[None],
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": torch.ones(1, KV_HEADS, device=device),
        "v_descale": torch.ones(1, KV_HEADS, device=device),
        **options,
    }
    times = []
    for turn in range(25):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        unified_attention(**call)
        end.record()
        end.synchronize()
        if turn >= 5:
            times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path)
    args = ap.parse_args()
    rows = []
    for context in (2048, 8192, 32768):
        row = {"context": context} | {f"{n} images": round(run(context, n), 1) for n in (0, 1, 4)}
        row["more in a step (ms)"] = round((row["4 images"] - row["0 images"]) * LAYERS / 1e3, 2)
        print(json.dumps(row), flush=True)
        rows.append(row)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
