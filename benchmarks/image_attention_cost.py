"""What a prefill step pays for images that attend both ways: TRITON_ATTN in a sliding layer of 31B, on a GPU.

    python benchmarks/image_attention_cost.py [--out image-attention.json]

A step of 2,048 tokens at the end of a context holds four images of 280 tokens. ``none``: no image, the kernel starts at
the window's edge; ``ranges``: images as ranges of one request, for which 0.19.1's kernel walks the whole context;
``pieces``: as this package lays the step out. Microseconds a layer, medians of 20 after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

HEADS, KV_HEADS, HEAD_DIM, WINDOW, BLOCK = 32, 16, 256, 1024, 16
STEP, IMAGE, IMAGES, LAYERS = 2048, 280, 4, 50


def run(context: int, way: str) -> float:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    from vllm_gemma4_spec.multimodal.segments import Layout, Row, lay_out

    device = torch.device("cuda")
    blocks = context // BLOCK
    q = torch.randn(STEP, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    k, v = torch.randn(2, blocks, BLOCK, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    first = context - STEP
    images = [(first + i * 400, first + i * 400 + IMAGE - 1) for i in range(IMAGES)]
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(TritonAttentionMetadata))
    values |= {
        "query_start_loc": torch.tensor([0, STEP], dtype=torch.int32, device=device),
        "seq_lens": torch.tensor([context], dtype=torch.int32, device=device),
        "block_table": torch.arange(blocks, dtype=torch.int32, device=device)[None],
        "max_query_len": STEP,
        "max_seq_len": context,
        "mm_prefix_range": {0: images} if way == "ranges" else None,
    }
    metadata = TritonAttentionMetadata(**values)
    if way == "pieces":
        metadata = lay_out(metadata, Layout.of([Row(first, context, images)], WINDOW, BLOCK, slack=0).on(device))
    scales = torch.ones(metadata.seq_lens.shape[0], KV_HEADS, device=device)
    call = {
        "q": q,
        "k": k,
        "v": v,
        "out": torch.empty_like(q),
        "cu_seqlens_q": metadata.query_start_loc,
        "max_seqlen_q": metadata.max_query_len,
        "seqused_k": metadata.seq_lens,
        "max_seqlen_k": metadata.max_seq_len,
        "softmax_scale": 1.0,
        "causal": True,
        "window_size": (WINDOW - 1, 0),
        "block_table": metadata.block_table,
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": scales,
        "v_descale": scales,
        "mm_prefix_range": metadata.mm_prefix_range_tensor,
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
        row = {"context": context} | {way: round(run(context, way), 1) for way in ("none", "ranges", "pieces")}
        row["more in a step (ms)"] = round((row["pieces"] - row["none"]) * LAYERS / 1e3, 2)
        print(json.dumps(row), flush=True)
        rows.append(row)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
