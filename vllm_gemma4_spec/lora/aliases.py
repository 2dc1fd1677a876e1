"""A layer that a model holds under two names takes an adapter's weights once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope


def register_module(original: Callable[..., None]) -> Callable[..., None]:
    """``LoRAModelManager.register_module``: a layer keeps the name it was registered under first.

    ``Gemma4Model`` holds every layer as ``layers.N`` and again in its self- or cross-decoder. Adapters know the
    first name; under the second the manager finds no weights and clears those that it has just set.

    Patch: ``lora-aliases``. Evidence: ``tests/lora/test_lora.py::test_stock_ignores_the_adapter``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, module_name: str, module: Any) -> None:
        aliased = scope.gemma4(getattr(self.model, "config", None)) and any(
            known is module for known in self.modules.values()
        )
        if not aliased:
            original(self, module_name, module)

    return wrapper
