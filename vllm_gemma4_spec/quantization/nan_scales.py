"""NaN block scales at load: found, repaired by the rule, counted, reported once per model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from vllm.distributed import get_tp_group

from vllm_gemma4_spec import settings
from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.errors import CheckpointError
from vllm_gemma4_spec.metrics import reports
from vllm_gemma4_spec.quantization import stream_layers

logger = logging.getLogger("vllm.plugins.gemma4_spec")


def repair(layer: Module, prefix: str, packed: Tensor, scale: Tensor) -> None:
    """Repair ``scale`` float8_e4m3fn [..., K/16] of weights uint8 [..., K/2] in place; the count stays on the layer.

    ``layer.modelopt_nan`` is ``{prefix: (blocks, of them destroyed)}``, set only where there are any. Afterwards
    no scale is NaN or negative.
    """
    nan, negative = nvfp4.survey(scale)
    if nan:
        found = nvfp4.find_nan(packed, scale)
        nvfp4.repair_(scale, found)
        _count(layer, prefix, found)
    if negative:
        nvfp4.make_positive_(packed, scale)


def _count(layer: Module, prefix: str, found: nvfp4.NanBlocks) -> None:
    if getattr(layer, "tp_size", 1) > 1 and _replicated(layer) and get_tp_group().rank_in_group > 0:
        return  # every rank holds this layer whole; the first one counts it
    layer.modelopt_nan = {**getattr(layer, "modelopt_nan", {}), prefix: (found.count, found.lost)}


def _replicated(layer: Module) -> bool:
    whole = (getattr(layer, "input_size", 0), getattr(layer, "output_size", 0))
    return whole == (getattr(layer, "input_size_per_partition", -1), getattr(layer, "output_size_per_partition", -1))


def _counted(model: Module) -> tuple[set[str], int, int]:
    """Layers with NaN block scales, their blocks and how many of those were destroyed, on this rank."""
    counts: dict[str, tuple[int, int]] = {}
    for module in model.modules():
        counts |= getattr(module, "modelopt_nan", {})
    blocks, lost = (sum(c[i] for c in counts.values()) for i in (0, 1))
    return set(counts), blocks, lost


def summary(model: Module) -> str | None:
    """One line for the whole model, counted over all tensor-parallel ranks; None where nothing was NaN."""
    layers, blocks, lost = _counted(model)
    group = get_tp_group()
    if group.world_size > 1:
        everyone: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(everyone, (sorted(layers), blocks, lost), group=group.cpu_group)
        layers = {name for names, _, _ in everyone for name in names}
        blocks, lost = (sum(rank[i] for rank in everyone) for i in (1, 2))
    if not blocks:
        return None
    some = ", ".join(sorted(layers)[:3]) + (", …" if len(layers) > 3 else "")
    return (
        f"{blocks} NaN block scales in {len(layers)} NVFP4 layers ({some}): {blocks - lost} set to 448 (codes intact), "
        f"{lost} set to zero (codes destroyed)"
    )


def reported(original: Callable[..., None]) -> Callable[..., None]:
    """``process_weights_after_loading`` that says what was repaired, or refuses the model in strict mode.

    Activations become part of GEMMs here, too: all layers are ready, and nothing has been compiled.

    Patch: ``modelopt-nvfp4``. Evidence:
    ``tests/quantization/test_nvfp4_config.py::test_undo_gives_vllm_its_class_back``. Related upstream change: #35733
    (emulation, in 0.20.0), #40708 (names of experts, in 0.21.0), #44371 (constants in a reload, after 0.23.0), #52501
    (NaN scales refused, 0.30 to 0.32); none found for NVFP4_AWQ and NVFP4_SVD.
    """

    def process_weights_after_loading(model: Module, *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        if any(hasattr(module, "modelopt_checked") for module in model.modules()):
            report(model)
            stream_layers.fuse_activations(model)

    return process_weights_after_loading


def report(model: Module) -> None:
    """Say and count what was repaired since the last report.

    Raises:
        CheckpointError: something was, and the setting is strict.
    """
    line = summary(model)
    if line is None:
        return
    _, blocks, lost = _counted(model)
    forget(model)
    advice = "`vllm-gemma4-spec repair` restores the blocks from the bf16 parent"
    if settings.NAN_SCALES.read() == "strict":
        raise CheckpointError(f"{line.split(':')[0]}; {advice}, or unset {settings.NAN_SCALES.name}")
    if get_tp_group().rank_in_group == 0:
        logger.warning("NVFP4 checkpoint: %s; %s", line, advice)
    reports.count("nan_blocks_repaired", blocks - lost, "saturated")
    reports.count("nan_blocks_repaired", lost, "zeroed")


def forget(model: Module) -> None:
    """Weights may be loaded again, with other scales."""
    for module in model.modules():
        module.__dict__.pop("modelopt_nan", None)
