"""Tiny random targets of the four kinds and an assistant for each; the same weights every time.

Assistants are written without transformers, whose 5.5.4 does not know them: configuration and tensors as the
published ones have them (``vllm_gemma4_spec.mtp.weights.expected``, checked against transformers' own export).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.tiny_models import drafter_config, save, target_config
from vllm_gemma4_spec.mtp.config import Gemma4AssistantConfig
from vllm_gemma4_spec.mtp.weights import expected

MOE = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
CENTROIDS = {"use_ordered_embeddings": True, "num_centroids": 32, "centroid_intermediate_top_k": 4}


@dataclass(frozen=True)
class Kind:
    """A target's configuration and what its assistant has of its own."""

    target: Any
    heads: int
    outer: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "31b": lambda: Kind(target_config(), heads=4),
    "26b-a4b": lambda: Kind(target_config(**MOE), heads=2),
    "e4b": lambda: Kind(drafter_config(num_key_value_heads=2, num_attention_heads=4), 2, CENTROIDS),
    "e2b": lambda: Kind(drafter_config(use_double_wide_mlp=True), 2, CENTROIDS),
}
LAYERS = ["sliding_attention"] * 3 + ["full_attention"]


def assistant_config(kind: Kind, **changes: Any) -> dict[str, Any]:
    """``config.json`` of the assistant of ``kind``."""
    target = kind.target
    text = {
        "model_type": "gemma4_text",
        "vocab_size": target.vocab_size,
        "vocab_size_per_layer_input": 0,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": len(LAYERS),
        "layer_types": LAYERS,
        "num_attention_heads": kind.heads,
        "num_key_value_heads": target.num_key_value_heads,
        "num_global_key_value_heads": target.num_global_key_value_heads,
        "head_dim": target.head_dim,
        "global_head_dim": target.global_head_dim,
        "attention_k_eq_v": target.attention_k_eq_v,
        "sliding_window": target.sliding_window,
        "max_position_embeddings": target.max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": len(LAYERS),
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "dtype": "float32",
    }
    outer = {
        "model_type": "gemma4_assistant",
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": target.hidden_size,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **kind.outer,
    }
    text |= {k: changes.pop(k) for k in list(changes) if k in text and k not in outer}
    return {**outer, **changes, "text_config": text}


def save_assistant(kind: Kind, folder: Path, seed: int = 7, **changes: Any) -> Path:
    """A random float32 assistant. No two of its parts are alike, so that none can be dropped or swapped unseen."""
    values = assistant_config(kind, **changes)
    config = Gemma4AssistantConfig(**json.loads(json.dumps(values)))
    g = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in sorted(expected(config).items()):
        if name.endswith("token_ordering"):
            tensors[name] = torch.randperm(shape[0], generator=g)
        elif name.endswith("layer_scalar"):
            tensors[name] = 0.7 + 0.6 * torch.rand(shape, generator=g)
        elif "norm" in name:
            tensors[name] = 1 + 0.2 * torch.randn(shape, generator=g)
        else:
            tensors[name] = torch.randn(shape, generator=g) / shape[-1] ** 0.5
    # A pass would otherwise make ten of one rounding of the pass before it, and the eighth pass is then chance.
    tensors["post_projection.weight"] *= 0.3
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_pair(kind: str, folder: Path) -> tuple[Path, Path]:
    """Target and assistant of ``kind`` below ``folder``."""
    made = KINDS[kind]()
    return save(made.target, folder / kind / "target"), save_assistant(made, folder / kind / "assistant")


if __name__ == "__main__":
    import sys

    for name in KINDS:
        save_pair(name, Path(sys.argv[1]))
