"""Which engines and checkpoints the patches are for; every other one keeps vLLM's own code.

An engine is in scope if its target or its drafter is a Gemma 4. Patches that load checkpoints go by the checkpoint's
format instead, whatever the model. A wrapper outside its scope calls the original with the arguments that it was given.

Everything here reads finished configs and takes whatever stands there: vLLM's own tests pass mocks and None.
Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

from typing import Any

# `model_type` of an MTP assistant in vLLM, this package's and that of later releases; "gemma4_assistant" in its file.
ASSISTANT = "gemma4_mtp"
# `model_type` in a Hugging Face config: with towers, the language model alone, and an assistant.
MODEL_TYPES = frozenset({"gemma4", "gemma4_text", ASSISTANT})
# vLLM's names for the graph of a draft model (an assistant's, too) and for those of a ``Gemma4Model`` in two halves.
DRAFT_GRAPH = "draft_model"
HALVES = ("self_decoder", "cross_decoder")


def gemma4(hf_config: Any) -> bool:
    """Whether a Hugging Face config is a Gemma 4's."""
    return getattr(hf_config, "model_type", None) in MODEL_TYPES


def gemma4_model(model_config: Any) -> bool:
    """Whether a ``ModelConfig`` is a Gemma 4's; False for None."""
    return gemma4(getattr(model_config, "hf_config", None))


def gemma4_engine(vllm_config: Any) -> bool:
    """Whether the engine of a ``VllmConfig`` has a Gemma 4 as target or drafter; False for None."""
    spec = getattr(vllm_config, "speculative_config", None)
    return gemma4_model(getattr(vllm_config, "model_config", None)) or gemma4_model(
        getattr(spec, "draft_model_config", None)
    )


def gemma4_speculation(vllm_config: Any) -> bool:
    """:func:`gemma4_engine`, and it speculates, by whatever method."""
    return getattr(vllm_config, "speculative_config", None) is not None and gemma4_engine(vllm_config)


def gemma4_drafter(vllm_config: Any) -> bool:
    """Whether the engine speculates with a Gemma 4 as its draft model."""
    spec = getattr(vllm_config, "speculative_config", None)
    return getattr(spec, "method", None) == "draft_model" and gemma4_model(getattr(spec, "draft_model_config", None))


def drafters_graph(backend: Any) -> bool:
    """Whether what a ``VllmBackend`` compiles is of a Gemma 4 that drafts: all of it, or a half (``last-tokens``).

    A target is compiled in halves, too, with ``--kv-sharing-fast-prefill``.
    """
    config = backend.vllm_config
    if backend.prefix in HALVES:
        return gemma4_drafter(config) and config.speculative_config.draft_model_config is config.model_config
    return backend.prefix == DRAFT_GRAPH and gemma4_model(config.model_config)


def is_assistant(speculative_config: Any) -> bool:
    """Whether a ``SpeculativeConfig``'s drafter is an MTP assistant of Gemma 4; False for None."""
    draft = getattr(speculative_config, "draft_model_config", None)
    return getattr(getattr(draft, "hf_config", None), "model_type", None) == ASSISTANT


def current_config() -> Any:
    """The ``VllmConfig`` that vLLM has made current (workers do while they are built and load), or None."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def modelopt_nvfp4(model_config: Any) -> bool:
    """Whether a checkpoint is ModelOpt's NVFP4 (NVFP4_AWQ and NVFP4_SVD included)."""
    return getattr(model_config, "quantization", None) == "modelopt_fp4"
