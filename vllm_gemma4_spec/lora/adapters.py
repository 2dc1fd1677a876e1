"""An adapter's tensors against the model's layers: whatever does not fit is named, nothing is left out in silence."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.lora.utils import get_adapter_absolute_path, is_base_embedding_weights, parse_fine_tuned_lora_name

from vllm_gemma4_spec.checkpoints.files import read_header
from vllm_gemma4_spec.errors import CheckpointError

_FILE = "adapter_model.safetensors"
_TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
_KEY = re.compile(r"\blayers\.(\d+)\.self_attn\.k_proj$")


def load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """``WorkerLoRAManager._load_adapter`` for Gemma 4; adapters of other models pass through untouched.

    vLLM compares the last part of a module's name with those it can adapt, so an adapter's tensors for a tower, or for
    layers that the model lacks, are read and never used.

    Patch: ``lora-adapters``. Evidence:
    ``tests/patching/test_stock.py::test_the_class_of_published_checkpoints_takes_no_adapter``. Related upstream change:
    none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, lora_request: Any) -> Any:
        manager = self._adapter_manager
        config = manager.model.config
        if getattr(config, "model_type", None) not in ("gemma4", "gemma4_text"):
            return original(self, lora_request)
        file = Path(get_adapter_absolute_path(lora_request.lora_path), _FILE)
        if file.is_file():
            check(file, manager)
        lora = original(self, lora_request)
        adapt_values(lora.loras, getattr(config, "text_config", config))
        return lora

    return wrapper


def adapt_values(loras: dict[str, Any], text: Any) -> None:
    """Where V is K (``attention_k_eq_v``), an adapter of ``k_proj`` changes the values, too.

    transformers computes both with ``k_proj``; vLLM loads its weight a second time as ``v_proj``.
    """
    if not getattr(text, "attention_k_eq_v", False):
        return
    for name in list(loras):
        found = _KEY.search(name)
        if found is None or text.layer_types[int(found[1])] != "full_attention":
            continue
        value = name.removesuffix("k_proj") + "v_proj"
        made = copy.copy(loras[name])
        made.module_name = value
        made.lora_a, made.lora_b = loras[name].lora_a.clone(), loras[name].lora_b.clone()  # scaled in place later
        loras.setdefault(value, made)


def check(file: Path, manager: Any) -> None:
    """Every tensor of an adapter belongs to a layer of the language model and has its size.

    Raises:
        CheckpointError: names file and tensor.
    """
    sizes = layer_sizes(manager)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    for name, info in read_header(file).items():
        if is_base_embedding_weights(name):
            continue
        try:
            module, is_a = parse_fine_tuned_lora_name(name, mapper)
        except ValueError:
            continue  # vLLM names it itself
        if any(tower in f".{module}" for tower in (f".{t}" for t in _TOWERS)):
            raise CheckpointError(
                f"{file}: {name} adapts a tower; vLLM 0.19.1 applies adapters of Gemma 4 to the language model alone: "
                "train it without, or merge it into the checkpoint"
            )
        if ".experts" in module:
            continue
        if module not in sizes:
            raise CheckpointError(
                f"{file}: {name}: {type(manager.model).__name__} has no {module} that takes an adapter; "
                "it was made for another base model"
            )
        inputs, outputs = sizes[module]
        found, wanted = (info.shape[-1], inputs) if is_a else (info.shape[0], outputs)
        if wanted and found != wanted:
            raise CheckpointError(
                f"{file}: {name} has {found} {'inputs' if is_a else 'outputs'}, {module} has {wanted}; "
                "it was made for another base model"
            )


def layer_sizes(manager: Any) -> dict[str, tuple[int, int]]:
    """Module as adapters name it -> (inputs, outputs) of the whole layer, over all ranks; 0: not known."""
    out: dict[str, tuple[int, int]] = {}
    for name, layer in manager.modules.items():
        base = getattr(layer, "base_layer", layer)
        members = manager.packed_modules.get(name) or [name]
        heads = getattr(base, "total_num_kv_heads", None)
        if heads is not None:  # output_sizes of a qkv_proj counts KV heads that ranks hold twice
            rows = [base.total_num_heads * base.head_size, *[heads * base.head_size] * 2]
        else:
            rows = list(getattr(base, "output_sizes", [])) or [getattr(base, "output_size", 0)]
        rows = rows if len(rows) == len(members) else [0] * len(members)
        out |= {m: (getattr(base, "input_size", 0), n) for m, n in zip(members, rows, strict=True)}
    return out
