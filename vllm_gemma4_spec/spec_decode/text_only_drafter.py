"""Drafting from token ids alone, whatever the target reads: no towers, no image or audio embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope

# Keys of a multimodal config that its language model needs, too.
_CARRIED_OVER = ("dtype", "quantization_config", "tie_word_embeddings")


def raise_if_multimodal(original: Callable[..., None]) -> Callable[..., None]:
    """``_raise_if_multimodal``: a draft model beside a multimodal target drafts from token ids.

    ``supports_mm_inputs`` follows the target. Left on, ``propose`` would put the target's embeddings, of
    another width and with a mask of another length, into a drafter that can take any. Placeholders of
    images, audio and video are tokens of the vocabulary the two share, so their ids are what is drafted from.

    Patch: ``text-drafter``. Evidence:
    ``tests/patching/test_stock.py::test_a_multimodal_target_is_refused_with_a_draft_model``. Related upstream change:
    #42005; since 0.21.0 such a pair is warned about, no longer refused.
    """

    @functools.wraps(original)
    def wrapper(self: Any) -> None:
        if self.method == "draft_model" and scope.gemma4_engine(self.vllm_config):
            self.supports_mm_inputs = False
        original(self)

    return wrapper


def hf_config_override(original: staticmethod[..., Any]) -> staticmethod[..., Any]:
    """``SpeculativeConfig.hf_config_override``: of a ``Gemma4ForConditionalGeneration`` drafter, its language model.

    ``Gemma4ForCausalLM`` reads the same checkpoint (weights under ``model.language_model.``) and passes over
    those of the towers, which are then neither built nor loaded.

    Patch: ``text-drafter``. Evidence:
    ``tests/patching/test_stock.py::test_a_multimodal_target_is_refused_with_a_draft_model``. Related upstream change:
    #42005; since 0.21.0 such a pair is warned about, no longer refused.
    """

    @functools.wraps(original.__func__)
    def wrapper(hf_config: Any) -> Any:
        return original.__func__(_language_model(hf_config))

    return staticmethod(wrapper)


def _language_model(hf_config: Any) -> Any:
    """The config of the language model inside a multimodal Gemma 4 config; any other config as it is."""
    if hf_config.model_type != "gemma4":
        return hf_config
    text = hf_config.get_text_config()
    for name in _CARRIED_OVER:
        value = getattr(hf_config, name, None)
        if value is not None and not (name == "dtype" and text.dtype is not None):
            setattr(text, name, value)
    text.architectures = ["Gemma4ForCausalLM"]
    return text
