"""The little of a finished config that says whose engine it is, for tests that call a wrapper by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

_TEXT = SimpleNamespace(model_type="gemma4_text")
GEMMA4 = SimpleNamespace(hf_config=_TEXT, hf_text_config=_TEXT)  # a ModelConfig
LLAMA_JSON = {  # a config.json
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}
LLAMA = SimpleNamespace(hf_config=SimpleNamespace(model_type="llama"))


def vllm_config(target: Any = GEMMA4, drafter: Any = GEMMA4, **more: Any) -> Any:
    """Of an engine that drafts with ``drafter``."""
    spec = SimpleNamespace(method="draft_model", draft_model_config=drafter)
    return SimpleNamespace(**{"model_config": target, "speculative_config": spec} | more)
