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
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    rotary, size = layer.rotary_emb, layer.head_dim
    norms = layer.q_norm, layer.k_norm, layer.v_norm
    turns = "forward_native", "forward_cuda"
    return (
        isinstance(rotary, RotaryEmbedding)  # with own cosines, perhaps, but turning as this class does
        and all(getattr(type(rotary), turn) is getattr(RotaryEmbedding, turn) for turn in turns)
        and size >= 64
        and size & (size - 1) == 0
        and rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size == size
        and rotary.cos_sin_cache.shape[1:] == (size,)
        and [norm.has_weight for norm in norms] == [True, True, False]
        and len({norm.variance_epsilon for norm in norms}) == 1
        and all(norm.variance_size_override is None for norm in norms)
        and {layer.q_norm.weight.dtype, layer.k_norm.weight.dtype, rotary.cos_sin_cache.dtype} == {torch.bfloat16}
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
        from vllm_gemma4_spec.kernels import head_norms

        heads = self.num_heads, _own_heads(self), self.head_dim
        if suits(self) and head_norms.available(*heads):
            head_norms.register_operator()
            setattr(self, OURS, True)
        else:  # another graph than that of a start where it has it
            config.additional_config[MARK] = f"{config.additional_config[MARK]}, not {heads}"

    return __init__


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
