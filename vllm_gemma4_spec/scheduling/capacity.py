"""How many KV cache blocks one request can hold at once, and how long a request the pool can hold.

A sliding-window group gives blocks back while a prompt is computed, so it never holds a whole long prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

from vllm_gemma4_spec import scope


@dataclass(frozen=True)
class Step:
    """What one step can ask of the KV cache for one request, in tokens.

    Attributes:
        scheduled: computed by the target, drafts included.
        lookahead: slots behind them that the drafter writes.
        margin: kept before the window while lengths may be optimistic (async scheduling).
    """

    scheduled: int
    lookahead: int = 0
    margin: int = 0

    @classmethod
    def of(cls, vllm_config: Any) -> Step:
        scheduler, spec = vllm_config.scheduler_config, vllm_config.speculative_config
        scheduled = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
        drafts = spec.num_speculative_tokens if spec is not None else 0
        # An assistant writes nothing.
        writes = spec is not None and (spec.use_eagle() or spec.uses_draft_model()) and not scope.is_assistant(spec)
        return cls(
            scheduled=min(scheduled, scheduler.long_prefill_token_threshold or scheduled),
            lookahead=drafts if writes else 0,
            margin=drafts if scheduler.async_scheduling else 0,
        )

    def within(self, window: int) -> int:
        """Tokens whose slots are held in one step: the window of the first token computed, up to the last draft."""
        return window - 1 + self.margin + self.scheduled + self.lookahead


def most_blocks(spec: KVCacheSpec, tokens: int, step: Step) -> int:
    """Blocks of one group that a request of ``tokens`` tokens, drafts included, holds at once at most."""
    whole = cdiv(tokens, spec.block_size)
    if not isinstance(spec, SlidingWindowSpec):
        return whole
    # n tokens that begin with the last one of a block are in cdiv(n - 1, block_size) + 1 blocks.
    return min(whole, cdiv(step.within(spec.sliding_window) - 1, spec.block_size) + 1)


def longest_request(specs: Sequence[KVCacheSpec], num_blocks: int, step: Step, max_model_len: int) -> int:
    """Tokens of the longest request that a pool holds when it is alone, up to ``max_model_len``.

    Args:
        specs: one per KV cache group.
        num_blocks: of the pool, the null block included, which no request gets.
    """
    plain = [next(iter(s.kv_cache_specs.values())) if isinstance(s, UniformTypeKVCacheSpecs) else s for s in specs]
    lengths = range(1, max_model_len + 1)
    return bisect_right(lengths, num_blocks - 1, key=lambda n: sum(most_blocks(spec, n, step) for spec in plain))
