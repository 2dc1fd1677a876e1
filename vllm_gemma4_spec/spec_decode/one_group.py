"""``--disable-hybrid-kv-cache-manager``: all layers in one KV cache group, whatever their windows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def is_kv_cache_spec_uniform(original: Callable[..., bool]) -> Callable[..., bool]:
    """Two sliding windows mean "not the same spec", not an error.

    The caller then finds that all layers need the same slots and puts them into one group that holds a
    spec per layer, as it does for two head sizes.
    """

    @functools.wraps(original)
    def wrapper(kv_cache_spec: dict[str, Any]) -> bool:
        try:
            return original(kv_cache_spec)
        except ValueError:
            return False

    return wrapper
