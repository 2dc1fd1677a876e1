"""Scheduling with a drafter that has no KV cache."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.spec_decode.block_tables import LOOKAHEAD


def scheduler_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Scheduler.__init__``: no prefix block is dropped and no slot kept for what an assistant never stores.

    Slots of the drafts that a step verifies are allocated with the step's own tokens.

    Patch: ``mtp-scheduling``. Evidence:
    ``tests/mtp/test_stock_scheduling.py::test_stock_scheduling_stops_before_the_maximum_length``. Related upstream
    change: #40624 (prefix hits of hybrid models with a drafter); since 0.30.0 disable_eagle_block_drop.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.is_assistant(self.vllm_config.speculative_config):
            self.use_eagle, self.num_lookahead_tokens = False, 0
            manager = self.kv_cache_manager
            manager.use_eagle = manager.coordinator.use_eagle = False
            setattr(manager, LOOKAHEAD, 0)

    return __init__


def sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner.sample_tokens``: an assistant drafts at any length, as it writes nothing past it.

    Patch: ``mtp-scheduling``. Evidence:
    ``tests/mtp/test_stock_scheduling.py::test_stock_scheduling_stops_before_the_maximum_length``. Related upstream
    change: #40624 (prefix hits of hybrid models with a drafter); since 0.30.0 disable_eagle_block_drop.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if scope.is_assistant(self.speculative_config):
            self.effective_drafter_max_model_len = sys.maxsize  # the scheduler cuts drafts off at the maximum length
        return original(self, *args, **kwargs)

    return wrapper
