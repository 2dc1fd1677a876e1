"""What cannot draft is refused when the configuration is made, in one line."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_gemma4_spec import scope, settings
from vllm_gemma4_spec.errors import DrafterError, stop
from vllm_gemma4_spec.json_file import read_object


def create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineArgs.create_speculative_config``: what the original would end on, for a draft model beside a Gemma 4.

    The rest is told from the finished config, by :func:`create_engine_config`.

    Patch: ``drafter-checks``. Evidence:
    ``tests/patching/test_stock.py::test_a_drafter_that_does_not_fit_is_not_named_in_one_line``. Related upstream
    change: none found for the messages; #42516 repairs pipeline parallelism, without speculation.
    """

    @functools.wraps(original)
    def wrapper(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        asked = self.speculative_config
        if not (scope.gemma4_model(target_model_config) and _names_a_drafter(asked)):
            return original(self, target_model_config, target_parallel_config)
        drafter, target = str(asked["model"]), str(target_model_config.model)
        try:
            check_folder(drafter)
            _check_tensor_parallel(asked.get("draft_tensor_parallel_size"), target_parallel_config)
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


def create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineArgs.create_engine_config``: the finished config, in which vLLM has filled in method and connector.

    Patch: ``drafter-checks``. Evidence:
    ``tests/patching/test_stock.py::test_a_drafter_that_does_not_fit_is_not_named_in_one_line``. Related upstream
    change: none found for the messages; #42516 repairs pipeline parallelism, without speculation.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        if scope.gemma4_speculation(config) and config.speculative_config.method == "draft_model":
            try:
                check(config)
            except DrafterError as error:
                stop(error)
        return config

    return wrapper


def check(config: Any) -> None:
    """
    Args:
        config: a finished ``VllmConfig`` with a draft model.

    Raises:
        DrafterError: it cannot draft; names the setting and the way out.
    """
    parallel, adaptive = config.parallel_config, settings.ADAPTIVE_K
    if parallel.pipeline_parallel_size > 1:
        raise DrafterError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}; vLLM 0.19.1 builds a draft model on the "
            "last stage only, without its first layers: use tensor parallelism"
        )
    if parallel.data_parallel_size > 1 and adaptive.number() > 0:
        raise DrafterError(
            f"{adaptive.name} is set and data_parallel_size is {parallel.data_parallel_size}; ranks go through every "
            f"draft pass together, so none can leave one out: unset {adaptive.name}"
        )
    _check_connector(config)


def _names_a_drafter(asked: Any) -> bool:
    """Whether a speculative config, as given, names a model that vLLM may take for a draft model."""
    if not isinstance(asked, dict) or not asked.get("model") or asked["model"] in ("ngram", "[ngram]"):
        return False
    return asked.get("method") in (None, "draft_model")


def check_folder(drafter: str) -> None:
    """A folder must have a readable config.json; a file (GGUF), a folder in Mistral's format (params.json) and a hub id
    are vLLM's to read."""
    folder = Path(drafter)
    if not folder.exists():
        if os.path.isabs(drafter) or drafter.startswith("."):
            raise DrafterError(f"drafter {drafter}: no such folder; give a model folder or a hub id")
        return
    if folder.is_file() or (folder / "params.json").is_file():
        return
    error = lambda text: DrafterError(f"drafter {text}")  # noqa: E731
    read_object(folder / "config.json", error, "give a folder that holds a model")


def _check_tensor_parallel(size: int | None, parallel: Any) -> None:
    if size not in (None, 1, parallel.tensor_parallel_size):  # 1: the whole-copies patch
        raise DrafterError(
            f"draft_tensor_parallel_size is {size} and the target's tensor-parallel size is "
            f"{parallel.tensor_parallel_size}; a drafter is cut as its target is, or whole on each rank: leave "
            "draft_tensor_parallel_size out, or set it to 1"
        )


def _check_connector(config: Any) -> None:
    made = config.kv_transfer_config
    if made is not None:
        asked = f" (of kv_offloading_size {size})" if (size := config.cache_config.kv_offloading_size) else ""
        raise DrafterError(
            f"KV connector {made.kv_connector}{asked} beside a draft model: no connector of vLLM 0.19.1 has been run "
            "with a drafter's KV cache; leave one of them out (or set "
            "VLLM_GEMMA4_SPEC_PATCH_DRAFTER_CHECKS=0 to try it)"
        )
