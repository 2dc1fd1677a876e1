"""Norms and rotary embedding of a Gemma 4's heads as one operator.

The config says which engines have it, and which of their layers have not, before anything is compiled, because vLLM's
cache of compiled graphs goes by it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.performance import compile_settings

MARK = "gemma4_spec_norm_heads"  # of compile_settings.mark
OURS = "_gemma4_spec_norm_heads"  # attribute of a layer that has it


def vllm_config(original: Callable[..., None]) -> Callable[..., None]:
    """``VllmConfig.__post_init__``: the mark of a Gemma 4 whose heads are normed by one kernel, and so the key of its
    graphs.

    Patch: ``head-norms``. Evidence: ``tests/performance/test_head_norms.py::test_stock_norms_heads_one_by_one``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        original(self)
        if (
            scope.gemma4_model(self.model_config)
            and getattr(self.model_config, "dtype", None) == torch.bfloat16
            and compile_settings.card_takes_pdl()
        ):
            compile_settings.mark(self, MARK)

    return __post_init__


def suits(layer: Any) -> bool:
    """Whether the kernel does what this ``Gemma4Attention`` does with its heads."""
    q_norm, k_norm, v_norm = layer.q_norm, layer.k_norm, layer.v_norm
    return (
        turns(layer.rotary_emb, layer.head_dim)
        and all(norms(norm, weighted) for norm, weighted in ((q_norm, True), (k_norm, True), (v_norm, False)))
        and len({norm.variance_epsilon for norm in (q_norm, k_norm, v_norm)}) == 1
    )


def turns(rotary: Any, size: int) -> bool:
    """Whether the kernel turns heads of that size as this rotary embedding does."""
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    ways = "forward_native", "forward_cuda"
    return (
        isinstance(rotary, RotaryEmbedding)  # with own cosines, perhaps, but turning as this class does
        and all(getattr(type(rotary), way) is getattr(RotaryEmbedding, way) for way in ways)
        and size >= 64
        and size & (size - 1) == 0
        and rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size == size
        and rotary.cos_sin_cache.shape[1:] == (size,)
        and rotary.cos_sin_cache.dtype == torch.bfloat16
    )


def norms(norm: Any, weighted: bool) -> bool:
    """Whether the kernel norms as this ``RMSNorm`` does, with a weight or without."""
    return (
        norm.has_weight == weighted
        and norm.variance_size_override is None
        and (not weighted or norm.weight.dtype == torch.bfloat16)
    )


def attention_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Gemma4Attention.__init__``: of an engine with the mark, a layer that the kernel suits.

    Patch: ``head-norms``. Evidence: ``tests/performance/test_head_norms.py::test_stock_norms_heads_one_by_one``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = scope.current_config()
        if not compile_settings.marked(config, MARK):
            return
        take(self, (self.num_heads, _own_heads(self), self.head_dim), suits(self), config)

    return __init__


def take(layer: Any, heads: tuple[int, int, int], suited: bool, config: Any) -> None:
    """A layer of a config with the mark has the kernel, if it is suited and the kernel compiles for these ``heads``:
    query heads, key heads that are the layer's own, their size."""
    from vllm_gemma4_spec.kernels import head_norms

    if suited and head_norms.available(*heads):
        head_norms.register_operator()
        setattr(layer, OURS, True)
    else:  # another graph than that of a start where it has it
        config.additional_config[MARK] = f"{config.additional_config[MARK]}, not {heads}"


def _own_heads(layer: Any) -> int:
    """Key heads that are the layer's own: none where it reads what another one has written."""
    return 0 if layer.is_kv_shared_layer else int(layer.num_kv_heads)


def forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``Gemma4Attention.forward``: with one operator between the layer's ``qkv_proj`` and its attention.

    Patch: ``head-norms``. Evidence: ``tests/performance/test_head_norms.py::test_stock_norms_heads_one_by_one``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, positions: Tensor, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not getattr(self, OURS, False):
            return original(self, positions, hidden_states, **kwargs)
        qkv, _ = self.qkv_proj(hidden_states)
        _, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)  # raw, where another layer's count
        heads = torch.ops.vllm.gemma4_spec_norm_heads(
            qkv,
            positions,
            self.rotary_emb.cos_sin_cache,
            self.q_norm.weight,
            self.k_norm.weight,
            self.num_heads,
            _own_heads(self),
            self.q_norm.variance_epsilon,
        )
        tokens = qkv.shape[0]
        q = heads[: tokens * self.q_size].view(tokens, self.q_size)
        if not self.is_kv_shared_layer:
            k, v = heads[tokens * self.q_size :].view(2, tokens, self.kv_size).unbind()
        output, _ = self.o_proj(self.attn(q, k, v))
        return output

    return wrapper
