"""What says in a finished config whose engine it is, for tests that call a wrapper by itself; and a whole config."""

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


def on_two_ranks(folder: Any, drafter: Any = None, **own: Any) -> Any:
    """vLLM's own config of an engine on two tensor-parallel ranks, finished; models by their folders."""
    from vllm.engine.arg_utils import EngineArgs

    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "compilation_config": {"custom_ops": ["none"]},
    }
    if drafter is not None:
        options["speculative_config"] = {"model": str(drafter), "num_speculative_tokens": 3, "method": "draft_model"}
    return EngineArgs(str(folder), **options | own).create_engine_config()
