"""The slots of a step's tokens on a GPU: one kernel for all KV cache groups."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import cuda

# Attribute of a ``MultiGroupBlockTable`` with its :class:`StepSlots`.
SLOTS = "_gemma4_spec_step_slots"


def groups_of(runner: Any) -> Any:
    """A runner's ``MultiGroupBlockTable``, if it is a Gemma 4 engine's on CUDA and has several groups; else None."""
    together = runner.input_batch.block_table
    several = cuda.nvidia(runner.device) and len(together.block_tables) > 1
    return together if several and scope.gemma4_engine(runner.vllm_config) else None


def may_reinitialize_input_batch(original: Callable[..., None]) -> Callable[..., None]:
    """``GPUModelRunner.may_reinitialize_input_batch``: the tables that a Gemma 4's engine will use know their kernel.

    Context parallelism keeps vLLM's kernel: a rank holds some of the slots alone.

    Patch: ``step-slots``. Evidence: ``tests/performance/test_step_slots.py::test_stock_launches_a_kernel_a_group``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        together = groups_of(self)
        if together and all(t.pcp_world_size * t.dcp_world_size == 1 for t in together.block_tables):
            from vllm_gemma4_spec.kernels.slot_mapping import StepSlots

            setattr(together, SLOTS, StepSlots(together.block_tables))

    return wrapper


def compute_slot_mapping(original: Callable[..., None]) -> Callable[..., None]:
    """``MultiGroupBlockTable.compute_slot_mapping``: one launch where the tables have a kernel.

    Patch: ``step-slots``. Evidence: ``tests/performance/test_step_slots.py::test_stock_launches_a_kernel_a_group``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor) -> None:
        slots = self.__dict__.get(SLOTS)
        if slots is None:
            original(self, num_reqs, query_start_loc, positions)
        else:
            slots(num_reqs, query_start_loc, positions)

    return wrapper
