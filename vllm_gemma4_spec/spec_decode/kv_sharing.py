"""Layers that reuse an earlier layer's KV: their weights and their KV cache specs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

from vllm_gemma4_spec import scope


def load_weights(original: Callable[..., set[str]]) -> Callable[..., set[str]]:
    """``Gemma4Model.load_weights``: weights that a KV-shared layer never uses need not be in the checkpoint.

    transformers 5.5.4 writes no k_proj, v_proj and k_norm for such layers. q_proj marks the fused qkv_proj
    as loaded; k_norm is what vLLM's loader then misses.

    Patch: ``kv-shared-layers``. Evidence:
    ``tests/patching/test_stock.py::test_a_saved_e4b_lacks_weights_that_nothing_reads``. Related upstream change: none
    found; since 0.30.0 such layers have a q_proj only.
    """

    @functools.wraps(original)
    def wrapper(self: Any, weights: Any) -> set[str]:
        loaded = original(self, weights)
        layers = (m for m in self.layers if getattr(getattr(m, "self_attn", None), "is_kv_shared_layer", False))
        shared = {id(p) for layer in layers for p in layer.self_attn.k_norm.parameters()}
        return loaded | {name for name, p in self.named_parameters() if id(p) in shared}

    return wrapper


def add_kv_sharing_layers(original: Callable[..., None]) -> Callable[..., None]:
    """Give every KV-shared layer its target layer's spec in groups that hold a spec per layer.

    Such groups (``--disable-hybrid-kv-cache-manager`` with two head sizes) look each layer's spec up by
    name, and 0.19.1 adds the layer's name only.

    Patch: ``kv-shared-layers``. Evidence:
    ``tests/patching/test_stock.py::test_a_saved_e4b_lacks_weights_that_nothing_reads``. Related upstream change: none
    found; since 0.30.0 such layers have a q_proj only.
    """

    @functools.wraps(original)
    def wrapper(shared_kv_cache_layers: dict[str, str], kv_cache_groups: list[Any], *args: Any, **kwargs: Any) -> None:
        original(shared_kv_cache_layers, kv_cache_groups, *args, **kwargs)
        if not scope.gemma4_engine(scope.current_config()):
            return
        for group in kv_cache_groups:
            if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
                specs = group.kv_cache_spec.kv_cache_specs
                specs.update({n: specs[t] for n, t in shared_kv_cache_layers.items() if t in specs})

    return wrapper
