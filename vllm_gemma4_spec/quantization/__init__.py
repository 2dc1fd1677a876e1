"""ModelOpt's NVFP4 checkpoints in vLLM 0.19.1: NVFP4_AWQ, NVFP4_SVD, NaN block scales, experts, any backend."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """``Nvfp4Config``, by which a worker unpickles a quantization config; it is made when it is first asked for."""
    if name != "Nvfp4Config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_gemma4_spec.quantization import config

    return config.Nvfp4Config
