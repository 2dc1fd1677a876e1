"""A pass of vLLM's over the compiled graph: an all-reduce and the norms behind it become one kernel on two GPUs.

What a Gemma 4 layer does with the sum over the ranks is ``norm(sum) + residual``, times ``layer_scalar`` behind an MLP
without per-layer embeddings, and mostly the next norm. vLLM's own pass, with FlashInfer's kernels, takes one norm
behind an all-reduce: no kernel less, since torch.compile makes one of all that follows. It gets what this pass leaves.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch._inductor.pattern_matcher as pm
from torch import Tensor, fx
from torch._inductor.pattern_matcher import PatternMatcherPass
from vllm.compilation.passes.fusion.matcher_utils import MatcherRMSNorm
from vllm.compilation.passes.inductor_pass import enable_fake_mode
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass, VllmPatternMatcherPass
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce

from vllm_gemma4_spec.kernels import all_reduce_norm

_EPS = 1e-6  # every Gemma 4's rms_norm_eps


def suits(model_config: Any) -> bool:
    """Whether the kernel takes the model's rows, and there is a second rank that it shares them with."""
    width = model_config.get_hidden_size()
    return (
        get_tp_group().world_size == all_reduce_norm.RANKS  # a whole drafter on each rank has none
        and model_config.dtype == torch.bfloat16
        and width % 8 == 0
        and width <= all_reduce_norm.WIDEST
    )


class AllReduceNormPass(VllmPatternMatcherPass):
    """Replaces what a layer makes of an all-reduce by :mod:`vllm_gemma4_spec.kernels.all_reduce_norm`'s operator."""

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        self.patterns = PatternMatcherPass(pass_name="gemma4_spec_all_reduce_norm")
        self._register()
        self.dump_patterns(config, self.patterns)

    @enable_fake_mode
    def _register(self) -> None:
        norm, group = MatcherRMSNorm(_EPS), get_tp_group().unique_name
        fused = torch.ops.vllm.gemma4_spec_all_reduce_norm.default

        def hidden(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
            return norm(tensor_model_parallel_all_reduce(x), weight) + residual

        def scaled(x: Tensor, weight: Tensor, residual: Tensor, scale: Tensor, next_weight: Tensor) -> Any:
            kept = hidden(x, weight, residual) * scale
            return norm(kept, next_weight), kept

        def with_scale(x: Tensor, weight: Tensor, residual: Tensor, scale: Tensor, next_weight: Tensor) -> Any:
            kept, normed = fused(x, weight, residual, scale, next_weight, _EPS, group)
            return normed, kept

        def followed(x: Tensor, weight: Tensor, residual: Tensor, next_weight: Tensor) -> Any:
            kept = hidden(x, weight, residual)
            return norm(kept, next_weight), kept

        def with_next(x: Tensor, weight: Tensor, residual: Tensor, next_weight: Tensor) -> Any:
            kept, normed = fused(x, weight, residual, None, next_weight, _EPS, group)
            return normed, kept

        def alone(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
            return fused(x, weight, residual, None, None, _EPS, group)[0]

        row, weight = norm.empty(5, 16), norm.empty(16)
        examples = {
            "x": row,
            "weight": weight,
            "residual": row.clone(),
            "scale": norm.empty(1),
            "next_weight": weight.clone(),
        }
        for search, replace in ((scaled, with_scale), (followed, with_next), (hidden, alone)):  # the longest first
            inputs = [examples[name] for name in inspect.signature(search).parameters]
            pm.register_replacement(search, replace, inputs, pm.fwd_only, self.patterns)

    @VllmInductorPass.time_and_log
    def __call__(self, graph: fx.Graph) -> None:
        self.matched_count = self.patterns.apply(graph)

    def uuid(self) -> str:
        return VllmInductorPass.hash_source(self, all_reduce_norm.source(0, 0.0, True, True, True))
