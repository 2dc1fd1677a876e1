"""The soft cap of a Gemma 4's logits: one kernel on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import cuda

# Attribute of a ``LogitsProcessor`` whose engine is a Gemma 4's.
OURS = "_gemma4_spec_soft_cap"


def logits_processor_init(original: Callable[..., None]) -> Callable[..., None]:
    """``LogitsProcessor.__init__``: a Gemma 4's knows that it is.

    Patch: ``soft-cap``. Evidence: ``tests/performance/test_soft_cap.py::test_stock_caps_with_three_kernels``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if scope.gemma4_engine(scope.current_config()):
            setattr(self, OURS, True)

    return __init__


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``LogitsProcessor.forward``: the original without its cap, then the kernel, or PyTorch where that does not fit.

    Patch: ``soft-cap``. Evidence: ``tests/performance/test_soft_cap.py::test_stock_caps_with_three_kernels``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, lm_head: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        cap = self.soft_cap
        # Logits that are its input are the caller's; a scale comes behind the cap.
        plain = cap is None or self.logits_as_input or self.scale != 1.0
        if plain or not getattr(self, OURS, False) or not cuda.nvidia(hidden_states):
            return original(self, lm_head, hidden_states, *args, **kwargs)
        from vllm_gemma4_spec.kernels import soft_cap as kernel

        self.soft_cap = None
        try:
            logits = original(self, lm_head, hidden_states, *args, **kwargs)
        finally:
            self.soft_cap = cap
        if logits is None:
            return None
        if kernel.suits(logits):
            return kernel.soft_cap(logits, cap)
        return (logits / cap).tanh() * cap

    return wrapper
