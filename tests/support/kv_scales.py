"""Checkpoints that bring scales for an fp8 KV cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def with_kv_scales(model: Path, folder: Path, k_scale: float, v_scale: float, k_gain: float = 1.0) -> Path:
    """A copy of ``model`` as ModelOpt exports one with an fp8 KV cache: weights as they are, scales for the cache.

    The scales are those of every layer with a KV cache of its own. Layers that reuse KV get 1.0, as ModelOpt writes
    them: it has seen nothing there. Keys are ``k_gain`` times those of ``model`` and queries that much smaller: the
    same attention, but past 448 fp8 holds no key without its scale.
    """
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": ["*"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    }
    config["dtype"] = "bfloat16"  # the format's linear methods take no float32
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("k_norm.weight"):
            tensors[name] = tensors[name] * k_gain
        elif name.endswith("q_norm.weight"):
            tensors[name] = tensors[name] / k_gain
    own = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    for layer in range(config["num_hidden_layers"]):
        for name, scale in (("k", k_scale), ("v", v_scale)):
            key = f"model.layers.{layer}.self_attn.{name}_proj.{name}_scale"
            tensors[key] = torch.tensor(scale if layer < own else 1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
