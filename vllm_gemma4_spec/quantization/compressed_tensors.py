"""Compressed-tensors NVFP4, linears and experts: repaired as ModelOpt's are, and emulated on a CPU.

The format is ModelOpt's under other names, and its global scales divide:

    W[n, k] = E2M1[weight_packed[n, k]] * (weight_scale[n, k // 16] / weight_global_scale)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization.utils.nvfp4_utils import NvFp4LinearBackend
from vllm.platforms import current_platform

from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.quantization import emulation, moe, reload
from vllm_gemma4_spec.quantization.nan_scales import repair


def linear_scheme(original: type) -> type:
    """``CompressedTensorsW4A4Fp4`` or ``CompressedTensorsW4A16Fp4`` with its scales repaired.

    Patch: ``compressed-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_compressed_tensors.py::test_stock_has_no_nvfp4_on_a_cpu``. Related upstream change:
    #35733 (emulation, in 0.20.0).
    """
    weight_only = original.__name__ == "CompressedTensorsW4A16Fp4"  # Marlin on every GPU

    class Nvfp4Scheme(original):
        def __init__(self) -> None:
            # Not super().__init__: it raises where vLLM has no FP4 kernel, as on a CPU.
            self.group_size = nvfp4.BLOCK
            self.backend = emulation.select_backend()

        def create_weights(self, layer: Module, *args: Any, **kwargs: Any) -> None:
            super().create_weights(layer, *args, **kwargs)
            layer.params_dtype = kwargs["params_dtype"]
            layer.modelopt_dummy = get_current_vllm_config().load_config.load_format == "dummy"
            for name in ("weight_packed", "weight_scale"):  # members that the checkpoint lacks stay zero
                getattr(layer, name).data.view(torch.uint8).zero_()
            for name in ("weight_global_scale", "input_global_scale"):
                if hasattr(layer, name):
                    getattr(layer, name).data.fill_(_UNSET)

        def process_weights_after_loading(self, layer: Module) -> None:
            given, kept = layer.weight_global_scale.data, reload.Kept(layer)
            _mark_absent(layer)
            _settle(given, "" if layer.modelopt_dummy else f"{layer.prefix}.weight_global_scale")
            if hasattr(layer, "input_global_scale"):
                _settle(layer.input_global_scale.data, "")
            repair(layer, layer.prefix, layer.weight_packed.data, layer.weight_scale.data)
            layer.modelopt_checked = True
            if self.backend == NvFp4LinearBackend.EMULATION:
                layer.weight_scale_2 = Parameter(1 / given, requires_grad=False)
                layer.weight = Parameter(layer.weight_packed.data, requires_grad=False)
                for name in ("weight_packed", "weight_global_scale", "input_global_scale"):
                    layer._parameters.pop(name, None)
                emulation.prepare(layer)
                return
            marlin = weight_only or self.backend == NvFp4LinearBackend.MARLIN
            if marlin and layer.params_dtype == torch.bfloat16:
                nvfp4.narrow_(layer.weight_packed.data, layer.weight_scale.data)
            super().process_weights_after_loading(layer)
            kept.put_back()

        def apply_weights(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            if self.backend == NvFp4LinearBackend.EMULATION:
                return emulation.linear(layer, x, bias)
            out: Tensor = super().apply_weights(layer, x, bias)
            return out

    Nvfp4Scheme.__name__ = Nvfp4Scheme.__qualname__ = original.__name__
    return Nvfp4Scheme


_UNSET = -1.0


def _mark_absent(layer: Module) -> None:
    """Members that the checkpoint lacks: known from the first load; one that comes later leaves them as memory was."""
    if not hasattr(layer, reload.MARK):
        layer.modelopt_absent = (layer.weight_global_scale.data == _UNSET).tolist()
        return
    rows = 0
    for index, (width, absent) in enumerate(zip(layer.logical_widths, layer.modelopt_absent, strict=True)):
        if absent:
            for name in ("weight_packed", "weight_scale"):
                getattr(layer, name).data.view(torch.uint8)[rows : rows + width].zero_()
            for name in ("weight_global_scale", "input_global_scale"):
                if hasattr(layer, name):
                    getattr(layer, name).data[index] = _UNSET
        rows += width


def _settle(scales: Tensor, what: str) -> None:
    """Global scales of members that the checkpoint lacks have no say in a maximum; ``what`` must be positive."""
    unset = scales == _UNSET
    if bool(unset.any()) and not bool(unset.all()):
        scales[unset] = scales[~unset].min()
    if what and not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise CheckpointError(f"{what}: missing, not positive, NaN or infinite; quantize the model again")


def experts_method(original: type) -> type:
    """``CompressedTensorsW4A4Nvfp4MoEMethod`` with its scales repaired; on a CPU, emulated.

    Patch: ``compressed-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_compressed_tensors.py::test_stock_has_no_nvfp4_on_a_cpu``. Related upstream change:
    #35733 (emulation, in 0.20.0).
    """

    class Repaired(moe.SameKernel, original):
        def __init__(self, moe_config: Any, layer_name: str | None = None, use_a16: bool = False) -> None:
            super().__init__(moe_config, layer_name, use_a16)
            self.use_a16 = use_a16

        def process_weights_after_loading(self, layer: Module) -> None:
            _as_modelopt(layer, self.use_a16)
            moe.repair_experts(layer)
            if self.nvfp4_backend == NvFp4MoeBackend.MARLIN and layer.params_dtype == torch.bfloat16:
                moe.narrow(layer)
            for name in ("w13", "w2"):  # what the original looks for; it makes the other names again
                layer.register_parameter(f"{name}_weight_packed", layer._parameters.pop(f"{name}_weight"))
                del layer._parameters[f"{name}_weight_scale_2"], layer._parameters[f"{name}_input_scale"]
            super().process_weights_after_loading(layer)

    class Emulated(moe.EmulatedExperts, original):
        def __init__(self, moe_config: Any, layer_name: str | None = None, use_a16: bool = False) -> None:
            super().__init__(moe_config)
            self.group_size, self.use_a16 = nvfp4.BLOCK, use_a16

        def process_weights_after_loading(self, layer: Module) -> None:
            _as_modelopt(layer, self.use_a16)
            super().process_weights_after_loading(layer)

    made = Emulated if current_platform.is_cpu() else Repaired
    made.__name__ = made.__qualname__ = original.__name__  # FusedMoE looks at it
    return made


def _as_modelopt(layer: Module, use_a16: bool) -> None:
    """The parameters under ModelOpt's names, global scales as factors; W4A16 has none for the inputs."""
    for name in ("w13", "w2"):
        if use_a16:
            getattr(layer, f"{name}_input_global_scale").data.fill_(1)
        layer.register_parameter(f"{name}_weight", layer._parameters.pop(f"{name}_weight_packed"))
        for old, new in (("weight_global_scale", "weight_scale_2"), ("input_global_scale", "input_scale")):
            scale = getattr(layer, f"{name}_{old}").data
            layer.register_parameter(f"{name}_{new}", Parameter(1 / scale, requires_grad=False))
