"""Draft positions stay inside blocks that their request owns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope

# Attribute of a KV cache manager: slots to look ahead in a first step; of a block table: its rows are kept clean.
LOOKAHEAD = "_gemma4_spec_lookahead"
CLEAN = "_gemma4_spec_clean_rows"


def scheduler_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Scheduler.__init__``: tell the KV cache manager how many slots a first step must look ahead.

    With a KV connector the first step keeps none: the number of local blocks must equal the remote one's.

    Patch: ``own-blocks``. Evidence:
    ``tests/spec_decode/test_own_blocks.py::test_stock_writes_drafts_where_the_request_owns_nothing``. Related upstream
    change: none found; since 0.23.0 the first step looks ahead.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.gemma4_speculation(self.vllm_config):
            setattr(self.kv_cache_manager, LOOKAHEAD, self.num_lookahead_tokens if self.connector is None else 0)

    return __init__


def allocate_slots(original: Callable[..., Any]) -> Callable[..., Any]:
    """``KVCacheManager.allocate_slots``: a new request's first step gets look-ahead slots, too.

    The scheduler passes 0 for it, and the drafter writes k tokens past the prompt in that very step.

    Patch: ``own-blocks``. Evidence:
    ``tests/spec_decode/test_own_blocks.py::test_stock_writes_drafts_where_the_request_owns_nothing``. Related upstream
    change: none found; since 0.23.0 the first step looks ahead.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        lookahead = getattr(self, LOOKAHEAD, 0)
        if lookahead and not kwargs.get("num_lookahead_tokens", 0) and len(args) <= 4:
            kwargs["num_lookahead_tokens"] = lookahead
        return original(self, *args, **kwargs)

    return wrapper


def block_table_init(original: Callable[..., None]) -> Callable[..., None]:
    """``BlockTable.__init__``: a worker builds it with its config made current, and only then can it be asked for.

    Patch: ``own-blocks``. Evidence:
    ``tests/spec_decode/test_own_blocks.py::test_stock_writes_drafts_where_the_request_owns_nothing``. Related upstream
    change: none found; since 0.23.0 the first step looks ahead.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.gemma4_speculation(scope.current_config()):
            setattr(self, CLEAN, True)

    return __init__


def add_row(original: Callable[..., None]) -> Callable[..., None]:
    """``BlockTable.add_row``: clears entries that the row's last request left past the new end.

    Patch: ``own-blocks``. Evidence:
    ``tests/spec_decode/test_own_blocks.py::test_stock_writes_drafts_where_the_request_owns_nothing``. Related upstream
    change: none found; since 0.23.0 the first step looks ahead.
    """

    @functools.wraps(original)
    def wrapper(self: Any, block_ids: list[int], row_idx: int) -> None:
        if not getattr(self, CLEAN, False):
            original(self, block_ids, row_idx)
            return
        before = self.num_blocks_per_row[row_idx]
        original(self, block_ids, row_idx)
        self.block_table.np[row_idx, self.num_blocks_per_row[row_idx] : before] = 0

    return wrapper


def move_row(original: Callable[..., None]) -> Callable[..., None]:
    """``BlockTable.move_row`` (``condense``): the row that moved away leaves nothing behind.

    Patch: ``own-blocks``. Evidence:
    ``tests/spec_decode/test_own_blocks.py::test_stock_writes_drafts_where_the_request_owns_nothing``. Related upstream
    change: none found; since 0.23.0 the first step looks ahead.
    """

    @functools.wraps(original)
    def wrapper(self: Any, src: int, tgt: int) -> None:
        if not getattr(self, CLEAN, False):
            original(self, src, tgt)
            return
        before = self.num_blocks_per_row[tgt]
        original(self, src, tgt)
        self.block_table.np[tgt, self.num_blocks_per_row[tgt] : before] = 0
        if src != tgt:
            self.clear_row(src)

    return wrapper
