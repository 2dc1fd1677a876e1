"""Activations that streaming GEMMs give themselves, of targets' layers and of drafters' in their larger batches."""

from __future__ import annotations

from typing import Any

from vllm_gemma4_spec.quantization import compile_key


def fuse(layer: Any) -> bool:
    """Whether the activation behind a layer that has been loaded is part of its streaming GEMM from now on.

    Not where fewer batches would stream then. All ranks of a machine read the same times.
    """
    from vllm_gemma4_spec.kernels import stream_gemm

    streamed = getattr(layer, "streamed", 0)
    if not streamed or layer.stream_scaled or layer.svdquant_lora_a is not None or not layer.weight.is_cuda:
        return False  # a weight that is offloaded lies with the host by now
    n, k = layer.output_size_per_partition, layer.input_size_per_partition
    if not stream_gemm.halves_are_tiles(n) or not stream_gemm.gelu_available():
        return False
    stream_gemm.reserve(n, k, layer.weight.device, gelu=True)
    fused = stream_gemm.faster(layer, gelu=True)
    if fused & streamed != streamed:
        return False
    layer.streamed, layer.stream_gelu = fused, True
    compile_key.add(layer.modelopt_additional, f"{layer.prefix} gelu {fused}")
    return True
