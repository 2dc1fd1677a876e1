"""Every way of running an engine that touches KV cache blocks, and the requests that show it."""

from __future__ import annotations

from typing import Any

from tests.support.engine import random_prompts

# Around blocks (16, 32), windows (32, 64) and far beyond both.
LENGTHS = (1, 15, 16, 17, 63, 65, 200, 700)
REQUESTS = 8
TOKENS = 32

# Options of the engine.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked-prefill": {"max_num_batched_tokens": 96, "max_num_seqs": 8},
    "prefix-caching": {"enable_prefix_caching": True},
    "one-group": {"disable_hybrid_kv_cache_manager": True},
    "preemption": {"num_gpu_blocks_override": 120, "max_num_seqs": 8},
    "replaced-requests": {"max_num_seqs": 3},
}


def with_prefixes(prompts: list[list[int]]) -> list[list[int]]:
    """``prompts``, then prompts that begin as they do, then ``prompts`` again."""
    return prompts + [[*p[: len(p) * 2 // 3 + 1], 7, 8, 9] for p in prompts] + prompts


def work(way: str, share: float = 1) -> tuple[list[list[int]], list[int]]:
    """Prompts and answer lengths for one way of running; with ``share``, answers are that part as long."""
    prompts = random_prompts(LENGTHS)
    limits = [TOKENS] * len(prompts)
    if way == "prefix-caching":
        prompts = with_prefixes(prompts)
        limits = [TOKENS] * len(prompts)
    elif way == "preemption":  # all of them grow, and together they do not fit
        prompts = random_prompts([60 + i for i in range(REQUESTS)])
        limits = [120] * REQUESTS
    elif way == "replaced-requests":
        limits = [3, 40, 7, 25, 1, 12, 33, 20]
    return prompts, [max(1, round(share * limit)) for limit in limits]
