"""ModelOpt's NVFP4 checkpoints in vLLM 0.19.1: NVFP4_AWQ, NVFP4_SVD, NaN block scales, experts, any backend."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """``Nvfp4Config``, by which a worker unpickles a quantization config; nothing else, and not before.

    vLLM's module comes first and whole: its import hook asks for the same class, and some of our hooks run
    while vLLM's own config is still being imported.
    """
    if name != "Nvfp4Config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vllm.model_executor.layers.quantization.modelopt  # noqa: F401

    from vllm_gemma4_spec.quantization.config import Nvfp4Config

    return Nvfp4Config
