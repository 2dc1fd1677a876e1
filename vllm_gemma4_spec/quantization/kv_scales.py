"""Scales of an fp8 KV cache that a checkpoint brings: every layer reads the cache with those it was written with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.errors import CheckpointError

# Attribute of an attention layer: whether a scale of its first load was not 1.
SCALED = "_gemma4_spec_scaled"


def process_weights_after_loading(original: Callable[..., None]) -> Callable[..., None]:
    """``Attention.process_weights_after_loading``, for layers with an fp8 cache.

    A layer that reuses an earlier layer's KV takes that layer's scales. Where a scale is not 1, queries stay in
    16 bits: TRITON_ATTN multiplies neither keys nor values by their scales once the query is fp8.

    Patch: ``kv-scales``. Evidence:
    ``tests/quantization/test_kv_scales.py::test_the_kernel_drops_the_scales_of_fp8_queries``. Related upstream change:
    #49262, open for the V1 runner: the same for MTP drafters.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not self.kv_cache_dtype.startswith("fp8"):
            return
        config = scope.current_config()
        if not scope.gemma4_engine(config):
            return
        if self.kv_sharing_target_layer_name is not None:
            layers = config.compilation_config.static_forward_context
            source = layers[self.kv_sharing_target_layer_name]
            for name in ("k", "v"):
                getattr(self, f"_{name}_scale").copy_(getattr(source, f"_{name}_scale"))
                setattr(self, f"_{name}_scale_float", getattr(source, f"_{name}_scale_float"))
        before = self.__dict__.get(SCALED)
        scaled = (self._k_scale_float, self._v_scale_float) != (1.0, 1.0)
        if scaled and self.attn_backend.get_name() == "TRITON_ATTN":
            if before is False and self.query_quant is not None:
                raise CheckpointError(
                    f"{self.layer_name}: the scales of the KV cache were 1 when the engine was started, and its graphs "
                    "were made for that; start an engine with the new checkpoint"
                )
            self.query_quant = None
        setattr(self, SCALED, scaled)

    return wrapper


def init_fp8_kv_scales(original: Callable[..., None]) -> Callable[..., None]:
    """``GPUModelRunner.init_fp8_kv_scales`` (waking from sleep mode): a checkpoint's scales again, not 1.

    Patch: ``kv-scales``. Evidence:
    ``tests/quantization/test_kv_scales.py::test_the_kernel_drops_the_scales_of_fp8_queries``. Related upstream change:
    #49262, open for the V1 runner: the same for MTP drafters.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> None:
        original(self)
        if not scope.gemma4_engine(self.vllm_config):
            return
        for layer in self.compilation_config.static_forward_context.values():
            for name in ("_k_scale", "_v_scale"):
                scale = getattr(layer, f"{name}_float", None)
                if scale is not None:
                    getattr(layer, name).fill_(scale)

    return wrapper
