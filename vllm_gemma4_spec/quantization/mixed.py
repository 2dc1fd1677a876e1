"""MIXED_PRECISION checkpoints of ModelOpt: every layer by the algorithm that the checkpoint gives it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.layer import FusedMoE
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform

from vllm_gemma4_spec.checkpoints import layers
from vllm_gemma4_spec.errors import CheckpointError, stop
from vllm_gemma4_spec.quantization import config as nvfp4
from vllm_gemma4_spec.quantization.config import checkpoint_prefix, float_modules

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig as Base
else:
    Base = object


class MixedMethods(Base):
    """What ``MixedConfig`` has before vLLM's class: NVFP4 layers that are ours, whatever their kind, Gemma 4's experts.

    Attributes:
        by_layer: module -> algorithm, under vLLM's names once a model has applied its mapper.
    """

    by_layer: dict[str, str]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MixedMethods:
        """From hf_quant_config.json or from config.json's flat ``quantization_config``.

        Raises:
            CheckpointError: a layer's algorithm is unknown here or its block size is not 16.
        """
        section = config.get("quantization", config)
        try:
            by_layer = layers.layer_algorithms(section)
            for module, algorithm in by_layer.items():
                if algorithm not in (*layers.NVFP4, "FP8"):
                    known = ", ".join((*layers.NVFP4, "FP8"))
                    raise CheckpointError(
                        f"quantized_layers: {module}: quant_algo {algorithm or 'missing'} is not known here ({known})"
                    )
        except CheckpointError as error:
            stop(error)
        made: MixedMethods = super().from_config(config)
        made.by_layer = by_layer
        made.nvfp4 = {}
        for algorithm in {a for a in by_layer.values() if a in layers.NVFP4}:
            made.nvfp4[algorithm] = nvfp4.Nvfp4Config(True, made.kv_cache_quant_method, [])
            made.nvfp4[algorithm].quant_algo = algorithm
        return made

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        more = [torch.float32] if current_platform.is_cpu() else []
        return [*super().get_supported_act_dtypes(), *more]

    def maybe_update_config(self, model_name: str) -> None:
        """See :meth:`Nvfp4Config.maybe_update_config`."""
        super().maybe_update_config(model_name)
        float_modules(model_name)  # checks every header

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.by_layer = hf_to_vllm_mapper.apply_dict(self.by_layer)

    def algorithm(self, prefix: str) -> str | None:
        """The one algorithm of a vLLM layer; None where the checkpoint holds it unquantized.

        Raises:
            CheckpointError: members of a fused layer differ.
        """
        prefix = checkpoint_prefix(prefix)
        base, _, name = prefix.rpartition(".")
        members = [f"{base}.{m}" for m in self.packed_modules_mapping.get(name, [name])]
        found = {self.by_layer[m] for m in members if m in self.by_layer}
        if len(found) > 1:
            named = ", ".join(m for m in members if m in self.by_layer)
            raise CheckpointError(
                f"{prefix}: its members {named} have different quant_algos ({', '.join(sorted(found))}); "
                "vLLM multiplies with them at once: quantize them alike"
            )
        if found:
            return found.pop()
        places = (prefix, prefix.replace(".moe.experts", ".experts"))  # experts as a whole, or one by one
        return next((a for m, a in self.by_layer.items() if any(m == p or m.startswith(f"{p}.") for p in places)), None)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, Attention) or self.is_layer_excluded(prefix):
            return super().get_quant_method(layer, prefix)
        algorithm = self.algorithm(prefix) if isinstance(layer, LinearBase | FusedMoE) else None
        if algorithm in self.nvfp4:
            return self.nvfp4[algorithm].get_quant_method(layer, prefix)
        if isinstance(layer, LinearBase):
            return self.fp8_config.LinearMethodCls(self.fp8_config) if algorithm else UnquantizedLinearMethod()
        if isinstance(layer, FusedMoE) and algorithm and current_platform.is_cpu():
            raise CheckpointError(f"{prefix}: experts in FP8; vLLM 0.19.1 has no kernel for them on a CPU")
        return super().get_quant_method(layer, prefix)


def mixed_config(original: type) -> type:
    """``MixedConfig``, which takes the place of ``ModelOptMixedPrecisionConfig``.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """
    return _derived(original)


@functools.cache  # one class, which a worker finds again when it unpickles a config
def _derived(original: type) -> type:
    place = {"__module__": "vllm_gemma4_spec.quantization", "__doc__": MixedMethods.__doc__}
    return type("MixedConfig", (MixedMethods, original), place)


def __getattr__(name: str) -> Any:
    """``MixedConfig``, made of vLLM's class, which may have been replaced by it already."""
    if name != "MixedConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig as Found

    return Found if issubclass(Found, MixedMethods) else mixed_config(Found)
