"""A request that waits while there is room for it does not wait in silence."""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_gemma4_spec import scope

logger = logging.getLogger("vllm.plugins.gemma4_spec")

PATIENCE = 60.0  # seconds
_WATCH = "_gemma4_spec_watch"


@dataclass
class Watch:
    """The request that is next to be admitted, since when there has been room for it, and whether that was said."""

    request_id: str
    since: float
    said: bool = False


def schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler.schedule``: one line about a request that has waited for a minute with room to run it.

    Patch: ``waiting-requests``. Evidence: ``tests/scheduling/test_no_deadlock.py::test_stock_waits_in_silence``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if self.waiting or self.skipped_waiting:
            _watch(self, output.total_num_scheduled_tokens)
        return output

    return wrapper


def _watch(scheduler: Any, scheduled_tokens: int) -> None:
    request = next(itertools.chain(scheduler.waiting, scheduler.skipped_waiting))
    watch: Watch | None = getattr(scheduler, _WATCH, None)
    now = time.monotonic()
    if watch is None or watch.request_id != request.request_id or not _room(scheduler, scheduled_tokens):
        said = watch is not None and watch.request_id == request.request_id and watch.said
        setattr(scheduler, _WATCH, Watch(request.request_id, now, said))
        return
    if watch.said or now - watch.since < PATIENCE or not scope.gemma4_engine(scheduler.vllm_config):
        return
    watch.said = True
    pool = scheduler.kv_cache_manager.block_pool
    logger.warning(
        "Request %s of %d tokens (%s) has waited for %d s although %d of %d KV cache blocks are free and %d of %d "
        "requests run",
        request.request_id,
        request.num_tokens,
        request.status.name,
        now - watch.since,
        pool.get_num_free_blocks(),
        pool.num_gpu_blocks,
        len(scheduler.running),
        scheduler.max_num_running_reqs,
    )


def _room(scheduler: Any, scheduled_tokens: int) -> bool:
    """Whether requests, tokens and at least half of the KV cache are left over."""
    pool = scheduler.kv_cache_manager.block_pool
    return (
        len(scheduler.running) < scheduler.max_num_running_reqs
        and scheduled_tokens < scheduler.max_num_scheduled_tokens
        and 2 * pool.get_num_free_blocks() >= pool.num_gpu_blocks
        and scheduler.pause_state.name == "UNPAUSED"
    )
