"""Between a ModelOpt checkpoint's files and vLLM's model: checked first, names of the low-rank factors unified."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.checkpoints import files

# Revision and cache folder of the model whose quantization config is being made; vLLM hands on its name alone.
asked: contextvars.ContextVar[tuple[str | None, str | None]] = contextvars.ContextVar("asked", default=(None, None))


def quantization_config(original: staticmethod[..., Any]) -> staticmethod[..., Any]:
    """``VllmConfig._get_quantization_config`` for ``modelopt_fp4``: says which revision, and where downloads are."""

    @functools.wraps(original.__func__)
    def wrapper(model_config: Any, load_config: Any) -> Any:
        if not scope.modelopt_nvfp4(model_config):
            return original.__func__(model_config, load_config)
        token = asked.set((model_config.revision, load_config.download_dir))
        try:
            return original.__func__(model_config, load_config)
        finally:
            asked.reset(token)

    return staticmethod(wrapper)


def checked_weights(original: Callable[..., Iterator[tuple[str, Tensor]]]) -> Callable[..., Any]:
    """``DefaultModelLoader.get_all_weights`` for ``modelopt_fp4``; other models pass through untouched.

    The headers of all shards are compared before the first tensor is read, so a cut or incomplete download
    is named by file and tensor instead of loading for minutes.
    """

    @functools.wraps(original)
    def get_all_weights(self: Any, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        stream = original(self, model_config, model)
        if not scope.modelopt_nvfp4(model_config):
            return stream
        _, shards, safetensors = self._prepare_weights(model_config.model, None, model_config.revision, True, None)
        if safetensors:
            for module in files.quantized_modules(files.read_headers(Path(f) for f in sorted(shards))).values():
                module.check()
        return ((files.canonical(name), tensor) for name, tensor in stream)

    return get_all_weights


def known_algorithm(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_normalize_quantization_config`` that lets hf_quant_config.json's NVFP4_AWQ and NVFP4_SVD through.

    vLLM raises for an algorithm it does not know before any quantization config is asked.
    """

    @functools.wraps(original)
    def _normalize_quantization_config(self: Any, config: Any) -> Any:
        found = getattr(config, "quantization_config", None) or {}
        section, producer = (found.get(key) for key in ("quantization", "producer"))
        if isinstance(section, dict) and isinstance(producer, dict) and producer.get("name") == "modelopt":
            algorithm = str(section.get("quant_algo", "")).upper()
            if algorithm in files.ALGORITHMS and algorithm != "NVFP4":
                found["quant_method"] = "modelopt"
                return found
        return original(self, config)

    return _normalize_quantization_config
