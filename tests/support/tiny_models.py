"""Tiny random Gemma 4 checkpoints, written by transformers, that the real engine loads in a second.

The CPU attention of vLLM 0.19.1 takes head sizes 32 to 256, so 32 (sliding) and 64 (full) stand for the
genuine 256 and 512. Everything else keeps the genuine pattern: five sliding layers to one full layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

PATTERN = ["sliding_attention"] * 5 + ["full_attention"]

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "head_dim": 32,
    "global_head_dim": 64,
    "max_position_embeddings": 1024,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "num_experts": None,
    "top_k_experts": None,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "initializer_range": 0.05,
}


# Changes to the two below, so that four ranks divide heads and widths. KV heads are fewer than ranks, as E4B has 2,
# 31B's full layers 4 and 26B-A4B's 2.
RANKS: dict[str, dict[str, Any]] = {
    "target": {"num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2},
    "drafter": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128},
    "experts": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
}


def target_config(**changes: Any) -> Gemma4TextConfig:
    """Shaped like 31B: K = V and fewer KV heads in full layers, no per-layer embeddings."""
    values = _COMMON | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 64,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    }
    return _config(values | changes)


def drafter_config(**changes: Any) -> Gemma4TextConfig:
    """Shaped like E4B: per-layer embeddings, the last layers reuse KV, a smaller window."""
    values = _COMMON | {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "sliding_window": 32,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 6,
    }
    return _config(values | changes)


def _config(values: dict[str, Any]) -> Gemma4TextConfig:
    layers = values["num_hidden_layers"]
    return Gemma4TextConfig(layer_types=(PATTERN * layers)[:layers], **values)


def save(config: Gemma4TextConfig, folder: Path, seed: int = 0) -> Path:
    """Write a float32 checkpoint with random weights; the norms are random too, so none can be dropped."""
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    generation = {"eos_token_id": [1], "bos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def save_for_ranks(folder: Path, **changes: Any) -> dict[str, Path]:
    """Checkpoints that one to four ranks divide: ``target``, ``drafter``, ``close`` and, like 26B-A4B, ``experts``."""
    target = save(target_config(**RANKS["target"] | changes), folder / "target")
    return {
        "target": target,
        "drafter": save(drafter_config(**RANKS["drafter"] | changes), folder / "drafter", seed=1),
        "close": perturbed(target, folder / "close"),
        "experts": save(target_config(**RANKS["target"] | RANKS["experts"] | changes), folder / "experts"),
    }


def perturbed(model: Path, folder: Path, noise: float = 0.02, seed: int = 3) -> Path:
    """A copy of ``model`` with noise on its weights: a drafter that is right now and then."""
    torch.manual_seed(seed)
    copy = Gemma4ForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(noise * parameter.std(correction=0) * torch.randn_like(parameter))
    copy.save_pretrained(folder)
    return folder
