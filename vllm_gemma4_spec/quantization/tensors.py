"""How the tensors that vLLM has no parameter for get into a linear layer, cut for tensor parallelism."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.parameter import ModelWeightParameter

from vllm_gemma4_spec.errors import CheckpointError

RANK = 32  # ModelOpt's default; a checkpoint's own rank replaces it

_MEMBERS = {"q": 0, "k": 1, "v": 2}


def member(shard: Any) -> int:
    """Index of a fused layer's member: ``q`` -> 0, ``1`` -> 1, None (not fused) -> 0."""
    return _MEMBERS.get(shard, shard) if shard is not None else 0


class Ledger:
    """Which tensors of which members a layer has been given; every tensor passes through :meth:`track`.

    Attributes:
        given: (parameter name, member index).
    """

    def __init__(self, layer: Module, prefix: str, members: int) -> None:
        self.prefix = prefix
        self.members = members
        self.given: set[tuple[str, int]] = set()
        # vLLM keeps every parameter's loader for as long as the layer lives, which must not be because of the loader.
        self._layer = weakref.ref(layer)

    def track(self, load: Callable[..., None]) -> Callable[..., None]:
        """A weight loader that notes the tensor and calls ``load(param, tensor, [shard id])``."""
        original = weakly(load)

        def tracked(param: Parameter, loaded: Tensor, *shard: Any, **named: Any) -> None:
            original()(param, loaded, *shard, **named)
            index = shard[0] if shard else named.get("loaded_shard_id")
            layer = self._layer()
            assert layer is not None
            name = next((n for n, p in layer.named_parameters(recurse=False) if p is param), "?")
            many = index is None or isinstance(index, tuple)
            self.given |= {(name, i) for i in (range(self.members) if many else [member(index)])}

        return tracked

    def has(self, name: str, index: int | None = None) -> bool:
        """Whether ``name`` was given, by the member or by any."""
        return any(n == name and (index is None or i == index) for n, i in self.given)


def weakly(load: Callable[..., None]) -> Callable[[], Callable[..., None]]:
    """Gives ``load`` back; a layer's own method is not what keeps the layer."""
    if not inspect.ismethod(load):
        return lambda: load
    reference = weakref.WeakMethod(load)

    def given() -> Callable[..., None]:
        found = reference()
        assert found is not None
        return found

    return given


def _cut(layer: Module, loaded: Tensor, dim: int) -> Tensor:
    """This rank's part along the input dimension; all of it where the layer's input is not cut."""
    width = layer.input_size_per_partition
    if loaded.shape[dim] == width:
        return loaded
    return loaded.narrow(dim, layer.tp_rank * width, width)


def _full_width(layer: Module, loaded: Tensor, dim: int, what: str) -> None:
    if loaded.dim() <= dim or loaded.shape[dim] != layer.input_size:
        raise CheckpointError(f"{what}: shape {list(loaded.shape)}, expected {layer.input_size} along the inputs")


def add_pre_quant_scale(layer: Module, ledger: Ledger) -> None:
    """``layer.pre_quant_scale`` float32 [members, K of this rank], all ones until loaded.

    One row per member, so that members that disagree can be told after loading.
    """
    what, layer = f"{ledger.prefix}.pre_quant_scale", weakref.proxy(layer)

    def load(param: Parameter, loaded: Tensor, *shard: Any) -> None:
        _full_width(layer, loaded, 0, what)
        if not loaded.is_floating_point() or not bool(torch.isfinite(loaded).all()):
            raise CheckpointError(f"{what}: {loaded.dtype} with NaN or infinity; it must be finite floating point")
        param.data[member(shard[0] if shard else None)].copy_(_cut(layer, loaded, 0))

    shape = (ledger.members, layer.input_size_per_partition)
    param = Parameter(torch.ones(shape, dtype=torch.float32), requires_grad=False)
    param.weight_loader = ledger.track(load)
    layer.register_parameter("pre_quant_scale", param)


def add_low_rank(layer: Module, ledger: Ledger, dtype: torch.dtype, load_rows: Callable[..., None]) -> None:
    """``layer.svdquant_lora_a`` [members, rank, K of this rank] and ``layer.svdquant_lora_b`` [N of this rank, rank].

    ``load_rows`` is the layer's own weight loader: it places a member's rows, cut at heads for q, k, v.
    """

    layer, original = weakref.proxy(layer), weakly(load_rows)

    def load_a(param: Parameter, loaded: Tensor, *shard: Any) -> None:
        _full_width(layer, loaded, 1, f"{ledger.prefix}.svdquant_lora_a")
        if param.shape[1] != loaded.shape[0]:
            param.data = param.data.new_zeros(param.shape[0], loaded.shape[0], param.shape[2])
        param.data[member(shard[0] if shard else None)].copy_(_cut(layer, loaded, 1))

    def load_b(param: Parameter, loaded: Tensor, *shard: Any) -> None:
        if param.shape[1] != loaded.shape[1]:
            param.data = param.data.new_zeros(param.shape[0], loaded.shape[1])
        if layer.input_size_per_partition != layer.input_size:  # row-parallel: only A is cut
            param.data.copy_(loaded)
        else:
            original()(param, loaded, *shard)

    inputs, outputs = layer.input_size_per_partition, layer.output_size_per_partition
    a = Parameter(torch.zeros((ledger.members, RANK, inputs), dtype=dtype), requires_grad=False)
    a.weight_loader = ledger.track(load_a)
    layer.register_parameter("svdquant_lora_a", a)
    b = ModelWeightParameter(
        data=torch.zeros((outputs, RANK), dtype=dtype), input_dim=1, output_dim=0, weight_loader=ledger.track(load_b)
    )
    layer.register_parameter("svdquant_lora_b", b)


def agreed(rows: Tensor, given: list[int], what: str) -> Tensor:
    """The one value that all given members of a fused layer have.

    Raises:
        CheckpointError: they differ; the fused layer has one input, so it can have one scale only.
    """
    first = rows[given[0]]
    for index in given[1:]:
        if not torch.equal(rows[index], first):
            raise CheckpointError(
                f"{what}: members {given[0]} and {index} of the fused layer differ; "
                "export them with one value, as ModelOpt does for layers that share an input"
            )
    return first.contiguous()
