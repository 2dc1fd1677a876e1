"""The quantization config of ModelOpt's NVFP4 checkpoints, ``NVFP4_AWQ`` and ``NVFP4_SVD`` included.

vLLM's module of the class that is extended here is not imported at the top, nor is what imports it: its import hook
asks this module for the class, and must find it whole whichever of the two a process imports first.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe.layer import FusedMoE
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from vllm_gemma4_spec.checkpoints import files, layers
from vllm_gemma4_spec.errors import CheckpointError, stop
from vllm_gemma4_spec.quantization import loading

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config as Base
else:
    Base = object


class Nvfp4Methods(Base):
    """What ``Nvfp4Config`` has before vLLM's class: ``modelopt_fp4`` with the algorithms that vLLM does not know.

    Attributes:
        quant_algo: one of :data:`vllm_gemma4_spec.checkpoints.layers.NVFP4`.
        float_modules: modules whose weight the checkpoint holds unquantized, under vLLM's names once a
            model has applied its mapper. ModelOpt does not list all of them as excluded (experts).
    """

    quant_algo = "NVFP4"
    float_modules: frozenset[str] = frozenset()

    @property
    def weight_only(self) -> bool:
        """Whether the checkpoint has no scales for activations."""
        return self.quant_algo in layers.WEIGHT_ONLY

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Nvfp4Methods:
        """From hf_quant_config.json or from config.json's flat ``quantization_config``.

        Raises:
            CheckpointError: unknown ``quant_algo`` or a group size other than 16. ``vllm serve`` ends with that line.
        """
        try:
            return cls._checked(config)
        except CheckpointError as error:
            stop(error)

    @classmethod
    def _checked(cls, config: dict[str, Any]) -> Nvfp4Methods:
        from vllm.model_executor.layers.quantization.modelopt import QUANT_ALGOS

        section = config.get("quantization", config)
        if not isinstance(section, dict):
            raise CheckpointError("quantization config: 'quantization' must be an object")
        algorithm = layers.algorithm(section)
        if algorithm not in (*layers.NVFP4, *QUANT_ALGOS):
            known = ", ".join(layers.NVFP4)
            raise CheckpointError(f"quant_algo {algorithm or 'missing'}: not an NVFP4 format known here ({known})")
        for size in _group_sizes(section):
            layers.check_block({"quant_algo": algorithm, "group_size": size}, "quantization config")
        plain = copy.copy(config)
        if algorithm in layers.NVFP4:
            # The formats differ in the linear method alone, so the base class may read them as plain NVFP4.
            plain |= {"quantization": section | {"quant_algo": "NVFP4"}} if section is not config else {}
            plain |= {"quant_algo": "NVFP4"} if section is config else {}
        made: Nvfp4Methods = super().from_config(plain)
        made.quant_algo = algorithm
        return made

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Emulation multiplies in any dtype, so a CPU may run in float32."""
        more = [torch.float32] if current_platform.is_cpu() else []
        return [*super().get_supported_act_dtypes(), *more]

    def maybe_update_config(self, model_name: str) -> None:
        """Read from the checkpoint's headers which weights are not quantized, and whether the tensors fit.

        Raises:
            CheckpointError: a shard or a tensor is not what it must be. ``vllm serve`` ends with that line.
        """
        super().maybe_update_config(model_name)
        self.float_modules = float_modules(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.float_modules = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.float_modules)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase) and self._members(prefix) <= self.float_modules:
            return UnquantizedLinearMethod()
        if isinstance(layer, FusedMoE):
            if self._float_experts(prefix):
                return None  # FusedMoE then takes the unquantized method
            if not self.is_layer_excluded(prefix):
                from vllm_gemma4_spec.quantization.moe import fused_moe_method

                return fused_moe_method(self, layer.moe_config)
        return super().get_quant_method(layer, prefix)

    def _members(self, prefix: str) -> set[str]:
        """The checkpoint's modules behind a vLLM layer: ``…qkv_proj`` -> ``…q_proj``, ``…k_proj``, ``…v_proj``."""
        prefix = checkpoint_prefix(prefix)
        base, dot, name = prefix.rpartition(".")
        found = {f"{base}{dot}{member}" for member in self.packed_modules_mapping.get(name, [name])}
        if prefix.removeprefix("model.") in self.float_modules:  # an EAGLE head's fc has no prefix in its checkpoint
            return {prefix.removeprefix("model.")}
        return found & self.float_modules or found  # E4B layers that reuse KV have q alone

    def _float_experts(self, prefix: str) -> bool:
        """Gemma 4's experts are ``layers.N.experts.*`` in the checkpoint and ``layers.N.moe.experts`` in vLLM."""
        prefix = checkpoint_prefix(prefix)
        places = (prefix, prefix.replace(".moe.experts", ".experts"))
        return any(f"{place}.gate_up_proj" in self.float_modules for place in places)


def checkpoint_prefix(prefix: str) -> str:
    """A vLLM layer's name without what vLLM puts before a draft model's: checkpoints know nothing of that."""
    return prefix.removeprefix("draft_model.")


def float_modules(model_name: str) -> frozenset[str]:
    """The modules that a checkpoint holds unquantized, after reading all its headers if it lies here.

    Raises:
        CheckpointError: a shard or a tensor is not what it must be. ``vllm serve`` ends with that line.
    """
    folder = loading.local(model_name)
    if folder is None:
        remote = get_safetensors_params_metadata(model_name, revision=loading.asked.get()[0])
        return frozenset(layers.float_modules((n, i["dtype"], tuple(i["shape"])) for n, i in remote.items()))
    if not any(folder.glob("*.safetensors")):  # none for dummy weights
        return frozenset()
    try:
        checkpoint = files.Checkpoint(folder)
        checkpoint.check()
    except CheckpointError as error:
        stop(error)
    return frozenset(layers.float_modules((t.name, t.dtype, t.shape) for t in checkpoint.tensors.values()))


def _group_sizes(section: dict[str, Any]) -> list[Any]:
    """Every ``group_size`` that a quantization config names, whatever it is.

    Raises:
        CheckpointError: groups or lists of modules are not what they must be; vLLM would fail on them later.
    """
    for key in ("exclude_modules", "ignore"):
        names = section.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"quantization config: {key!r} must be a list of module names")
    groups = section.get("config_groups", {})
    weights = (
        [g.get("weights", {}) if isinstance(g, dict) else None for g in groups.values()]
        if isinstance(groups, dict)
        else [None]
    )
    if not all(isinstance(w, dict) for w in weights):
        raise CheckpointError("quantization config: 'config_groups' must be an object of groups with 'weights'")
    return [section.get("group_size"), *(w["group_size"] for w in weights if w and "group_size" in w)]


def _linear_method(config: Any) -> QuantizeMethodBase:
    from vllm_gemma4_spec.quantization.linear import Nvfp4LinearMethod

    return Nvfp4LinearMethod(config)


def nvfp4_config(original: type) -> type:
    """``Nvfp4Config``, which takes the place of ``ModelOptNvFp4Config``.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """
    return _derived(original)


@functools.cache  # one class, which a worker finds again when it unpickles a config
def _derived(original: type) -> type:
    place = {"__module__": "vllm_gemma4_spec.quantization", "__doc__": Nvfp4Methods.__doc__}
    return type("Nvfp4Config", (Nvfp4Methods, original), place | {"LinearMethodCls": staticmethod(_linear_method)})


def __getattr__(name: str) -> Any:
    """``Nvfp4Config``, made of vLLM's class, which may have been replaced by it already."""
    if name != "Nvfp4Config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    return ModelOptNvFp4Config if issubclass(ModelOptNvFp4Config, Nvfp4Methods) else nvfp4_config(ModelOptNvFp4Config)
