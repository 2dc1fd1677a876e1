"""The target's layers whose KV an assistant's layers read."""

from __future__ import annotations

import copy

from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

SLIDING, FULL = "sliding_attention", "full_attention"


def find(vllm_config: VllmConfig) -> dict[str, Attention]:
    """Layer type -> the target's last layer of that type that has KV of its own: 58 and 59 of 31B, 22 and 23 of E4B.

    Called before the drafter's own layers are made; the target's have been.
    """
    out: dict[str, tuple[int, Attention]] = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if not isinstance(layer, Attention) or layer.kv_sharing_target_layer_name is not None:
            continue
        kind = FULL if layer.sliding_window is None else SLIDING
        index = extract_layer_index(name)
        if kind not in out or index > out[kind][0]:
            out[kind] = (index, layer)
    return {kind: layer for kind, (_, layer) in out.items()}


def attention(donor: Attention, num_heads: int, scale: float, cache_config: CacheConfig, prefix: str) -> Attention:
    """An attention layer with ``num_heads`` query heads of this rank that reads ``donor``'s KV and never writes.

    ``Attention`` accepts only a donor with a smaller index under the same prefix, so the link is made afterwards, in
    the module and in its implementation: TRITON_ATTN's cache is written by the module, CPU_ATTN's by the
    implementation, each by its own copy of the name.
    """
    cache_config = copy.copy(cache_config)
    # The donor's dtype, whatever an index of its layer in the options says about ours.
    cache_config.cache_dtype, cache_config.kv_cache_dtype_skip_layers = donor.kv_cache_dtype, []
    cache_config.calculate_kv_scales = False  # of keys, which are the donor's
    made = Attention(
        num_heads,
        donor.head_size,
        scale,
        num_kv_heads=donor.num_kv_heads,
        cache_config=cache_config,
        per_layer_sliding_window=donor.sliding_window,
        prefix=prefix,
        attn_backend=donor.get_attn_backend(),
    )
    made.kv_sharing_target_layer_name = donor.layer_name
    if hasattr(made.impl, "kv_sharing_target_layer_name"):
        made.impl.kv_sharing_target_layer_name = donor.layer_name
    return made
