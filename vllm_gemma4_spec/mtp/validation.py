"""An assistant that does not fit is refused when the configuration is made, in one line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.errors import CheckpointError, DrafterError, stop
from vllm_gemma4_spec.mtp import weights
from vllm_gemma4_spec.mtp.config import MODEL_TYPE
from vllm_gemma4_spec.spec_decode.config_validation import check_folder

_LONGEST_DRAFT = 32  # beyond it a step verifies more tokens than any graph or acceptance pays for


def create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineArgs.create_speculative_config``, where the drafter is an assistant; others pass through.

    Patch: ``mtp-checks``. Evidence: ``tests/mtp/test_mtp_validation.py::test_stock_takes_another_targets_assistant``.
    Related upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        asked = self.speculative_config
        try:
            local = _names_assistant(asked)
            if local:  # before vLLM's own checks, which end in tracebacks
                _check_options(asked, target_parallel_config)
            config = original(self, target_model_config, target_parallel_config)
            if config is not None and scope.is_assistant(config):
                if not local:
                    _check_options(asked, target_parallel_config)
                _check_pair(config.draft_model_config, target_model_config)
                if self.load_format != "dummy" and Path(asked["model"]).is_dir():
                    weights.check(Path(asked["model"]), config.draft_model_config.hf_config)
        except (DrafterError, CheckpointError) as error:
            stop(error)
        return config

    return wrapper


def _names_assistant(asked: Any) -> bool:
    """Whether the folder that a speculative config names holds an assistant; a hub id is known after loading it."""
    model = asked.get("model") if isinstance(asked, dict) else None
    if not isinstance(model, str) or asked.get("method") not in (None, "mtp"):
        return False
    if asked.get("method") == "mtp":
        check_folder(model)
    try:
        config = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def _check_options(asked: dict[str, Any], target_parallel_config: Any) -> None:
    k = asked.get("num_speculative_tokens", 1)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= _LONGEST_DRAFT:
        raise DrafterError(f"num_speculative_tokens is {k!r}; an assistant drafts 1 to {_LONGEST_DRAFT}, best about 4")
    stages = target_parallel_config.pipeline_parallel_size
    if stages > 1:
        raise DrafterError(
            f"pipeline_parallel_size is {stages}; an assistant reads the KV of the target's last layers and the "
            "embedding of its first stage: use tensor parallelism"
        )
    size, wanted = asked.get("draft_tensor_parallel_size"), target_parallel_config.tensor_parallel_size
    if size is not None and size != wanted:
        raise DrafterError(
            f"draft_tensor_parallel_size is {size} and the target's tensor-parallel size is {wanted}; an assistant "
            "reads each rank's own KV heads: leave draft_tensor_parallel_size out"
        )
    for name in ("speculative_token_tree", "parallel_drafting", "disable_padded_drafter_batch"):
        if asked.get(name):
            raise DrafterError(f"{name} is set; an assistant drafts one chain of tokens a request: leave it out")


def _check_pair(draft: Any, target: Any) -> None:
    """The assistant's sizes and files against the target's configuration."""
    config, other = draft.hf_config, target.hf_text_config
    text, folder = config.text_config, draft.model
    if not str(other.model_type).startswith("gemma4"):
        raise DrafterError(f"assistant {folder} is a Gemma 4 target's; {target.model} is {other.model_type}")
    kinds = set(text.layer_types)
    pairs = [
        ("backbone_hidden_size", config.backbone_hidden_size, "hidden_size", other.hidden_size),
        ("vocab_size", text.vocab_size, "vocab_size", other.vocab_size),
    ]
    if "sliding_attention" in kinds:
        pairs += [
            ("head_dim", text.head_dim, "head_dim", other.head_dim),
            ("num_key_value_heads", text.num_key_value_heads, "num_key_value_heads", other.num_key_value_heads),
            ("sliding_window", text.sliding_window, "sliding_window", other.sliding_window),
        ]
    if "full_attention" in kinds:
        pairs += [
            ("global_head_dim", text.global_head_dim, "global_head_dim", other.global_head_dim),
            ("full layers' KV heads", _full_heads(text), "full layers' KV heads", _full_heads(other)),
        ]
    for name, ours, theirs_name, theirs in pairs:
        if ours != theirs:
            raise DrafterError(
                f"assistant {folder}: its {name} is {ours}, {theirs_name} of target {target.model} is {theirs}; every "
                "Gemma 4 has an assistant of its own (google/gemma-4-...-it-assistant): use this target's"
            )
    own = other.layer_types[: other.num_hidden_layers - (getattr(other, "num_kv_shared_layers", 0) or 0)]
    for kind in sorted(kinds - set(own)):
        raise DrafterError(f"assistant {folder} has {kind} layers, target {target.model} none with KV of its own")
    if text.num_attention_heads % text.num_key_value_heads or text.num_attention_heads % _full_heads(text):
        raise DrafterError(
            f"assistant {folder}: {text.num_attention_heads} query heads are no multiple of its KV heads; its "
            "config.json is damaged, download the model again"
        )
    if config.use_ordered_embeddings and text.vocab_size % config.num_centroids:
        raise DrafterError(
            f"assistant {folder}: {text.vocab_size} tokens do not divide into {config.num_centroids} centroids; its "
            "config.json is damaged, download the model again"
        )
    if not config.tie_word_embeddings:
        raise DrafterError(f"assistant {folder}: tie_word_embeddings is false; a Gemma 4 assistant's head is tied")


def _full_heads(text: Any) -> int:
    """KV heads of full layers."""
    heads = getattr(text, "num_global_key_value_heads", None) if getattr(text, "attention_k_eq_v", False) else None
    return int(heads or text.num_key_value_heads)
