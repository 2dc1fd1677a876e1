"""``allowed_token_ids`` stay with their request when the batch's rows move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope

# Attribute of an InputBatch of an engine in scope.
MARK = "_gemma4_spec_rows"


def update_states(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner._update_states``, in which requests come, go and move: says whose batch it is.

    Patch: ``allowed-tokens``. Evidence:
    ``tests/requests/test_allowed_tokens.py::test_stock_leaves_them_to_another_request``. Related upstream change:
    #43894, #43931, #48419.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.input_batch, MARK):  # the runner makes a new one when its cache is known
            setattr(self.input_batch, MARK, scope.gemma4_engine(self.vllm_config))
        return original(self, *args, **kwargs)

    return wrapper


def add_request(original: Callable[..., int]) -> Callable[..., int]:
    """``InputBatch.add_request``: a request without allowed ids does not get those that moved away from its row.

    Patch: ``allowed-tokens``. Evidence:
    ``tests/requests/test_allowed_tokens.py::test_stock_leaves_them_to_another_request``. Related upstream change:
    #43894, #43931, #48419.
    """

    @functools.wraps(original)
    def wrapper(self: Any, request: Any) -> int:
        row = original(self, request)
        mask = self.allowed_token_ids_mask_cpu_tensor
        if mask is not None and getattr(self, MARK, False) and request.req_id not in self.has_allowed_token_ids:
            mask[row].fill_(False)
        return row

    return wrapper


def swap_states(original: Callable[..., None]) -> Callable[..., None]:
    """``InputBatch.swap_states``: the original swaps views, so that both rows get the second's ids.

    Patch: ``allowed-tokens``. Evidence:
    ``tests/requests/test_allowed_tokens.py::test_stock_leaves_them_to_another_request``. Related upstream change:
    #43894, #43931, #48419.
    """

    @functools.wraps(original)
    def wrapper(self: Any, i1: int, i2: int) -> None:
        mask = self.allowed_token_ids_mask_cpu_tensor
        if mask is None or not getattr(self, MARK, False):
            original(self, i1, i2)
            return
        first = mask[i1].clone()
        original(self, i1, i2)
        mask[i2].copy_(first)

    return wrapper
