"""Configurations under which an engine would answer wrongly or end at its first request are refused in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.errors import EngineConfigError, stop


def create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """``EngineArgs.create_engine_config``: looks at the finished config, with all that vLLM fills in.

    Patch: ``engine-checks``. Evidence: ``tests/engine/test_checks.py::test_stock_takes_every_setting``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        if scope.gemma4_engine(config):
            try:
                check(config)
            except EngineConfigError as error:
                stop(error)
        return config

    return wrapper


def check(config: Any) -> None:
    """
    Raises:
        EngineConfigError: names the setting and the way out.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if envs.VLLM_USE_V2_MODEL_RUNNER:
        raise EngineConfigError(
            "VLLM_USE_V2_MODEL_RUNNER=1: the V2 model runner of vLLM 0.19.1 goes past every patch of this package, and "
            "Gemma 4's images and drafts would be wrong; unset it, or set VLLM_GEMMA4_SPEC=0 for vLLM as it is"
        )
    if current_platform.is_cpu():
        _check_head_sizes(config)


def _check_head_sizes(config: Any) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    supported = CPUAttentionBackend.get_supported_head_sizes()
    models: list[Any] = [config.model_config, getattr(config.speculative_config, "draft_model_config", None)]
    for model in models:
        if not scope.gemma4_model(model):
            continue
        text = model.hf_text_config
        for name in ("head_dim", "global_head_dim"):
            size = getattr(text, name, None)
            if size is not None and size not in supported:
                raise EngineConfigError(
                    f"{model.model}: {name} is {size}, and the CPU attention of vLLM 0.19.1 takes "
                    f"{', '.join(map(str, supported))}: such a model needs a GPU"
                )
