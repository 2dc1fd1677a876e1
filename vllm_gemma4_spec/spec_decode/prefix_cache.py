"""Prefix cache hits beside an EAGLE head are those of plain decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope


def scheduler_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Scheduler.__init__``: no block of a hit is dropped for the drafter's sake, where the target is a Gemma 4.

    An EAGLE layer's key at position p is made of token p + 1, so the last key of a hit may belong to another next
    token: one key that is off by one token costs a draft at most, never an answer.

    Patch: ``prefix-hits``. Evidence:
    ``tests/patching/test_stock.py::test_a_block_of_every_hit_is_dropped_beside_an_eagle_head``. Related upstream
    change: #40624.
    """

    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if self.use_eagle and scope.gemma4_model(vllm_config.model_config):
            self.kv_cache_manager.coordinator.use_eagle = False

    return __init__
