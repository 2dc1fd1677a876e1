"""Weights loaded again into a running engine (``reload_weights``, ``update_weights``, after sleep level 2).

vLLM gives every layer its checkpoint's parameters back, loads, processes, and copies what comes out into the tensors
that were there before, so that CUDA graphs see the new values at the old addresses. That needs each layer to come out
with the same parameters; and it does not know of tensors that are no parameters, nor of scales of attention layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from vllm.config import set_current_vllm_config

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.quantization import nan_scales

MARK = "modelopt_checked"  # a layer that one of this package's methods has processed


def with_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Worker.reload_weights`` and ``update_weights``: the worker's config is current, as in the first load.

    What layers choose by it (``scope``, KV scales of layers that reuse KV) is chosen again while they are processed.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #52501 (NaN scales refused, 0.30 to 0.32); none found
    for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (scope.gemma4_engine(self.vllm_config) or scope.modelopt_nvfp4(self.model_config)):
            return original(self, *args, **kwargs)
        with set_current_vllm_config(self.vllm_config):
            return original(self, *args, **kwargs)

    return wrapper


def finalize(original: Callable[..., None]) -> Callable[..., None]:
    """``finalize_layerwise_processing``: scales of the KV cache, which 0.19.1 refuses to load again, and NaN scales.

    The first load of some formats ends here, too; attention layers have nothing pending then.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #52501 (NaN scales refused, 0.30 to 0.32); none found
    for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def wrapper(model: Module, model_config: Any) -> None:
        ours = any(hasattr(module, MARK) for module in model.modules())
        if ours or scope.gemma4_model(model_config):
            for module in model.modules():
                _load_kv_scales(module)
        original(model, model_config)
        if ours:
            nan_scales.report(model)

    return wrapper


def _load_kv_scales(layer: Module) -> None:
    """Put an attention layer's tensors back and its new scales into them, if the checkpoint has some."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader.reload import layerwise
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader  # whose package imports layerwise

    if not isinstance(layer, Attention):
        return
    info = layerwise.get_layerwise_info(layer)
    if not info.can_load() or info.load_numel == 0 or info.kernel_tensors is None:
        return
    loaded = info.loaded_weights
    layerwise._place_kernel_tensors(layer, info)
    layer.quant_method.create_weights(layer)
    for name, bound in loaded:
        parameter = getattr(layer, name)
        bound.arguments["param"] = parameter
        getattr(parameter, "weight_loader", default_weight_loader)(*bound.args, **bound.kwargs)
    layer.quant_method.process_weights_after_loading(layer)
    # What is left for the original: an attention layer that has loaded nothing is processed as it is.
    info.loaded_weights, info.load_numel = [], 0
    info.kernel_tensors = layerwise.get_layer_params_buffers(layer)


class Kept:
    """Tensors of a layer that are no parameters (Marlin's workspace): graphs have their addresses."""

    def __init__(self, layer: Module) -> None:
        self._layer = layer
        self._tensors = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}

    def put_back(self) -> None:
        """Where processing has made a new tensor: its values in the old one."""
        for name, old in self._tensors.items():
            new = vars(self._layer).get(name)
            if isinstance(new, Tensor) and new is not old and new.shape == old.shape:
                old.copy_(new)
                setattr(self._layer, name, old)


def copy_tensors(new: Any, old: Any) -> None:
    """The tensors of one dataclass, and of those in it, into those of another of the same kind."""
    for field in dataclasses.fields(old):
        there, here = getattr(new, field.name), getattr(old, field.name)
        if isinstance(here, Tensor) and isinstance(there, Tensor):
            if here is not there and here.shape == there.shape:
                here.copy_(there)
        elif dataclasses.is_dataclass(here) and type(here) is type(there):
            copy_tensors(there, here)


def shapes(layer: Module, names: tuple[str, ...]) -> dict[str, tuple[int, ...] | None]:
    """Of parameters that a layer may lack."""
    found = {name: getattr(layer, name) for name in names}
    return {name: None if value is None else tuple(value.shape) for name, value in found.items()}


def same_shapes(layer: Module, first: dict[str, tuple[int, ...] | None], neutral: dict[str, float], what: str) -> None:
    """Give a layer the parameters of its first load: what the new checkpoint lacks has no effect.

    Args:
        first: :func:`shapes` after the first load.
        neutral: the value that has no effect, by name.
        what: the layer's name.

    Raises:
        CheckpointError: the new checkpoint has one that the compiled model and its graphs have no place for.
    """
    for name, now in shapes(layer, tuple(first)).items():
        shape = first[name]
        if now == shape:
            continue
        if now is None and shape is not None:
            layer._parameters.pop(name, None)
            value = torch.full(shape, neutral[name], dtype=layer.params_dtype, device=layer.weight.device)
            layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
            continue
        raise CheckpointError(
            f"{what}.{name}: {list(now or ())}, and the engine was started with a checkpoint that has "
            f"{'none' if shape is None else list(shape)}; start an engine with the new one"
        )
