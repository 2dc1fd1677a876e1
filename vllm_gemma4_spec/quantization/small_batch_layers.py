"""Which linear layers take the small-batch kernel, of those that would run on Marlin.

All of a draft model: a draft pass has one row per request, k + 2 in its first pass. Only drafts come from it, so
another order of additions than Marlin's changes no answer.

In front of ``o_proj`` a ``pre_quant_scale`` is a kernel of its own, because attention is no part of the compiled graph:
1.3 us and a launch per layer of 31B on an H200. There this kernel multiplies while it reads, in a target, too, where
the card has room for a second copy of the weight. (vLLM alone cannot load such a checkpoint, so there is no other
result to agree with.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module, Parameter

from vllm_gemma4_spec import scope, settings
from vllm_gemma4_spec.quantization import activations

_NAMES = ("rows_codes", "rows_scales", "rows_global_scale")
_loading_drafter = False


@contextmanager
def _drafter() -> Iterator[None]:
    global _loading_drafter
    _loading_drafter = True
    try:
        yield
    finally:
        _loading_drafter = False


def loading_drafter() -> bool:
    return _loading_drafter


def get_model(original: Callable[..., Module]) -> Callable[..., Module]:
    """``DraftModelProposer._get_model``: layers loaded meanwhile are the drafter's.

    Patch: ``draft-products``. Evidence: ``tests/kernels/test_patches.py::test_stock_loads_a_drafter_as_any_model``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> Module:
        if not scope.gemma4_drafter(self.vllm_config):
            return original(self)
        from vllm_gemma4_spec.quantization import bf16_layers

        with _drafter():
            model = original(self)
        for module in model.modules():
            if type(module).__name__ == "Gemma4MLP":
                _fuse_activation(module)
            elif type(module).__name__ == "Gemma4DecoderLayer":
                _prepare_per_layer_input(module)
        bf16_layers.take(model)
        return model

    return wrapper


def compiled(original: Callable[..., Any]) -> Callable[..., Any]:
    """``VllmBackend.__call__``: the per-layer inputs of a draft model's graph as one operator each, before it is split.

    Patch: ``draft-products``. Evidence: ``tests/kernels/test_patches.py::test_stock_loads_a_drafter_as_any_model``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        if scope.drafters_graph(self):
            _fuse_per_layer_input(graph)
        return original(self, graph, example_inputs)

    return wrapper


def _prepare_per_layer_input(layer: Module) -> None:
    """Its operator exists before a compiled graph that calls it is loaded, and its kernels before CUDA graphs."""
    from vllm_gemma4_spec.kernels import gated_input

    gate, projection = (getattr(layer, name, None) for name in ("per_layer_input_gate", "per_layer_projection"))
    if any(getattr(one, "rows_codes", None) is None for one in (gate, projection)) or not gated_input.available():
        return
    gated_input.register_operator()
    gated_input.choose(gate, projection)


def _fuse_per_layer_input(graph: fx.GraphModule) -> None:
    """Two kernels less per layer."""
    from vllm_gemma4_spec.kernels import gated_input

    if hasattr(torch.ops.vllm, gated_input.OPERATOR) and gated_input.fuse(graph.graph):
        graph.recompile()


def _fuse_activation(mlp: Module) -> None:
    """Let the kernels of gate and up give ``gelu(gate) * up``: one kernel less per layer."""
    layer = mlp.gate_up_proj
    if getattr(layer, "rows_codes", None) is not None and layer.svdquant_lora_a is None:
        layer.rows_gelu = True
        activations.fuse(layer)
        mlp.act_fn = torch.nn.Identity()
        choose(layer)


def prepare(layer: Module) -> None:
    """Give a layer that has just been loaded its second copy of the weight, if it is to have one.

    To be called before Marlin reorders ``layer.weight`` in place.
    """
    from vllm_gemma4_spec.kernels import small_batch_gemm

    scaled = scale_stands_alone(layer)
    if not hasattr(layer, "rows_wanted"):  # weights that are loaded again are treated as the first were
        target = scaled and scope.gemma4_engine(scope.current_config()) and _in_gemm(layer.weight.device)
        layer.rows_wanted = (_loading_drafter or target) and small_batch_gemm.suits(layer)
        layer.rows_gelu = False
    if not layer.rows_wanted:
        return
    layer.rows_scaled = scaled
    for name, tensor in zip(_NAMES, small_batch_gemm.prepare(layer), strict=True):
        layer._parameters.pop(name, None)
        layer.register_parameter(name, Parameter(tensor, requires_grad=False))


def choose(layer: Module) -> None:
    """Decide which batches the kernel takes, of a layer whose weight Marlin has reordered."""
    from vllm_gemma4_spec.kernels import small_batch_gemm

    if layer.rows_codes is not None:
        small_batch_gemm.choose(layer, layer.rows_gelu)


def _in_gemm(device: torch.device) -> bool:
    import vllm.envs

    if vllm.envs.VLLM_BATCH_INVARIANT:  # the kernel's forms add up in orders of their own
        return False
    value = settings.SCALE_IN_PRODUCT.read()
    if value == "auto":
        return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= settings.ROOMY
    return value == "1"


def scale_stands_alone(layer: Module) -> bool:
    """Whether ``pre_quant_scale`` would be a kernel of its own, and the GEMM may take it in."""
    return (
        layer.prefix.endswith(".o_proj")
        and layer.pre_quant_scale is not None
        and layer.svdquant_lora_a is None  # its branch reads the scaled input, too
    )


def linear(layer: Module, x: Tensor) -> Tensor:
    """``[..., K]`` to ``[..., N]``, or ``[..., N / 2]`` where the activation is fused. torch.compile traces this.

    Multiplies by ``pre_quant_scale`` first if ``layer.rows_scaled``.
    """
    return torch.ops.vllm.gemma4_spec_nvfp4_gemm(
        x,
        layer.pre_quant_scale if layer.rows_scaled else None,
        layer.rows_codes,
        layer.rows_scales,
        layer.rows_global_scale,
        layer.weight,
        layer.weight_scale,
        layer.weight_global_scale,
        layer.workspace,
        layer.streamed,
        layer.output_size_per_partition,
        layer.rows_gelu,
        layer.stream_gelu,
    )
