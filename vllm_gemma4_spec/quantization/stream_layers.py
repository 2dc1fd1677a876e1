"""Which NVFP4 linear layers stream Marlin's weights in small batches: all that would run on Marlin.

A drafter's layers have a second copy of their weights and a kernel of their own (``small_batch_layers``) for their
smallest batches, and stream in those that are too large for it: its first pass with many requests.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from vllm_gemma4_spec import scope, settings
from vllm_gemma4_spec.quantization import activations, small_batch_layers
from vllm_gemma4_spec.quantization.small_batch_layers import scale_stands_alone


def prepare(layer: Module) -> None:
    """Decide for a layer whose weight Marlin has reordered.

    Sets ``streamed``, the batches that stream (``stream_gemm.faster``; 0: it stays Marlin's), ``stream_scaled``,
    whether the kernel multiplies by ``pre_quant_scale``, and ``stream_branch``, whether it adds the low-rank branch.
    ``activations.fuse`` sets ``stream_gelu`` later.
    """
    from vllm_gemma4_spec.kernels import stream_gemm

    if not hasattr(layer, "stream_wanted"):  # weights that are loaded again are treated as the first were
        ours = settings.STREAM_GEMM.on() and scope.gemma4_engine(scope.current_config())
        layer.stream_wanted = ours and stream_gemm.suits(layer)
    if not layer.stream_wanted:
        return
    stream_gemm.reserve(layer.output_size_per_partition, layer.input_size_per_partition, layer.weight.device)
    layer.streamed = stream_gemm.faster(layer)
    alone = layer.streamed != 0 and layer.rows_codes is None
    layer.stream_scaled = alone and scale_stands_alone(layer)
    layer.stream_branch = alone and _branch(layer)
    if layer.stream_gelu:  # weights that are loaded again: what is compiled has its activation in the operator
        layer.streamed = stream_gemm.faster(layer, gelu=True)


def _branch(layer: Module) -> bool:
    from vllm_gemma4_spec.kernels import stream_gemm

    a = layer.svdquant_lora_a
    if a is None or not stream_gemm.branch_available(a.shape[0], a.dtype):
        return False
    if not bool(layer.weight_global_scale > 0):  # the branch is divided by it, to be added to unscaled sums
        return False
    stream_gemm.reserve_branch(a.device)
    return True


def fuse_activations(model: Module) -> None:
    """Let gate and up of a model that has been loaded give ``gelu(gate) * up`` themselves: one kernel less per layer.

    Not where adapters of LoRA add to their outputs, which the activation must come behind.
    """
    config = scope.current_config()
    if not scope.gemma4_engine(config) or getattr(config, "lora_config", None) or small_batch_layers.loading_drafter():
        return  # a drafter's layers have a kernel for their smallest batches, see small_batch_layers
    for module in model.modules():
        layer = getattr(module, "gate_up_proj", None)
        if type(module).__name__ != "Gemma4MLP" or getattr(layer, "rows_codes", None) is not None:
            continue
        if getattr(module.down_proj, "pre_quant_scale", None) is not None:
            continue  # the activation multiplies by it on its way: without it that would be a kernel of its own
        if activations.fuse(layer):
            module.act_fn = torch.nn.Identity()


def linear(layer: Module, x: Tensor) -> Tensor:
    """``[..., K]`` to ``[..., N]``, or ``[..., N / 2]`` with ``layer.stream_gelu``. torch.compile traces this.

    Multiplies by ``pre_quant_scale`` first if ``layer.stream_scaled``; adds the branch if ``layer.stream_branch``.
    """
    return torch.ops.vllm.gemma4_spec_stream_linear(
        x,
        layer.pre_quant_scale if layer.stream_scaled else None,
        layer.weight,
        layer.weight_scale,
        layer.weight_global_scale,
        layer.workspace,
        layer.output_size_per_partition,
        layer.streamed,
        layer.svdquant_lora_a if layer.stream_branch else None,
        layer.svdquant_lora_b if layer.stream_branch else None,
        layer.stream_gelu,
    )
