"""The configuration of an assistant, for transformers that lack it, and as vLLM is to see it."""

from __future__ import annotations

import functools
from typing import Any

from transformers import Gemma4TextConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vllm_gemma4_spec.scope import ASSISTANT

MODEL_TYPE = "gemma4_assistant"
# As in vLLM's later releases.
ARCHITECTURE = "Gemma4MTPModel"


class Gemma4AssistantConfig(PretrainedConfig):
    """``gemma4_assistant`` as transformers has it from 5.8 on; 5.5.4 does not know it.

    Args:
        text_config: the assistant's layers, an ordinary ``gemma4_text``.
        backbone_hidden_size: the target's hidden size.
        use_ordered_embeddings: the head looks at the tokens of the likeliest centroids alone.
        num_centroids: clusters of ``vocab_size / num_centroids`` tokens.
        centroid_intermediate_top_k: clusters that a pass looks at.
    """

    model_type = MODEL_TYPE
    sub_configs = {"text_config": Gemma4TextConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: dict[str, Any] | Gemma4TextConfig | None = None,
        backbone_hidden_size: int = 1536,
        use_ordered_embeddings: bool = False,
        num_centroids: int = 2048,
        centroid_intermediate_top_k: int = 32,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = Gemma4TextConfig(**text_config)
        self.text_config = text_config
        self.backbone_hidden_size = backbone_hidden_size
        self.use_ordered_embeddings = use_ordered_embeddings
        self.num_centroids = num_centroids
        self.centroid_intermediate_top_k = centroid_intermediate_top_k
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def config_registry(original: dict[str, Any]) -> dict[str, Any]:
    """``_CONFIG_REGISTRY``: an assistant's class, too, where transformers has none.

    Patch: ``mtp-assistant``. Evidence: ``tests/mtp/test_mtp_validation.py::test_stock_does_not_know_assistants``.
    Related upstream change: #41745 (assistants, in 0.21.0), #43982 and #43909 (in 0.23.0), #45258 and #49262 (open).
    """
    if MODEL_TYPE in CONFIG_MAPPING:
        return original
    return type(original)(original, **{MODEL_TYPE: Gemma4AssistantConfig})


def hf_config_override(original: staticmethod[..., Any]) -> staticmethod[..., Any]:
    """``SpeculativeConfig.hf_config_override``: an assistant's config becomes that of an MTP drafter.

    Patch: ``mtp-assistant``. Evidence: ``tests/mtp/test_mtp_validation.py::test_stock_does_not_know_assistants``.
    Related upstream change: #41745 (assistants, in 0.21.0), #43982 and #43909 (in 0.23.0), #45258 and #49262 (open).
    """

    # vLLM pickles it by name when it starts an engine in a process of its own.
    @functools.wraps(original.__func__)
    def wrapper(hf_config: Any) -> Any:
        if hf_config.model_type != MODEL_TYPE:
            return original.__func__(hf_config)
        # Of the shared layers none has its target among the assistant's own.
        hf_config.text_config.num_kv_shared_layers = 0
        hf_config.update({"model_type": ASSISTANT, "n_predict": 1, "architectures": [ARCHITECTURE]})
        return hf_config

    return staticmethod(wrapper)


def mtp_model_types(original: Any) -> Any:
    """``MTPModelTypes``, whose members' method is ``mtp``: assistants are among them.

    Patch: ``mtp-assistant``. Evidence: ``tests/mtp/test_mtp_validation.py::test_stock_does_not_know_assistants``.
    Related upstream change: #41745 (assistants, in 0.21.0), #43982 and #43909 (in 0.23.0), #45258 and #49262 (open).
    """
    from typing import Literal, get_args

    return Literal[(*get_args(original), ASSISTANT)]


def convertors(original: dict[str, Any]) -> dict[str, Any]:
    """``MODEL_ARCH_CONFIG_CONVERTORS``: an assistant takes and gives hidden states of the target's width.

    Patch: ``mtp-assistant``. Evidence: ``tests/mtp/test_mtp_validation.py::test_stock_does_not_know_assistants``.
    Related upstream change: #41745 (assistants, in 0.21.0), #43982 and #43909 (in 0.23.0), #45258 and #49262 (open).
    """
    from vllm.transformers_utils.model_arch_config_convertor import Gemma4ModelArchConfigConvertor

    class AssistantArchConfigConvertor(Gemma4ModelArchConfigConvertor):
        def get_hidden_size(self) -> int:
            return int(self.hf_config.backbone_hidden_size)

    return {**original, ASSISTANT: AssistantArchConfigConvertor}


def registry(original: Any) -> Any:
    """``ModelRegistry``: knows the model class by name; it is imported when an assistant is loaded.

    Patch: ``mtp-assistant``. Evidence: ``tests/mtp/test_mtp_validation.py::test_stock_does_not_know_assistants``.
    Related upstream change: #41745 (assistants, in 0.21.0), #43982 and #43909 (in 0.23.0), #45258 and #49262 (open).
    """
    from vllm.model_executor.models.registry import _LazyRegisteredModel, _ModelInfo

    from vllm_gemma4_spec.mtp.interface import Gemma4MTP

    class Assistant(_LazyRegisteredModel):
        def inspect_model_cls(self) -> Any:
            return _ModelInfo.from_model_cls(Gemma4MTP)

    original.models[ARCHITECTURE] = Assistant("vllm_gemma4_spec.mtp.model", "Gemma4MTP")
    return original
