"""NVFP4 of an MTP assistant: weights alone, without ModelOpt, which does not know the network.

A draft runs a few rows at a time, so the bytes of the weights are its time, and activations in four bits would save
nothing. The tied head stays as it is: loading makes an NVFP4 copy of it that finds candidates for exact logits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_gemma4_spec._version import __version__
from vllm_gemma4_spec.checkpoints import BLOCK, nvfp4
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.repairing import new_folder
from vllm_gemma4_spec.errors import CheckpointError

_KEPT = ("model.embed_tokens.", "masked_embedding.", "lm_head.")
_MERGED = ("gate_proj", "up_proj")  # one matrix in the engine, with one global scale


def quantize(source: Checkpoint, out: Path) -> None:
    """Write ``source`` with its linear layers in ModelOpt's W4A16_NVFP4 to ``out``.

    Raises:
        CheckpointError: quantized already, a layer no blocks divide, or no space; nothing was left there.
    """
    if source.quantization or source.quantized:
        raise CheckpointError(f"{source.folder}: quantized already; name the bf16 assistant")
    tensors: dict[str, Tensor] = {}
    for file in source.files:
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    with new_folder(out) as partial:
        save_file(quantized(tensors, source.folder), partial / "model.safetensors", {"format": "pt"})
        config: dict[str, Any] = json.loads((source.folder / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": "W4A16_NVFP4",
            "group_size": BLOCK,
            "ignore": ["lm_head", "model.embed_tokens", "masked_embedding*"],
            "producer": {"name": "vllm-gemma4-spec", "version": __version__},
        }
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for other in source.folder.iterdir():
            kept = other.suffix in (".json", ".jinja", ".model") and "safetensors" not in other.name
            if other.is_file() and kept and not (partial / other.name).exists():
                shutil.copy2(other, partial / other.name)


def quantized(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """``tensors`` with the weights of linear layers as codes and scales."""
    out = dict(tensors)
    for name, weight in tensors.items():
        if weight.dim() != 2 or not name.endswith(".weight") or name.startswith(_KEPT):
            continue
        if weight.shape[1] % BLOCK:
            raise CheckpointError(f"{folder}: {name} has {weight.shape[1]} columns, no multiple of {BLOCK}")
        amax = max(tensors[other].abs().amax().float() for other in _together(name) if other in tensors)
        scale_2 = amax.clamp(min=1e-12) / (nvfp4.CODE_MAX * nvfp4.SCALE_MAX)
        scale, module = nvfp4.block_scale(weight, scale_2), name.removesuffix(".weight")
        out[name] = nvfp4.encode(weight, scale, scale_2)
        out[f"{module}.weight_scale"], out[f"{module}.weight_scale_2"] = scale, scale_2.clone()
    return out


def _together(name: str) -> list[str]:
    """Weights that share a global scale with ``name``, itself included."""
    for part in _MERGED:
        if f".{part}." in name:
            return [name.replace(part, other) for other in _MERGED]
    return [name]
