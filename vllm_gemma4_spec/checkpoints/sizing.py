"""How many bytes a checkpoint will have in each recipe, from the headers of the bf16 one; and which recipe fits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vllm_gemma4_spec.checkpoints import BLOCK
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.layers import FLOATS
from vllm_gemma4_spec.errors import CheckpointError, SettingError

_TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
_LINEAR = re.compile(r"layers\.\d+\..*_proj(\.weight)?$|per_layer_(input_gate|projection|model_projection)\.weight$")
_UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}

# Of a card's memory: what vLLM takes by default, and what must stay for the KV cache and activations.
UTILIZATION = 0.9
RESERVED = 1 << 30

_BITS = {"nvfp4": 4 + 8 / BLOCK, "fp8": 8.0}


@dataclass(frozen=True)
class Choice:
    """A recipe, whether the towers are kept, and the bytes of the checkpoint it will write."""

    recipe: str
    towers: bool
    bytes: int


# From the most to the least of the model kept as it was.
_CHOICES = (("mixed", True), ("mixed", False), ("awq-full", True), ("awq-full", False))


def is_tower(name: str) -> bool:
    return any(f".{tower}" in f".{name}" for tower in _TOWERS)


def predict(checkpoint: Checkpoint, recipe: str, towers: bool = True) -> int:
    """Bytes of the tensors that ``quantize --recipe`` will write, to one per cent (norms' and scales' are small)."""
    total = 0.0
    for name, info in checkpoint.tensors.items():
        if is_tower(name):
            total += info.bytes if towers else 0
            continue
        if info.dtype not in FLOATS or len(info.shape) < 2 or not _LINEAR.search(name) or ".router." in name:
            total += info.bytes
            continue
        kind = "fp8" if recipe == "mixed" and ".self_attn." in name else "nvfp4"
        numbers = 1
        for size in info.shape:
            numbers *= size
        total += numbers * _BITS[kind] / 8
    return round(total)


def read_size(text: str) -> int:
    """``24GiB`` -> bytes.

    Raises:
        SettingError: not a number with one of the units GiB, GB, MiB, MB.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)\s*", text)
    if found is None or float(found[1]) <= 0:
        raise SettingError(f"--fit {text}: write the card's memory with its unit, as in 24GiB")
    return round(float(found[1]) * _UNITS[found[2]])


def choose(checkpoint: Checkpoint, memory: int) -> Choice:
    """The first choice whose weights fit a card of ``memory`` bytes with :data:`RESERVED` left for the KV cache.

    Raises:
        CheckpointError: none does; names the smallest.
    """
    room = int(memory * UTILIZATION) - min(RESERVED, memory // 8)
    options = [Choice(recipe, towers, predict(checkpoint, recipe, towers)) for recipe, towers in _CHOICES]
    for option in options:
        if option.bytes <= room:
            return option
    least = min(options, key=lambda option: option.bytes)
    raise CheckpointError(
        f"{checkpoint.folder}: the smallest form ({least.recipe}, without towers) has {least.bytes / 2**30:.2f} GiB, "
        f"and {memory / 2**30:.2f} GiB hold {max(0, room) / 2**30:.2f} GiB of weights; take a larger card or spread "
        "the model over two (tensor parallelism)"
    )
