"""ModelOpt's FP8 linears (one float8 scale a weight): members that a checkpoint lacks, and a CPU.

W[n, k] = float32(weight[n, k]) * weight_scale        of the member of a fused layer that row n belongs to
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from vllm_gemma4_spec.errors import CheckpointError

_UNQUANTIZED = UnquantizedLinearMethod()


# Methods of vLLM's class and not a class in its place: a spawned worker unpickles the config, which names the class,
# before its patches are on.


def init(original: Callable[..., None]) -> Callable[..., None]:
    """``ModelOptFp8LinearMethod.__init__``: 0.19.1 has no FP8 kernel for a CPU and raises there.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def wrapper(self: Any, quant_config: Any) -> None:
        if not current_platform.is_cpu():
            original(self, quant_config)
            return
        self.quant_config = quant_config

    return wrapper


def create_weights(original: Callable[..., None]) -> Callable[..., None]:
    """``ModelOptFp8LinearMethod.create_weights``: weights of members that a checkpoint lacks are zero.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def wrapper(self: Any, layer: Module, *args: Any, **kwargs: Any) -> None:
        original(self, layer, *args, **kwargs)
        layer.params_dtype = kwargs.get("params_dtype", args[4] if len(args) > 4 else torch.get_default_dtype())
        layer.weight.data.view(torch.uint8).zero_()

    return wrapper


def process_weights_after_loading(original: Callable[..., None]) -> Callable[..., None]:
    """``ModelOptFp8LinearMethod.process_weights_after_loading``: absent members have no say, a CPU dequantizes.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def wrapper(self: Any, layer: Module) -> None:
        for name in ("weight_scale", "input_scale"):
            settle(getattr(layer, name).data, f"{getattr(layer, 'prefix', 'layer')}.{name}")
        if not current_platform.is_cpu():
            original(self, layer)
            return
        rows = torch.tensor(layer.logical_widths)
        scale = layer.weight_scale.data.repeat_interleave(rows)
        weight = (layer.weight.data.float() * scale.unsqueeze(-1)).to(layer.params_dtype)
        for name in ("weight", "weight_scale", "input_scale"):
            delattr(layer, name)
        layer.weight = Parameter(weight, requires_grad=False)
        _UNQUANTIZED.process_weights_after_loading(layer)

    return wrapper


def apply(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``ModelOptFp8LinearMethod.apply``: weight-only on a CPU.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def wrapper(self: Any, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if current_platform.is_cpu():
            return _UNQUANTIZED.apply(layer, x, bias)
        return original(self, layer, x, bias)

    return wrapper


def settle(scales: Tensor, what: str) -> None:
    """Members that the checkpoint lacks (k, v of E4B layers that reuse KV) have no say in a maximum.

    vLLM fills ``scales`` float32 [members] with the smallest float32 before it loads.

    Raises:
        CheckpointError: none was loaded, or one is not finite.
    """
    unset = scales == torch.finfo(torch.float32).min
    if bool(unset.all()) or not bool(torch.isfinite(scales[~unset]).all()):
        raise CheckpointError(f"{what}: missing, NaN or infinite; quantize the model again")
    scales[unset] = scales[~unset].max()


def activation_dtypes(original: Any) -> Any:
    """``get_supported_act_dtypes`` of FP8: weight-only on a CPU, so float32 is as good.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    def get_supported_act_dtypes(self: Any) -> list[torch.dtype]:
        more = [torch.float32] if current_platform.is_cpu() else []
        return [*original(self), *more]

    return get_supported_act_dtypes
