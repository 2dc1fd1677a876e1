"""NVFP4 without an FP4 kernel: weight-only, activations in the model's dtype, as Marlin computes.

vLLM's own emulation is not used: it de-swizzles scales that were never swizzled and divides by the global
scale where ModelOpt's multiplies.
"""

from __future__ import annotations

import logging

import psutil
import torch
import vllm.envs as envs
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils import nvfp4_utils
from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import is_fp4_marlin_supported
from vllm.model_executor.layers.quantization.utils.nvfp4_utils import NvFp4LinearBackend
from vllm.platforms import current_platform

from vllm_gemma4_spec import settings
from vllm_gemma4_spec.checkpoints import nvfp4

logger = logging.getLogger("vllm.plugins.gemma4_spec")

_RESERVE = 0.1  # share of the machine's memory that dequantized weights leave alone
_UNQUANTIZED = UnquantizedLinearMethod()


def select_backend(weight_only: bool = False) -> NvFp4LinearBackend:
    """vLLM's choice; emulation where it has none: a CPU, or a GPU without a kernel that reads FP4.

    ``weight_only``: activations have no scale, so only Marlin can read the weights.
    """
    if current_platform.is_cpu():
        return NvFp4LinearBackend.EMULATION
    if weight_only and is_fp4_marlin_supported():
        return NvFp4LinearBackend.MARLIN
    try:
        return nvfp4_utils.select_nvfp4_linear_backend()
    except ValueError as error:
        if "No NVFP4 GEMM backend" not in str(error):
            raise
        return NvFp4LinearBackend.EMULATION


def fits(extra: int, device: torch.device) -> bool:
    """Whether ``extra`` bytes of dequantized weights may be allocated, by setting and by what is free now.

    On a CPU the KV cache is allocated after the weights, so its size is kept free.
    """
    choice = settings.NVFP4_WEIGHTS.read()
    if choice != "auto":
        return choice == "dequantized"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return bool(free - extra > total / 2)  # vLLM plans the KV cache from what is left
    memory = psutil.virtual_memory()
    cache = (envs.VLLM_CPU_KVCACHE_SPACE or 0) << 30
    return bool(memory.available - cache - extra > _RESERVE * memory.total)


def prepare(layer: Module) -> None:
    """From the loaded tensors to what :func:`linear` reads.

    Block scale times code is exact in bfloat16 and float32, so ``weight_scale_2`` multiplies the output
    (``emulated_scale``, float32, scalar or [N] where members differ) and only the output is rounded. In
    float16 such products overflow, so there it is folded into the weight. ``weight_scale`` stays only if
    the weight stays packed.
    """
    packed, scale, dtype = layer.weight.data, layer.weight_scale.data, layer.params_dtype
    factor = layer.weight_scale_2.data
    if len(factor) == 1:  # the shape must not depend on the values: they may be loaded again
        factor = factor[0].clone()
    else:
        factor = factor.repeat_interleave(torch.tensor(layer.logical_widths, device=packed.device))
    for name in ("weight_scale_2", "input_scale", "weight_scale", "weight"):
        if hasattr(layer, name):
            delattr(layer, name)
    layer.emulated_scale = Parameter(factor, requires_grad=False)
    if not hasattr(layer, "emulated_packed"):
        layer.emulated_packed = not fits(packed.numel() * 2 * dtype.itemsize, packed.device)
    if layer.emulated_packed:
        layer.weight = Parameter(packed, requires_grad=False)
        layer.weight_scale = Parameter(scale, requires_grad=False)
        return
    layer.weight = Parameter(_weight(packed, scale, factor, dtype), requires_grad=False)
    _UNQUANTIZED.process_weights_after_loading(layer)  # the CPU's own weight layout


def _weight(packed: Tensor, scale: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:
        return nvfp4.dequantize(packed, scale, factor, dtype)
    return nvfp4.decode(packed, scale, dtype)


def linear(layer: Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` [..., K] -> [..., N] in ``x``'s dtype."""
    if layer.emulated_packed:
        y = F.linear(x, _weight(layer.weight, layer.weight_scale, layer.emulated_scale, x.dtype))
    else:
        y = _UNQUANTIZED.apply(layer, x, None)
    if x.dtype != torch.float16:
        y = (y * layer.emulated_scale).to(x.dtype)
    return y if bias is None else y + bias
