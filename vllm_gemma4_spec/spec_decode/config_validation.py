"""What cannot draft is refused when the configuration is made, in one line."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_gemma4_spec import settings
from vllm_gemma4_spec.errors import DrafterError, stop
from vllm_gemma4_spec.json_file import read_object


def create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineArgs.create_speculative_config``, for ``method: draft_model``; other methods pass through."""

    @functools.wraps(original)
    def wrapper(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        asked = self.speculative_config
        if not isinstance(asked, dict) or asked.get("method") != "draft_model" or not asked.get("model"):
            return original(self, target_model_config, target_parallel_config)
        drafter, target = str(asked["model"]), str(target_model_config.model)
        try:
            check_folder(drafter)
            _check_parallel(asked, target_parallel_config)
            _check_connector(self.kv_transfer_config)
            try:
                config = original(self, target_model_config, target_parallel_config)
            except ValueError as error:
                if "same vocabulary size" in str(error):
                    raise DrafterError(
                        f"drafter {drafter} has another vocabulary size than target {target} "
                        f"({target_model_config.get_vocab_size()}); use a drafter with the target's tokenizer"
                    ) from None
                raise
        except DrafterError as error:
            stop(error)
        return config

    return wrapper


def check_folder(drafter: str) -> None:
    """A path must be a folder with a readable config.json; anything else is a hub id, which vLLM resolves."""
    folder = Path(drafter)
    if not folder.exists():
        if os.path.isabs(drafter) or drafter.startswith("."):
            raise DrafterError(f"drafter {drafter}: no such folder; give a model folder or a hub id")
        return
    error = lambda text: DrafterError(f"drafter {text}")  # noqa: E731
    read_object(folder / "config.json", error, "give a folder that holds a model")


def _check_parallel(asked: dict[str, Any], target_parallel_config: Any) -> None:
    stages = target_parallel_config.pipeline_parallel_size
    if stages > 1:
        raise DrafterError(
            f"pipeline_parallel_size is {stages}; vLLM 0.19.1 builds a draft model on the last stage only, without its "
            "first layers: use tensor parallelism"
        )
    ranks, adaptive = target_parallel_config.data_parallel_size, settings.ADAPTIVE_K
    if ranks > 1 and adaptive.number() > 0:
        raise DrafterError(
            f"{adaptive.name} is set and data_parallel_size is {ranks}; ranks go through every draft pass together, so "
            f"none can leave one out: unset {adaptive.name}"
        )
    size, wanted = asked.get("draft_tensor_parallel_size"), target_parallel_config.tensor_parallel_size
    if size is not None and size != wanted:
        raise DrafterError(
            f"draft_tensor_parallel_size is {size} and the target's tensor-parallel size is {wanted}; "
            "vLLM 0.19.1 drafts only with equal sizes: leave draft_tensor_parallel_size out"
        )


def _check_connector(config: Any) -> None:
    if config is not None:
        raise DrafterError(
            f"KV connector {getattr(config, 'kv_connector', config)} beside a draft model: no connector of vLLM 0.19.1 "
            "has been run with a drafter's KV cache; leave one of them out (or set "
            "VLLM_GEMMA4_SPEC_PATCH_DRAFTER_CHECKS=0 to try it)"
        )
