"""Sleep mode with a drafter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.errors import DrafterError


def engine_sleep(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineCore.sleep``: level 2 would drop a drafter's weights for good; 0.19.1 reloads the target's alone.

    Patch: ``drafter-checks``. Evidence:
    ``tests/patching/test_stock.py::test_a_drafter_that_does_not_fit_is_not_named_in_one_line``. Related upstream
    change: none found for the messages; #42516 repairs pipeline parallelism, without speculation.
    """

    @functools.wraps(original)
    def wrapper(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        spec = self.vllm_config.speculative_config
        ours = scope.gemma4_speculation(self.vllm_config) and (spec.uses_draft_model() or scope.is_assistant(spec))
        if level >= 2 and ours:
            raise DrafterError(
                f"sleep level {level} discards the drafter's weights, and vLLM 0.19.1 reloads only the target's; "
                "use level 1"
            )
        return original(self, level, *args, **kwargs)

    return wrapper
