"""ModelOpt's checkpoints in vLLM 0.19.1: every NVFP4, mixed with FP8 too, NaN block scales, experts, any backend."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """The quantization configs that a worker unpickles; nothing else, and not before.

    vLLM's module comes first and whole: its import hook asks for the same class, and some of our hooks run
    while vLLM's own config is still being imported.
    """
    if name not in ("Nvfp4Config", "MixedConfig"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vllm.model_executor.layers.quantization.modelopt  # noqa: F401

    from vllm_gemma4_spec.quantization.config import Nvfp4Config
    from vllm_gemma4_spec.quantization.mixed import MixedConfig

    return Nvfp4Config if name == "Nvfp4Config" else MixedConfig
