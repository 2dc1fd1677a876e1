"""The early cache write in Triton's interpreter, beside vLLM's: ``-m tests.kernels.cache_write_by_triton RESULTS``."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import torch
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    from vllm_gemma4_spec.kernels.cache_write import write

    torch.cuda.get_device_capability = lambda *_: (9, 0)  # vLLM asks for its tiles
    BLOCKS, BLOCK = 7, 16
    results = []
    for seed, (tokens, kv_heads, size, dtype, padding) in enumerate(
        [
            (1, 2, 256, torch.bfloat16, 0),
            (5, 2, 64, torch.bfloat16, 2),
            (12, 4, 128, torch.float16, 3),
            (3, 1, 64, torch.bfloat16, 3),  # nothing but padding
        ]
    ):
        torch.manual_seed(seed)
        qkv = torch.randn(tokens + 2, 5 * kv_heads * size).to(dtype)  # more rows than slots, and queries beside keys
        key, value = (
            qkv[:, at * kv_heads * size :][:, : kv_heads * size].unflatten(-1, (kv_heads, size)) for at in (3, 4)
        )
        slots = torch.randperm(BLOCKS * BLOCK)[:tokens]
        slots[torch.randperm(tokens)[:padding]] = -1
        # Keys and values of a block lie beside other layers' in vLLM's memory.
        whole = torch.randn(BLOCKS, 3, BLOCK, kv_heads, size).to(dtype)
        caches = []
        for ours in (False, True):
            cache = whole.clone()
            into = cache[:, 1:].unbind(1)
            if ours:
                write(key, value, *into, slots, early=False)
            else:
                scale = torch.ones(1)
                triton_reshape_and_cache_flash(key, value, *into, slots, "auto", scale, scale)
            caches.append(cache)
        results.append({"before": whole, "theirs": caches[0], "ours": caches[1], "written": tokens - padding})
    torch.save(results, sys.argv[1])
