"""Experts of ModelOpt's NVFP4 checkpoints: NaN scales repaired everywhere, emulated on a CPU.

vLLM recognises ModelOpt's expert tensors by the method's class name, so the names keep ``ModelOpt``.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe import cpu_fused_moe
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import (
    NvFp4MoeBackend,
    is_global_sf_supported_for_nvfp4_backend,
    select_nvfp4_moe_backend,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4FusedMoE
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Static
from vllm.platforms import current_platform

from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.quantization import emulation, reload
from vllm_gemma4_spec.quantization.nan_scales import repair

logger = logging.getLogger("vllm.plugins.gemma4_spec")


def fused_moe_method(quant_config: Any, moe_config: Any) -> FusedMoEMethodBase:
    method = ModelOptNvFp4EmulatedMoE if current_platform.is_cpu() else ModelOptNvFp4RepairedMoE
    return method(quant_config, moe_config)


def repair_experts(layer: Module) -> None:
    """w13 uint8 [E, 2I, H/2] and w2 [E, H, I/2] with their scales; global scales must be finite."""
    layer.modelopt_checked = True
    for name in ("w13", "w2"):
        weight, scale = (getattr(layer, f"{name}_{x}").data for x in ("weight", "weight_scale"))
        repair(layer, f"{layer.layer_name}.{name}", weight, scale)
        for suffix in ("weight_scale_2", "input_scale"):
            if not bool(torch.isfinite(getattr(layer, f"{name}_{suffix}")).all()):
                raise CheckpointError(f"{layer.layer_name}.{name}_{suffix}: NaN or infinity; quantize the model again")


def narrow(layer: Module) -> None:
    """See :func:`~vllm_gemma4_spec.checkpoints.nvfp4.narrow_`; for Marlin in bfloat16."""
    for name in ("w13", "w2"):
        nvfp4.narrow_(*(getattr(layer, f"{name}_{x}").data for x in ("weight", "weight_scale")))


class SameKernel:
    """A mixin before a method whose processing makes a kernel: the one that graphs hold stays, with new scales."""

    moe_kernel: Any
    moe_quant_config: Any

    def process_weights_after_loading(self, layer: Module) -> None:
        kernel, config, kept = self.moe_kernel, self.moe_quant_config, reload.Kept(layer)
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        if kernel is not None and config is not None:
            reload.copy_tensors(self.moe_quant_config, config)
            self.moe_kernel, self.moe_quant_config = kernel, config
            kept.put_back()


def settle_input_scales(layer: Module, weight_only: bool) -> None:
    """``input_scale`` of experts that calibration never reached: the largest of the others'.

    ``weight_only``: the backend never reads it, so it may be missing everywhere.

    Raises:
        CheckpointError: no expert of the layer has one and the backend needs it.
    """
    for name in ("w13", "w2"):
        scales = getattr(layer, f"{name}_input_scale").data
        unset = scales == reload.UNSET
        missing = int(unset.sum())
        if not missing:
            continue
        if missing == scales.numel():
            if not weight_only:
                raise CheckpointError(
                    f"{layer.layer_name}.{name}_input_scale: no expert has one and this backend quantizes activations; "
                    "calibrate with more text, or serve with VLLM_USE_FLASHINFER_MOE_FP4=0 (Marlin never reads it)"
                )
            scales.fill_(1)
            continue
        scales[unset] = scales[~unset].max()
        if not weight_only:
            logger.warning(
                "%s: %d of %d experts' inputs were never calibrated; they take the largest input_scale of the others",
                layer.layer_name,
                missing,
                scales.numel(),
            )


class ModelOptNvFp4RepairedMoE(SameKernel, ModelOptNvFp4FusedMoE):
    """vLLM's method and kernels, with NaN block scales repaired first."""

    def __init__(self, quant_config: Any, moe_config: Any) -> None:
        super().__init__(quant_config, moe_config)
        if quant_config.weight_only:  # what compressed-tensors' W4A16 asks for
            self.nvfp4_backend, self.experts_cls = select_nvfp4_moe_backend(
                config=self.moe, weight_key=kNvfp4Static, activation_key=None
            )
            self.use_global_sf = is_global_sf_supported_for_nvfp4_backend(self.nvfp4_backend)

    def create_weights(self, layer: Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        reload.clear_input_scales(layer)

    def process_weights_after_loading(self, layer: Module) -> None:
        settle_input_scales(layer, self.nvfp4_backend == NvFp4MoeBackend.MARLIN)
        repair_experts(layer)
        if self.nvfp4_backend == NvFp4MoeBackend.MARLIN and layer.params_dtype == torch.bfloat16:
            narrow(layer)
        super().process_weights_after_loading(layer)


class EmulatedExperts(FusedMoEMethodBase):
    """Weight-only experts for a CPU: dequantized once where memory allows, an expert at a time where not.

    A mixin before vLLM's method, whose constructor raises where vLLM has no FP4 MoE kernel.
    """

    use_global_sf = False

    def __init__(self, moe_config: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe_config)
        self.plain = UnquantizedFusedMoEMethod(moe_config)

    @property
    def is_monolithic(self) -> bool:
        return bool(self.plain.is_monolithic)

    def process_weights_after_loading(self, layer: Module) -> None:
        repair_experts(layer)
        scale_2 = {"w13": layer.w13_weight_scale_2.data, "w2": layer.w2_weight_scale_2.data}  # [E, 2], [E]
        scale_2["w13"] = scale_2["w13"].repeat_interleave(layer.w13_weight.shape[1] // scale_2["w13"].shape[1], 1)
        size = 2 * sum(getattr(layer, f"{name}_weight").numel() for name in scale_2)
        if not hasattr(layer, "emulated_packed"):
            layer.emulated_packed = not emulation.fits(size * layer.params_dtype.itemsize, layer.w13_weight.device)
        packed = layer.emulated_packed
        experts = {}
        for name, factor in scale_2.items():
            weight, scale = (getattr(layer, f"{name}_{x}").data for x in ("weight", "weight_scale"))
            experts[name] = [partial(nvfp4.dequantize, *expert) for expert in zip(weight, scale, factor, strict=True)]
            for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
                delattr(layer, f"{name}_{suffix}")
            if not packed:
                made = torch.stack([expert(layer.params_dtype) for expert in experts[name]])
                setattr(layer, f"{name}_weight", Parameter(made, requires_grad=False))
        if packed:
            self.plain.cpu_fused_moe = PackedExperts(layer, experts["w13"], experts["w2"])
        else:
            self.plain.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: Module) -> Any:
        return self.plain.get_fused_moe_quant_config(layer)

    def apply_monolithic(self, layer: Module, x: Tensor, router_logits: Tensor) -> Tensor:
        return self.plain.apply_monolithic(layer, x, router_logits)


class ModelOptNvFp4EmulatedMoE(EmulatedExperts, ModelOptNvFp4FusedMoE):
    """ModelOpt's experts on a CPU."""

    def __init__(self, quant_config: Any, moe_config: Any) -> None:
        super().__init__(moe_config)
        self.quant_config = quant_config

    def create_weights(self, layer: Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        reload.clear_input_scales(layer)

    def process_weights_after_loading(self, layer: Module) -> None:
        settle_input_scales(layer, weight_only=True)
        super().process_weights_after_loading(layer)


class PackedExperts(cpu_fused_moe.CPUFusedMOE):
    """vLLM's expert-by-expert CPU path, each expert dequantized when tokens reach it."""

    def __init__(
        self, layer: Module, gate_up: Sequence[Callable[..., Tensor]], down: Sequence[Callable[..., Tensor]]
    ) -> None:
        self.isa = "none"
        self.forward_method = self.forward_torch
        layer.gate_up_linear = [partial(_linear, weight) for weight in gate_up]
        layer.down_linear = [partial(_linear, weight) for weight in down]
        cpu_fused_moe._CPU_MOE_LAYER_CACHE[id(layer)] = weakref.ref(layer)


def _linear(weight: Callable[[torch.dtype], Tensor], x: Tensor) -> Tensor:
    return F.linear(x, weight(x.dtype))
