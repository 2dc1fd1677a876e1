"""Between a ModelOpt checkpoint's files and vLLM's model: checked first, names of the low-rank factors unified."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_gemma4_spec.checkpoints import files, layers

_MODELOPT = ("modelopt", "modelopt_fp4", "modelopt_mixed")


def checked_weights(original: Callable[..., Iterator[tuple[str, Tensor]]]) -> Callable[..., Any]:
    """``DefaultModelLoader.get_all_weights``; models that are neither ModelOpt's nor Gemma 4 pass through untouched.

    The headers of all shards are compared before the first tensor is read, so a cut or incomplete download
    is named by file and tensor instead of loading for minutes.
    """

    @functools.wraps(original)
    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        stream = original(self, model_config, model)
        if model_config.quantization not in _MODELOPT:
            gemma = getattr(model_config.hf_config, "model_type", None) in ("gemma4", "gemma4_text")
            return ((layers.canonical(name), tensor) for name, tensor in stream) if gemma else stream
        _, shards, safetensors = self._prepare_weights(model_config.model, None, model_config.revision, True, None)
        if safetensors:
            tensors = files.read_headers(Path(f) for f in sorted(shards))
            written = getattr(model_config.hf_config, "quantization_config", None) or {}
            section = written.get("quantization", written)
            layers.check(layers.describe(tensors, section if isinstance(section, dict) else {}))
        return ((layers.canonical(name), tensor) for name, tensor in stream)

    return get_all_weights


def known_algorithm(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_normalize_quantization_config`` that lets hf_quant_config.json's NVFP4_AWQ, NVFP4_SVD and others through.

    vLLM raises for an algorithm it does not know before any quantization config is asked.
    """

    @functools.wraps(original)
    def _normalize_quantization_config(self: Any, config: Any) -> Any:
        found = getattr(config, "quantization_config", None) or {}
        section, producer = (found.get(key) for key in ("quantization", "producer"))
        if isinstance(section, dict) and isinstance(producer, dict) and producer.get("name") == "modelopt":
            algorithm = layers.algorithm(section)
            if algorithm == layers.MIXED or (algorithm in layers.NVFP4 and algorithm != "NVFP4"):
                found["quant_method"] = "modelopt"
                return found
        return original(self, config)

    return _normalize_quantization_config
