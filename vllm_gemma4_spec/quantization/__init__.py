"""ModelOpt's checkpoints in vLLM 0.19.1: every NVFP4, mixed with FP8 too, NaN block scales, experts, any backend."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """The quantization configs that a worker unpickles; each is made when it is first asked for."""
    if name == "Nvfp4Config":
        from vllm_gemma4_spec.quantization import config

        return config.Nvfp4Config
    if name != "MixedConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_gemma4_spec.quantization import mixed

    return mixed.MixedConfig
