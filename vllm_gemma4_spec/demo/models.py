"""The demo pair's shapes: the target's those of Gemma 4 31B in small, the drafter's those of E4B.

Both are text-only ``Gemma4ForCausalLM``: the image and audio token ids of the published configs lie beyond the
demo's vocabulary, and a text model has none. Head sizes are 32 and 64, which vLLM's CPU attention supports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_gemma4_spec.demo.tokenizer import CONTROL_TOKENS, END_IDS, VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import Gemma4ForCausalLM

CONTEXT = 2048

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT,
    "head_dim": 32,
    "global_head_dim": 64,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "pad_token_id": CONTROL_TOKENS["<pad>"],
    "bos_token_id": CONTROL_TOKENS["<bos>"],
    "eos_token_id": CONTROL_TOKENS["<eos>"],
    "attn_implementation": "sdpa",
}

# 31B: five sliding layers to a full one, K = V and fewer KV heads in full layers, no per-layer embeddings.
TARGET: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 64,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}

# E4B: per-layer embeddings, the last layers reuse the KV of earlier ones, a smaller window, K and V apart.
DRAFTER: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_k_eq_v": False,
    "sliding_window": 32,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 3,
}


def create(shape: dict[str, Any], seed: int) -> Gemma4ForCausalLM:
    """An untrained float32 model of ``TARGET``'s or ``DRAFTER``'s shape; the same seed gives the same weights.

    Linear layers start with the variance of their width. Gemma 4 norms q and k and does not divide by
    sqrt(head_dim): queries start scaled down, or attention would start as nearly an argmax.
    """
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig, GenerationConfig

    config = Gemma4TextConfig(**shape, initializer_range=shape["hidden_size"] ** -0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma4ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, 0.4)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id, eos_token_id=END_IDS
    )
    return model
