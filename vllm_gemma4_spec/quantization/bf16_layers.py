"""Which of a drafter's linear layers in bfloat16 take the kernel for few rows: all that it suits.

Only drafts come from them, so another order of additions than cuBLAS's changes no answer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from vllm_gemma4_spec.kernels import bf16_gemm

MARK = "gemma4_spec_bf16_linear"  # in a config's additional_config, which is part of the key of compiled graphs


class FewRows(UnquantizedLinearMethod):
    """``apply`` by ``bf16_rows.cu`` or cuBLAS, by the number of rows.

    Args:
        gelu: give ``gelu_tanh(first half) * second half`` of the outputs.
    """

    def __init__(self, gelu: bool) -> None:
        self.gelu = gelu

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.vllm.gemma4_spec_bf16_linear(x, layer.weight, self.gelu)
        return y


def take(model: Module) -> None:
    """Let the kernel have what it suits of a drafter whose weights are loaded, before anything is compiled.

    That is of its language model, which is what vLLM compiles: towers have more rows.
    """
    compiled = [module for module in model.modules() if hasattr(module, "vllm_config")]
    modules = list({id(m): m for one in compiled for m in one.modules()}.values())
    gates = {id(m.gate_up_proj): m for m in modules if type(m).__name__ == "Gemma4MLP"}
    taken = 0
    for layer in modules:
        if not _plain(layer) or not bf16_gemm.suits(layer.weight):
            continue
        mlp = gates.get(id(layer))
        bf16_gemm.choose(layer.weight, gelu=mlp is not None)
        layer.quant_method = FewRows(gelu=mlp is not None)
        if mlp is not None:
            mlp.act_fn = torch.nn.Identity()
        taken += 1
    if not taken:
        return
    bf16_gemm.register_operator()
    for config in {id(one.vllm_config): one.vllm_config for one in compiled}.values():
        if isinstance(config.additional_config, dict):
            config.additional_config = {**config.additional_config, MARK: taken}


def _plain(layer: Module) -> bool:
    """Whether that is a linear layer as the checkpoint has it, and nothing more."""
    return (
        isinstance(layer, LinearBase)
        and type(layer.quant_method) is UnquantizedLinearMethod
        and getattr(layer, "bias", None) is None
    )
