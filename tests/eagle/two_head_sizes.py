"""An EAGLE3 head whose layers have their own head sizes, as a Gemma-like head would; for tests only."""

from __future__ import annotations

import copy

from vllm.config import VllmConfig
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM, LlamaDecoderLayer


class Eagle3TwoHeadSizesForCausalLM(Eagle3LlamaForCausalLM):
    """Stock, with every layer after the first rebuilt for ``config.head_dims[i]``."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for i, dim in enumerate(self.config.head_dims):
            if i == 0:
                continue
            name = f"model.layers.{i + self.config.target_layer_count}"
            del vllm_config.compilation_config.static_forward_context[f"{name}.self_attn.attn"]
            config = copy.copy(self.config)
            config.head_dim = dim
            self.model.layers[i] = LlamaDecoderLayer(vllm_config, prefix=name, config=config, layer_idx=i)
