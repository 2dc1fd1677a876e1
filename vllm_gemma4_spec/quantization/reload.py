"""Weights loaded again into a running engine (``reload_weights``, ``update_weights``, after sleep level 2).

vLLM gives every layer its checkpoint's parameters back, loads, processes, and copies what comes out into the tensors
that were there before, so that CUDA graphs see the new values at the old addresses. That needs each layer to come out
with the same parameters; and it does not know of tensors that are no parameters, nor of scales of attention layers.
What it does not load holds whatever the memory held: constants that no checkpoint has (a 26B's router multiplies by
one), scales of experts that calibration never reached, and an expert's last scale, as it counts others twice.
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
FINISHED = "_gemma4_spec_weights_finished"  # attribute of a model that is being reloaded: the last part has begun
UNKNOWN = "_gemma4_spec_weights_unknown"  # attribute of a worker: its weights are not those of its config's checkpoint


def with_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Worker.reload_weights`` and ``update_weights``: the worker's config is current, as in the first load.

    What layers choose by it (``scope``, KV scales of layers that reuse KV) is chosen again while they are processed.
    Weights that one rank refuses are refused by all: the old ones stay, or are read again from their checkpoint where
    layers have been written already. Where that cannot be, no step runs until a later reload succeeds.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (scope.gemma4_engine(self.vllm_config) or scope.modelopt_nvfp4(self.model_config)):
            return original(self, *args, **kwargs)
        refused: Exception | None = None
        with set_current_vllm_config(self.vllm_config):
            model, checkpoint = self.model_runner.get_model(), self.model_config.model
            before = Before(model)
            # No rank may wait for another, as the report does, before all have said whether they go on.
            for part in (lambda: original(self, *args, **kwargs), lambda: _report(model)):
                try:
                    part()
                except Exception as error:
                    refused = error
                said, last = _of_all_ranks(f"{type(refused).__name__}: {refused}" if refused else None)
                if said:
                    break
            else:
                before.keep_constants()
                delattr(model, FINISHED)
                vars(self).pop("execute_model", None)
                given = original.__name__ == "update_weights" or args or kwargs.get("weights_iterator") is not None
                setattr(self, UNKNOWN, bool(given))
                return None
            self.model_config.model = checkpoint
            written = before.put_back() or _direct(args, kwargs)
            lost, _ = _of_all_ranks(_restore(self) if written else None)
            if lost:
                _halt(self, f"new weights were refused half way ({said[0]}), and {lost[0]}")
        # vLLM reads the ranks' answers up to the first error, and what is left unread is the next call's answer.
        if last:
            raise refused or CheckpointError(f"another rank has refused the new weights ({said[0]})")
        return None

    return wrapper


def _report(model: Module) -> None:
    if any(hasattr(module, MARK) for module in model.modules()):
        nan_scales.report(model)


def _of_all_ranks(error: str | None) -> tuple[list[str], bool]:
    """The errors of all ranks of this engine, and whether this is the last of them."""
    from vllm.distributed import get_pp_group, get_tp_group

    errors, last = [error] if error else [], True
    for group in (get_tp_group(), get_pp_group()):
        last &= group.is_last_rank
        if group.world_size > 1:
            found: list[list[str]] = [[] for _ in range(group.world_size)]
            torch.distributed.all_gather_object(found, errors, group=group.cpu_group)
            errors = [each for rank in found for each in rank]
    return errors, last


class Before:
    """The attributes of every layer before a reload, its tensors among them, and the values of its constants."""

    def __init__(self, model: Module) -> None:
        self.model = model
        self._layers = [(layer, _attributes(layer)) for layer in model.modules()]
        self._constants = [(*constant, constant[-1].clone()) for layer, _ in self._layers for constant in _mixed(layer)]
        setattr(model, FINISHED, False)

    def keep_constants(self) -> None:
        """In the old tensors, where the layer's other tensors are now the new checkpoint's."""
        for layer, name, tensor, value in self._constants:
            tensor.copy_(value)
            layer._non_persistent_buffers_set.add(name)

    def put_back(self) -> bool:
        """Undo what a reload has left of itself; whether it has written into the old tensors."""
        from vllm.model_executor.model_loader.reload import layerwise

        infos = [(layer, layerwise.get_layerwise_info(layer)) for layer, _ in self._layers]
        started = any(info.can_load() for _, info in infos)
        done = any(not info.can_load() and layerwise.get_layer_tensors(layer) for layer, info in infos)
        written = getattr(self.model, FINISHED) or (started and done)
        for (layer, attributes), (_, info) in zip(self._layers, infos, strict=True):
            vars(layer).clear()
            vars(layer).update(attributes)
            info.reset()
        self.keep_constants()
        return written


def _attributes(layer: Module) -> dict[str, Any]:
    return vars(layer) | {"_parameters": dict(layer._parameters), "_buffers": dict(layer._buffers)}


def _mixed(layer: Module) -> list[tuple[Module, str, Tensor]]:
    """Buffers that no checkpoint has, in a layer that loads others: vLLM makes all of its tensors anew (#44371)."""
    constants = {name: layer._buffers[name] for name in layer._non_persistent_buffers_set}
    loads = len(layer._parameters) + len(layer._buffers) > len(constants)
    return [(layer, name, tensor) for name, tensor in constants.items() if loads and tensor is not None]


def _direct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether weights come in the kernels' form: vLLM copies them over the old ones as they come."""
    infos = [value for value in (*args, *kwargs.values()) if isinstance(value, dict)]
    return any(value is False for value in (*args, *(info.get("is_checkpoint_format") for info in (kwargs, *infos))))


def _restore(worker: Any) -> str | None:
    """Read the old weights again from their checkpoint, or say why not."""
    if getattr(worker, UNKNOWN, False):
        return "the old ones came from no checkpoint"
    before = Before(worker.model_runner.get_model())
    try:
        worker.model_runner.reload_weights()
        before.keep_constants()
        delattr(before.model, FINISHED)
        nan_scales.forget(before.model)
    except Exception as error:
        before.put_back()
        return f"the old ones cannot be read again: {type(error).__name__}: {error}"
    return None


def _halt(worker: Any, why: str) -> None:
    """Weights of two checkpoints answer nothing."""

    def execute_model(*_: Any, **__: Any) -> Any:
        raise CheckpointError(f"{why}; load a whole checkpoint, or start the engine again")

    worker.execute_model = execute_model


def finalize(original: Callable[..., None]) -> Callable[..., None]:
    """``finalize_layerwise_processing``: scales of the KV cache, which 0.19.1 refuses to load again, and NaN scales.

    The first load of some formats ends here, too; attention layers have nothing pending then.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def wrapper(model: Module, model_config: Any) -> None:
        ours = any(hasattr(module, MARK) for module in model.modules())
        if ours or scope.gemma4_model(model_config):
            for module in model.modules():
                _load_kv_scales(module)
        whole = next(model.modules())  # not a wrapper around the model
        reloading = hasattr(whole, FINISHED)
        if reloading:
            setattr(whole, FINISHED, True)
        original(model, model_config)
        if not reloading:
            _report(model)

    return wrapper


def initialize(original: Callable[[Module], None]) -> Callable[[Module], None]:
    """``initialize_online_processing``: a layer of experts is whole when all of its tensors are loaded.

    vLLM writes an expert's input scale over two elements and counts both, so that the last tensor came too late.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def wrapper(layer: Module) -> None:
        from vllm.model_executor.model_loader.reload import layerwise

        original(layer)
        scale = layer._parameters.get("w13_input_scale")
        if hasattr(layer, MARK) and scale is not None:
            layerwise.get_layerwise_info(layer).load_numel_total += scale.numel()

    return wrapper


def materialize(original: Callable[..., None]) -> Callable[..., None]:
    """``materialize_layer``: input scales of experts are marked as in a first load until they are loaded.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    @functools.wraps(original)
    def wrapper(layer: Module, *args: Any, **kwargs: Any) -> None:
        original(layer, *args, **kwargs)
        if hasattr(layer, MARK):
            clear_input_scales(layer)

    return wrapper


UNSET = -1.0


def clear_input_scales(layer: Module) -> None:
    """An expert without ``input_scale`` must be told from one whose scale was loaded."""
    for name in ("w13", "w2"):
        scale = layer._parameters.get(f"{name}_input_scale")
        if scale is not None:
            scale.data.fill_(UNSET)


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
