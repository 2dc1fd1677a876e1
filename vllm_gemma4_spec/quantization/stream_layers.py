"""Which NVFP4 linear layers stream Marlin's weights in small batches: those of a target that would run on Marlin.

A drafter's layers have a second copy of their weights and a kernel of their own (``small_batch_layers``); a target's
weights are too large for that.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

from vllm_gemma4_spec import settings


def prepare(layer: Module) -> None:
    """Decide for a layer whose weight Marlin has reordered; sets ``streamed_rows``, 0 where it stays Marlin's."""
    from vllm_gemma4_spec.kernels import stream_gemm

    layer.streamed_rows = 0
    if not settings.STREAM_GEMM.on() or not stream_gemm.suits(layer):
        return
    n, k = layer.output_size_per_partition, layer.input_size_per_partition
    stream_gemm.reserve(n, k, layer.weight.device)
    layer.streamed_rows = stream_gemm.FASTER_ROWS


def linear(layer: Module, x: Tensor, pre_quant_scale: Tensor | None) -> Tensor:
    """``[..., K]`` to ``[..., N]``. torch.compile traces this."""
    import torch

    return torch.ops.vllm.gemma4_spec_stream_linear(
        x,
        pre_quant_scale,
        layer.weight,
        layer.weight_scale,
        layer.weight_global_scale,
        layer.workspace,
        layer.output_size_per_partition,
        layer.streamed_rows,
    )
