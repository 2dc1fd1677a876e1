"""Draft positions stay inside blocks that their request owns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

LOOKAHEAD = "_gemma4_spec_lookahead"


def scheduler_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Scheduler.__init__``: tell the KV cache manager how many slots a first step must look ahead.

    With a KV connector the first step keeps none: the number of local blocks must equal the remote one's.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        setattr(self.kv_cache_manager, LOOKAHEAD, self.num_lookahead_tokens if self.connector is None else 0)

    return __init__


def allocate_slots(original: Callable[..., Any]) -> Callable[..., Any]:
    """``KVCacheManager.allocate_slots``: a new request's first step gets look-ahead slots, too.

    The scheduler passes 0 for it, and the drafter writes k tokens past the prompt in that very step.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("num_lookahead_tokens", 0) and len(args) <= 4:
            kwargs["num_lookahead_tokens"] = getattr(self, LOOKAHEAD, 0)
        return original(self, *args, **kwargs)

    return wrapper


def add_row(original: Callable[..., None]) -> Callable[..., None]:
    """``BlockTable.add_row``: what the row's last request left behind its end becomes block 0, the null block."""

    @functools.wraps(original)
    def wrapper(self: Any, block_ids: list[int], row_idx: int) -> None:
        before = self.num_blocks_per_row[row_idx]
        original(self, block_ids, row_idx)
        self.block_table.np[row_idx, self.num_blocks_per_row[row_idx] : before] = 0

    return wrapper


def move_row(original: Callable[..., None]) -> Callable[..., None]:
    """``BlockTable.move_row`` (``condense``): the row that moved away leaves nothing behind."""

    @functools.wraps(original)
    def wrapper(self: Any, src: int, tgt: int) -> None:
        before = self.num_blocks_per_row[tgt]
        original(self, src, tgt)
        self.block_table.np[tgt, self.num_blocks_per_row[tgt] : before] = 0
        if src != tgt:
            self.clear_row(src)

    return wrapper
