"""Async scheduling for draft models, and what keeps it exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope

# Attribute of a KV cache coordinator: tokens by which a scheduled length may exceed the real one.
MARGIN = "_gemma4_spec_optimism"


def vllm_config(original: Callable[..., None]) -> Callable[..., None]:
    """``VllmConfig.__post_init__``: a draft model turns async scheduling off by default; leave it on.

    0.19.1 accepts ``--async-scheduling`` with ``draft_model``, only its default is off. What the user set,
    and what another option forbids, stays.

    Patch: ``async-drafts``. Evidence:
    ``tests/performance/test_async_drafts.py::test_the_window_of_the_real_length_keeps_its_blocks``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        if self.scheduler_config.async_scheduling is None and _can_be_async(self):
            self.scheduler_config.async_scheduling = True
        original(self)

    return __post_init__


def _can_be_async(config: Any) -> bool:
    from vllm.platforms import current_platform
    from vllm.v1.executor import Executor

    spec = config.speculative_config
    return (
        current_platform.is_cuda()
        and scope.gemma4_speculation(config)
        and spec.method == "draft_model"
        and not spec.disable_padded_drafter_batch
        # With a connector, block counts must match a remote side's that knows nothing of a margin.
        and config.kv_transfer_config is None
        and config.cache_config.kv_offloading_size is None  # makes a connector later
        and bool(Executor.get_class(config).supports_async_scheduling())
    )


def scheduler_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Scheduler.__init__``: with async scheduling, lengths are optimistic by up to k rejected drafts.

    Patch: ``async-drafts``. Evidence:
    ``tests/performance/test_async_drafts.py::test_the_window_of_the_real_length_keeps_its_blocks``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.gemma4_speculation(self.vllm_config) and self.scheduler_config.async_scheduling:
            setattr(self.kv_cache_manager.coordinator, MARGIN, self.num_spec_tokens)

    return __init__


def remove_skipped_blocks(original: Callable[..., None]) -> Callable[..., None]:
    """``KVCacheCoordinator.remove_skipped_blocks``: free only what no outcome of the last step needs.

    A step is scheduled before the last one's rejections are known. Its ``num_computed_tokens`` counts all
    drafts as accepted, so a block that the sliding window still covers could be freed, and given away in the
    same step, up to k tokens too early.

    Patch: ``async-drafts``. Evidence:
    ``tests/performance/test_async_drafts.py::test_the_window_of_the_real_length_keeps_its_blocks``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, request_id: str, total_computed_tokens: int) -> None:
        margin = getattr(self, MARGIN, 0)
        original(self, request_id, max(0, total_computed_tokens - margin) if margin else total_computed_tokens)

    return wrapper
