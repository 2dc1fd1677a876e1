"""Tiny Gemma 4 models with the shapes that matter: 31B-like, E4B-like and 26B-like, text and multimodal."""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("31b", "e4b", "26b")
VOCAB = 96

_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}


# The genuine head sizes, and widths that Marlin's tiles divide: for the GPU, since a CPU attends to 256 at most.
_WIDE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "initializer_range": 0.08,
}


def text_config(kind: str, wide: bool = False) -> dict[str, Any]:
    """What sets the three apart: K = V in full layers, KV reuse with per-layer inputs, experts."""
    config: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 32,
        "global_head_dim": 64,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 0,
        "sliding_window": 16,
        "max_position_embeddings": 256,
        "rope_parameters": _ROPE,
        "final_logit_softcapping": 30.0,
        "initializer_range": 0.12,
        "use_double_wide_mlp": False,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    if kind == "e4b":
        config |= {
            "attention_k_eq_v": False,
            "num_global_key_value_heads": None,
            "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 2,
        }
    if kind == "26b":
        config |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
        config |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    if wide:
        config |= _WIDE
        config |= {"hidden_size_per_layer_input": 128} if kind == "e4b" else {}
        config |= {"moe_intermediate_size": 64} if kind == "26b" else {}
        if kind != "e4b":
            config |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return config


# Wide enough that matrices outweigh norms and scales, as in real models.
LARGER = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "initializer_range": 0.04}


def build(kind: str, multimodal: bool = False, seed: int = 0, wide: bool = False, larger: bool = False) -> Any:
    """A random bfloat16 model of transformers whose activations have a few loud channels, as real ones do."""
    from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

    torch.manual_seed(seed)
    if multimodal:
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "global_head_dim": 16,
            "patch_size": 4,
            "position_embedding_size": 64,
        }
        config = Gemma4Config(
            text_config=text_config(kind, wide) | (LARGER if larger else {}),
            vision_config=vision,
            audio_config=None,
            tie_word_embeddings=True,
            image_token_id=88,
            video_token_id=89,
            audio_token_id=90,
            boi_token_id=91,
            eoi_token_id=92,
        )
        model = Gemma4ForConditionalGeneration(config)
    else:
        model = Gemma4ForCausalLM(Gemma4TextConfig(**text_config(kind, wide) | (LARGER if larger else {})))
    model.config.architectures = [type(model).__name__]  # from_pretrained sets it; ModelOpt reads it
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") and parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            if name.endswith("layernorm.weight"):
                parameter[torch.randperm(parameter.numel(), generator=generator)[:3]] *= 8
    return model.to(torch.bfloat16).eval()


def calibration() -> torch.Tensor:
    """Token ids int64 [4, 24]."""
    return torch.randint(3, VOCAB - 16, (4, 24), generator=torch.Generator().manual_seed(5))
