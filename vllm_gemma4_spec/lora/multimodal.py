"""Adapters on ``Gemma4ForConditionalGeneration``, the class of every published checkpoint."""

from __future__ import annotations


def supported(original: None) -> bool:
    """``supports_lora``: the language model inside is the text class, whose layers take adapters as they are.

    vLLM keeps towers and embedders out by ``get_mm_mapping``, which the class has.

    Patch: ``lora-adapters``. Evidence:
    ``tests/patching/test_stock.py::test_the_class_of_published_checkpoints_takes_no_adapter``. Related upstream change:
    none found.
    """
    return True


def no_embeddings(original: None) -> dict[str, str]:
    """``embedding_modules``, as ``Gemma4ForCausalLM`` has them.

    Patch: ``lora-adapters``. Evidence:
    ``tests/patching/test_stock.py::test_the_class_of_published_checkpoints_takes_no_adapter``. Related upstream change:
    none found.
    """
    return {}


def no_prefixes(original: None) -> list[str]:
    """``lora_skip_prefixes``, as ``Gemma4ForCausalLM`` has them.

    Patch: ``lora-adapters``. Evidence:
    ``tests/patching/test_stock.py::test_the_class_of_published_checkpoints_takes_no_adapter``. Related upstream change:
    none found.
    """
    return []


def gated(original: None) -> bool:
    """``is_3d_moe_weight`` and ``is_non_gated_moe``: experts with gate and up, each with weights of its own.

    Patch: ``lora-adapters``. Evidence:
    ``tests/patching/test_stock.py::test_the_class_of_published_checkpoints_takes_no_adapter``. Related upstream change:
    none found.
    """
    return False
