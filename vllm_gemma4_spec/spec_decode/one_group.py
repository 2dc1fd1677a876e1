"""``--disable-hybrid-kv-cache-manager``: all layers in one KV cache group, whatever their windows."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope

# Groups are being made for an engine in scope. `is_kv_cache_spec_uniform` is given layers' specs and no config.
_in_scope: contextvars.ContextVar[bool] = contextvars.ContextVar("groups_of_gemma4", default=False)


def get_kv_cache_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """``get_kv_cache_groups``: says whose groups they are.

    Patch: ``one-group-windows``. Evidence: ``tests/patching/test_stock.py::test_one_group_takes_one_window``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(vllm_config: Any, kv_cache_spec: dict[str, Any]) -> Any:
        token = _in_scope.set(scope.gemma4_engine(vllm_config))
        try:
            return original(vllm_config, kv_cache_spec)
        finally:
            _in_scope.reset(token)

    return wrapper


def is_kv_cache_spec_uniform(original: Callable[..., bool]) -> Callable[..., bool]:
    """Two sliding windows mean "not the same spec", not an error.

    The caller then finds that all layers need the same slots and puts them into one group that holds a
    spec per layer, as it does for two head sizes.

    Patch: ``one-group-windows``. Evidence: ``tests/patching/test_stock.py::test_one_group_takes_one_window``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(kv_cache_spec: dict[str, Any]) -> bool:
        try:
            return original(kv_cache_spec)
        except ValueError:
            if not _in_scope.get():
                raise
            return False

    return wrapper
