"""Adapters on ``Gemma4ForConditionalGeneration``, the class of every published checkpoint."""

from __future__ import annotations


def supported(original: None) -> bool:
    """``supports_lora``: the language model inside is the text class, whose layers take adapters as they are.

    vLLM keeps towers and embedders out by ``get_mm_mapping``, which the class has.
    """
    return True


def no_embeddings(original: None) -> dict[str, str]:
    """``embedding_modules``, as ``Gemma4ForCausalLM`` has them."""
    return {}


def no_prefixes(original: None) -> list[str]:
    """``lora_skip_prefixes``, as ``Gemma4ForCausalLM`` has them."""
    return []


def gated(original: None) -> bool:
    """``is_3d_moe_weight`` and ``is_non_gated_moe``: experts with gate and up, each with weights of its own."""
    return False
