"""Block tables of all KV cache groups to a GPU by one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec.performance.step_slots import groups_of
from vllm_gemma4_spec.spec_decode.block_tables import CLEAN

# Attribute of a ``MultiGroupBlockTable`` with its :class:`TableCopies`.
COPIES = "_gemma4_spec_table_copies"


def may_reinitialize_input_batch(original: Callable[..., None]) -> Callable[..., None]:
    """``GPUModelRunner.may_reinitialize_input_batch``: the tables that a Gemma 4's engine will use know their kernel.

    Patch: ``table-copies``. Evidence: ``tests/performance/test_table_copies.py::test_stock_copies_each_table``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        together = groups_of(self)
        if together is None:
            return
        from vllm_gemma4_spec.kernels import table_copies

        tables = together.block_tables
        if table_copies.reachable(tables):
            clean = all(getattr(t, CLEAN, False) for t in tables)
            setattr(together, COPIES, table_copies.TableCopies(tables, clean=clean))

    return wrapper


def commit_block_table(original: Callable[..., None]) -> Callable[..., None]:
    """``MultiGroupBlockTable.commit_block_table``: one launch where the tables have a kernel.

    Patch: ``table-copies``. Evidence: ``tests/performance/test_table_copies.py::test_stock_copies_each_table``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, num_reqs: int) -> None:
        copies = self.__dict__.get(COPIES)
        if copies is None:
            original(self, num_reqs)
        else:
            copies(num_reqs)

    return wrapper
