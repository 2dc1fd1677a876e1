"""What a checkpoint is, layer kind by layer kind, and what vLLM alone and the plugin make of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open

from vllm_gemma4_spec.checkpoints import nvfp4, outcome
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.layers import Quantized, canonical
from vllm_gemma4_spec.checkpoints.tensor_info import TensorInfo
from vllm_gemma4_spec.errors import CheckpointError

_MATRIX = re.compile(r"(?:language_model\.|model\.)*layers\.\d+\.(?P<kind>.+)")


class Kind(BaseModel):
    """Linears of one kind, such as ``self_attn.o_proj``."""

    kind: str
    layers: int = 0
    formats: dict[str, int] = Field(default_factory=dict, description="NVFP4, BF16, … -> number of layers")
    pre_quant_scale: int = 0
    low_rank: int = 0
    bytes: int = 0


class NanLayer(BaseModel):
    """NaN block scales of one linear."""

    module: str
    file: str
    blocks: int
    destroyed: int
    intact: int


class Report(BaseModel):
    """The whole of ``inspect``; ``clean`` says that nothing has to be repaired."""

    path: str
    architectures: list[str]
    quant_method: str | None
    algorithm: str | None
    producer: str | None
    kv_cache: str | None
    tensors: int
    shards: int
    bytes: int
    kinds: list[Kind]
    nan: list[NanLayer]
    nan_blocks: int
    clean: bool
    vllm_alone: str
    with_overlay: str
    machines: dict[str, str] = Field(description="kind of machine -> what happens there with the plugin")


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """One tensor, copied; nothing else of its file is held in memory.

    Raises:
        CheckpointError: the file changed since its header was read.
    """
    try:
        with safe_open(info.file, "pt") as opened:
            return opened.get_tensor(info.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{info}: cannot be read ({str(error).splitlines()[0]})") from None


def nan_blocks(module: Quantized) -> nvfp4.NanBlocks | None:
    """The NaN blocks of one linear; None where there are none. Reads the weight only if there are."""
    scale = read_tensor(module.parts["weight_scale"])
    if not nvfp4.has_nan(scale):
        return None
    return nvfp4.find_nan(read_tensor(module.parts["weight"]), scale)


def scan(checkpoint: Checkpoint, step: Callable[[Path], None] = lambda file: None) -> Iterator[tuple[Quantized, Any]]:
    """Every linear with NaN blocks, shard by shard; ``step`` is called after each shard.

    Raises:
        CheckpointError: a tensor is missing or unfit, or a global scale is NaN or infinite.
    """
    checkpoint.check()
    by_file: dict[Path, list[Quantized]] = defaultdict(list)
    for module in checkpoint.quantized.values():
        if not module.is_nvfp4:
            continue
        by_file[module.parts["weight_scale"].file].append(module)
    for file in checkpoint.files:
        for module in by_file[file]:
            for info in module.scalars:
                if not bool(torch.isfinite(read_tensor(info)).all()):
                    raise CheckpointError(f"{info}: NaN or infinity; quantize the model again")
            found = nan_blocks(module)
            if found is not None:
                yield module, found
        step(file)


def inspect(checkpoint: Checkpoint, step: Callable[[Path], None] = lambda file: None) -> Report:
    """Raises CheckpointError for a checkpoint that cannot be read."""
    section = checkpoint.quantization
    producer = checkpoint.quantization_config.get("producer")
    producer = producer if isinstance(producer, dict) else {}
    nan = [
        NanLayer(
            module=module.module,
            file=module.parts["weight_scale"].file.name,
            blocks=found.count,
            destroyed=found.lost,
            intact=found.count - found.lost,
        )
        for module, found in scan(checkpoint, step)
    ]
    method = _word(checkpoint.quantization_config.get("quant_method")) or ("modelopt" if section else None)
    architectures = checkpoint.config.get("architectures") or []
    return Report(
        path=str(checkpoint.folder),
        architectures=[str(a) for a in architectures] if isinstance(architectures, list) else [str(architectures)],
        quant_method=method,
        algorithm=_word(section.get("quant_algo") or section.get("format")),
        producer=" ".join(str(producer[key]) for key in ("name", "version") if key in producer) or None,
        kv_cache=_word(section.get("kv_cache_quant_algo")) or ("FP8" if section.get("kv_cache_scheme") else None),
        tensors=len(checkpoint.tensors),
        shards=len(checkpoint.files),
        bytes=sum(t.bytes for t in checkpoint.tensors.values()),
        kinds=_kinds(checkpoint),
        nan=nan,
        nan_blocks=sum(layer.blocks for layer in nan),
        clean=not nan,
        vllm_alone=outcome.vllm_alone(checkpoint, method, bool(nan)),
        with_overlay=outcome.with_overlay(
            checkpoint, method, sum(n.destroyed for n in nan), sum(n.intact for n in nan)
        ),
        machines=outcome.machines(checkpoint, method),
    )


def _word(value: Any) -> str | None:
    """A config may hold anything; what is no text is shown as it stands."""
    return str(value) if value else None


def _kinds(checkpoint: Checkpoint) -> list[Kind]:
    kinds: dict[str, Kind] = {}
    for name, info in checkpoint.tensors.items():
        name = canonical(name)
        module, _, suffix = name.rpartition(".")
        stacked = suffix in ("gate_up_proj", "down_proj")  # experts of transformers 5: no ".weight"
        if len(info.shape) < 2 or not (suffix in ("weight", "weight_packed") or stacked):
            continue
        module = name if stacked else module
        found = _MATRIX.search(module)
        label = re.sub(r"experts\.\d+", "experts.*", found["kind"] if found else module.removeprefix("model."))
        kind = kinds.setdefault(label, Kind(kind=label))
        quantized = checkpoint.quantized.get(module)
        form = (
            quantized.algorithm
            if quantized
            else ("NVFP4 (compressed-tensors)" if suffix == "weight_packed" else info.dtype)
        )
        kind.layers += 1
        kind.formats[form] = kind.formats.get(form, 0) + 1
        kind.bytes += sum(part.bytes for part in quantized.parts.values()) if quantized else info.bytes
        if quantized:
            kind.pre_quant_scale += "pre_quant_scale" in quantized.parts
            kind.low_rank += "svdquant_lora_a" in quantized.parts
    return sorted(kinds.values(), key=lambda k: -k.bytes)
