"""Which engines this topic is for."""

from __future__ import annotations

from typing import Any

MODEL_TYPES = frozenset({"gemma4", "gemma4_text"})


# To be replaced by the shared predicate of vllm_gemma4_spec/scope.py.
def gemma4_model(model_config: Any) -> bool:
    """Whether a ``ModelConfig`` is a Gemma 4's; False for None."""
    return getattr(getattr(model_config, "hf_config", None), "model_type", None) in MODEL_TYPES
