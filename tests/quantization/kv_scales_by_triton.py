"""vLLM's attention kernel with an fp8 cache in Triton's interpreter.

``python -m tests.quantization.kv_scales_by_triton RESULTS``. Keys and values are stored divided by a scale; the
kernel is given that scale.
"""

from __future__ import annotations

import sys
from typing import Any

BLOCK, HEADS, SIZE, TOKENS, QUERIES = 16, 2, 32, 40, 4


def attend(unified: Any, query: Any, keys: Any, values: Any, scale: float, query_dtype: Any) -> Any:
    import torch

    table = torch.tensor([[2, 0, 3, 1]], dtype=torch.int32)
    caches = [torch.zeros(4, BLOCK, 1, SIZE) for _ in range(2)]
    for at in range(TOKENS):
        for cache, new in zip(caches, (keys, values), strict=True):
            cache[table[0, at // BLOCK], at % BLOCK] = new[at] / scale
    key_cache, value_cache = (cache.to(torch.float8_e4m3fn) for cache in caches)
    out = torch.zeros(QUERIES, HEADS, SIZE)
    unified(
        q=query.to(query_dtype),
        k=key_cache,
        v=value_cache,
        out=out,
        cu_seqlens_q=torch.tensor([0, QUERIES], dtype=torch.int32),
        max_seqlen_q=QUERIES,
        seqused_k=torch.tensor([TOKENS], dtype=torch.int32),
        max_seqlen_k=TOKENS,
        softmax_scale=0.3,
        causal=True,
        window_size=(-1, -1),
        block_table=table,
        softcap=0,
        q_descale=None,
        k_descale=torch.tensor(scale).expand(1, 1),
        v_descale=torch.tensor(scale).expand(1, 1),
    )
    return out


if __name__ == "__main__":
    import torch
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    torch.manual_seed(0)
    query = torch.randn(QUERIES, HEADS, SIZE)
    keys, values = torch.randn(TOKENS, 1, SIZE), torch.randn(TOKENS, 1, SIZE)
    results = {
        (name, scale): attend(unified_attention, query, keys, values, scale, dtype)
        for name, dtype in (("float32", torch.float32), ("fp8", torch.float8_e4m3fn))
        for scale in (1.0, 4.0)
    }
    torch.save(results, sys.argv[1])
