"""Which of a drafter's linear layers in bfloat16 take the kernel for few rows: all that it suits.

Only drafts come from them, so another order of additions than cuBLAS's changes no greedy answer.
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

    That is of its language model, which is what vLLM compiles: towers have more rows. Nothing with
    ``VLLM_BATCH_INVARIANT=1``, for which vLLM has GEMMs of its own.
    """
    import vllm.envs

    if vllm.envs.VLLM_BATCH_INVARIANT:
        return
    compiled = [module for module in model.modules() if hasattr(module, "vllm_config")]
    modules = list(dict.fromkeys(module for one in compiled for module in one.modules()))
    gates = {id(m.gate_up_proj): m for m in modules if type(m).__name__ == "Gemma4MLP"}
    layers = [layer for layer in modules if _plain(layer) and bf16_gemm.suits(layer.weight)]
    for layer in layers:
        bf16_gemm.choose(layer.weight, gelu=id(layer) in gates)
    _agree()
    for layer in layers:
        mlp = gates.get(id(layer))
        layer.quant_method = FewRows(gelu=mlp is not None)
        if mlp is not None:
            mlp.act_fn = torch.nn.Identity()
    if not layers:
        return
    bf16_gemm.register_operator()
    for config in {id(one.vllm_config): one.vllm_config for one in compiled}.values():
        if isinstance(config.additional_config, dict):
            config.additional_config = {**config.additional_config, MARK: len(layers)}


def _agree() -> None:
    """All ranks take the same kernels, those that every one of them takes.

    What each computes whole, an assistant's projections, must have the same bits on all: of a head by centroids each
    finds its draft by itself, and verifies it.
    """
    from vllm.distributed import get_tp_group
    from vllm.distributed.parallel_state import model_parallel_is_initialized

    if not model_parallel_is_initialized() or (group := get_tp_group()).world_size == 1:
        return
    found: list[dict[tuple[int, int, bool], int]] = [{}] * group.world_size
    torch.distributed.all_gather_object(found, bf16_gemm.chosen, group=group.cpu_group)
    for shape in bf16_gemm.chosen:
        bf16_gemm.chosen[shape] = min(rank.get(shape, 0) for rank in found)


def _plain(layer: Module) -> bool:
    """Whether that is a linear layer as the checkpoint has it, and nothing more."""
    return (
        isinstance(layer, LinearBase)
        and type(layer.quant_method) is UnquantizedLinearMethod
        and getattr(layer, "bias", None) is None
    )
