"""The inputs of a draft's first pass on a GPU: its slots by one kernel."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_gemma4_spec import scope

# A proposer in scope prepares a first pass: ``compute_new_slot_mapping`` is given tensors and no config.
_prepares: contextvars.ContextVar[bool] = contextvars.ContextVar("gemma4_prepares", default=False)


def set_inputs_first_pass(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SpecDecodeBaseProposer.set_inputs_first_pass``: says whose pass it is, and gives indices as they are read.

    ``propose`` looks up three tensors with them; each look-up of int32 indices converts them first.

    Patch: ``first-pass-slots``. Evidence:
    ``tests/performance/test_first_pass_slots.py::test_stock_finds_slots_with_pytorchs_functions``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self.needs_extra_input_slots and self.device.type == "cuda" and scope.gemma4_engine(self.vllm_config)):
            return original(self, *args, **kwargs)
        token = _prepares.set(True)
        try:
            num_tokens, indices, metadata = original(self, *args, **kwargs)
        finally:
            _prepares.reset(token)
        return num_tokens, indices.long(), metadata

    return wrapper


def compute_new_slot_mapping(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``compute_new_slot_mapping``: one kernel on a GPU.

    Patch: ``first-pass-slots``. Evidence:
    ``tests/performance/test_first_pass_slots.py::test_stock_finds_slots_with_pytorchs_functions``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def wrapper(**kwargs: Any) -> torch.Tensor:
        if not _prepares.get():
            return original(**kwargs)
        from vllm_gemma4_spec.kernels.slot_mapping import first_pass_slots

        cad = kwargs["cad"]
        return first_pass_slots(
            cad.block_table_tensor,
            cad.query_start_loc,
            kwargs["new_positions"],
            kwargs["is_rejected_token_mask"],
            kwargs["num_new_tokens"],
            kwargs["block_size"],
            kwargs["max_model_len"],
        )

    return wrapper
