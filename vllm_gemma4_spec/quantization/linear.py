"""The linear method of ModelOpt's NVFP4 checkpoints, on every backend.

xs = x * pre_quant_scale                     where the checkpoint has one
y  = nvfp4(xs) @ R.T + (xs @ A.T) @ B.T      with the low-rank branch of SVDQuant, if any
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4LinearMethod
from vllm.model_executor.layers.quantization.utils.nvfp4_utils import NvFp4LinearBackend

from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.quantization import compile_key, emulation, reload, small_batch_layers, stream_layers, tensors
from vllm_gemma4_spec.quantization.nan_scales import repair

_NEEDED = ("weight", "weight_scale", "weight_scale_2", "input_scale")
_NEUTRAL = {"pre_quant_scale": 1.0, "svdquant_lora_a": 0.0, "svdquant_lora_b": 0.0}  # what changes no result
_EXTRA = tuple(_NEUTRAL)


@register_weight_loader_v2_supported_method
class Nvfp4LinearMethod(ModelOptNvFp4LinearMethod):
    """Every NVFP4 of ModelOpt, for column-, merged-column-, qkv- and row-parallel and replicated layers.

    ``quant_config`` is an :class:`~vllm_gemma4_spec.quantization.config.Nvfp4Config`.
    """

    def __init__(self, quant_config: Any) -> None:
        # Not super().__init__: it raises where vLLM has no FP4 kernel, as on a CPU.
        self.quant_config = quant_config
        self.marlin_input_dtype = None
        self.backend = emulation.select_backend(quant_config.weight_only)

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        load = extra_weight_attrs.pop("weight_loader")
        ledger = tensors.Ledger(layer, layer.prefix, len(output_partition_sizes))
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            weight_loader=ledger.track(load),
            **extra_weight_attrs,
        )
        layer.params_dtype = params_dtype
        layer.modelopt_ledger = ledger
        config = get_current_vllm_config()
        layer.modelopt_dummy = config.load_config.load_format == "dummy"
        layer.modelopt_additional = config.additional_config  # a drafter's is a copy of its own
        tensors.add_pre_quant_scale(layer, ledger)
        if self.quant_config.quant_algo == "NVFP4_SVD":
            tensors.add_low_rank(layer, ledger, params_dtype, load)

    def process_weights_after_loading(self, layer: Module) -> None:
        again = hasattr(layer, reload.MARK)
        kept = reload.Kept(layer) if again else None
        if layer.modelopt_dummy and not again:
            self._settle_dummy(layer)
        else:
            self._settle(layer)
        layer.modelopt_ledger.given.clear()  # weights may be loaded again
        if again:
            reload.same_shapes(layer, layer.modelopt_shapes, _NEUTRAL, layer.prefix)
        else:
            layer.modelopt_shapes = reload.shapes(layer, _EXTRA)
            layer.stream_gelu = False  # whether the streaming kernel gives the activation behind the layer
        layer.modelopt_checked = True
        layer.register_parameter("rows_codes", None)
        layer.rows_scaled = False  # whether the small-batch kernel multiplies by pre_quant_scale
        layer.streamed, layer.stream_scaled, layer.stream_branch = 0, False, False
        if self.backend == NvFp4LinearBackend.MARLIN:
            small_batch_layers.prepare(layer)
        if self.backend == NvFp4LinearBackend.EMULATION:
            emulation.prepare(layer)
        else:
            marlin = self.backend == NvFp4LinearBackend.MARLIN and layer.params_dtype == torch.bfloat16
            if marlin and not layer.modelopt_dummy:
                nvfp4.narrow_(layer.weight.data, layer.weight_scale.data)
                nvfp4.clear_zero_(layer.weight.data, layer.weight_scale.data)
            super().process_weights_after_loading(layer)
            if marlin:
                stream_layers.prepare(layer)
                small_batch_layers.choose(layer)
        if kept is None:
            _tell_compiler(layer)
        else:
            kept.put_back()

    def _settle(self, layer: Module) -> None:
        """Check what was loaded, drop what the checkpoint does not have, repair NaN scales."""
        ledger = layer.modelopt_ledger
        needed = _NEEDED[:3] if self.quant_config.weight_only else _NEEDED
        if self.quant_config.weight_only and not ledger.has("input_scale"):
            layer.input_scale.data.fill_(1)  # no backend for weights alone reads it
        present = [i for i in range(ledger.members) if any(ledger.has(name, i) for name in _NEEDED)]
        for index in present or [0]:
            for name in needed:
                if not ledger.has(name, index):
                    of = f" of member {index}" if ledger.members > 1 else ""
                    raise CheckpointError(f"{ledger.prefix}.{name}: the checkpoint has no such tensor{of}")
        _fill_absent(layer, present)
        repair(layer, layer.prefix, layer.weight.data, layer.weight_scale.data)
        for name in ("weight_scale_2", "input_scale"):
            _check_scalar(getattr(layer, name).data, f"{ledger.prefix}.{name}")
        if self.quant_config.quant_algo in (
            "NVFP4_AWQ",
            "NVFP4_SVD",
        ):  # stock vLLM takes the larger one of plain NVFP4's
            tensors.agreed(layer.weight_scale_2.data, present, f"{ledger.prefix}.weight_scale_2")
        for name in _EXTRA:
            self._settle_extra(layer, name, present)
        if (layer.svdquant_lora_a is None) != (layer.svdquant_lora_b is None):
            raise CheckpointError(f"{ledger.prefix}: one low-rank factor of SVDQuant is missing, svdquant_lora_a or _b")

    def _settle_extra(self, layer: Module, name: str, present: list[int]) -> None:
        ledger = layer.modelopt_ledger
        given = [i for i in present if ledger.has(name, i)]
        if not given:
            _drop(layer, name)
            return
        if given != present:
            raise CheckpointError(
                f"{ledger.prefix}.{name}: only members {given} of {present} of the fused layer have it"
            )
        data = getattr(layer, name).data
        if name != "svdquant_lora_b":
            data = tensors.agreed(data, given, f"{ledger.prefix}.{name}")
        _replace(layer, name, data.to(layer.params_dtype))

    def _settle_dummy(self, layer: Module) -> None:
        """No checkpoint: keep what ModelOpt would have written, so that timings with random weights hold."""
        single = layer.modelopt_ledger.members == 1
        svd = self.quant_config.quant_algo == "NVFP4_SVD"
        if svd or (self.quant_config.quant_algo == "NVFP4_AWQ" and single):
            _replace(layer, "pre_quant_scale", layer.pre_quant_scale.data[0].to(layer.params_dtype))
        else:
            _drop(layer, "pre_quant_scale")
        if svd:
            _replace(layer, "svdquant_lora_a", layer.svdquant_lora_a.data[0])
            _replace(layer, "svdquant_lora_b", layer.svdquant_lora_b.data)
        else:
            _drop(layer, "svdquant_lora_a")
            _drop(layer, "svdquant_lora_b")

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # torch.compile traces this: what a layer lacks costs nothing, the multiplication fuses with what made x.
        if layer.pre_quant_scale is not None and not (layer.rows_scaled or layer.stream_scaled):
            x = x * layer.pre_quant_scale
        if layer.rows_codes is not None:
            y = small_batch_layers.linear(layer, x)
        elif layer.streamed:
            y = stream_layers.linear(layer, x)
        elif self.backend == NvFp4LinearBackend.EMULATION:
            y = emulation.linear(layer, x, bias)
        else:
            y = super().apply(layer, x, bias)
        if layer.svdquant_lora_a is not None and not layer.stream_branch:
            y = y + F.linear(F.linear(x, layer.svdquant_lora_a), layer.svdquant_lora_b)
        return y


def _tell_compiler(layer: Module) -> None:
    """Put what the layer has into vLLM's compile cache key: the same folder may be repaired or exported anew.

    A cached graph without a multiplication would otherwise run on a checkpoint that needs it.
    """
    has = "".join(str(int(getattr(layer, name) is not None)) for name in (*_EXTRA, "rows_codes"))
    has += f"{int(layer.rows_scaled)} {layer.streamed} {int(layer.stream_scaled)} {int(layer.stream_branch)}"
    compile_key.add(layer.modelopt_additional, f"{layer.prefix} {has}")


def _drop(layer: Module, name: str) -> None:
    layer._parameters.pop(name, None)
    layer.register_parameter(name, None)


def _replace(layer: Module, name: str, data: Tensor) -> None:
    layer._parameters.pop(name, None)
    layer.register_parameter(name, Parameter(data.contiguous(), requires_grad=False))


def _fill_absent(layer: Module, present: list[int]) -> None:
    """Members that the checkpoint lacks (k, v of E4B layers that reuse KV): zero weights, no say in a maximum."""
    rows = 0
    for index, width in enumerate(layer.logical_widths):
        if index not in present:
            layer.weight.data[rows : rows + width].zero_()
            layer.weight_scale.data.view(torch.uint8)[rows : rows + width].zero_()
            for name in ("weight_scale_2", "input_scale"):
                scalars = getattr(layer, name).data
                scalars[index] = scalars[present].max()
        rows += width


def _check_scalar(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{what}: NaN or infinity; the export is broken, quantize the model again")
