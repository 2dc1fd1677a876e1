"""What 0.19.1's CPU platform makes of options that are a GPU's: as docs/reference/compatibility.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import engine as _engine  # sets the environment

assert _engine


def config(tiny: dict[str, Path], **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    speculative = {"method": "draft_model", "model": str(tiny["drafter"]), "num_speculative_tokens": 3}
    settings = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "skip_tokenizer_init": True}
    return EngineArgs(
        str(tiny["target"]), speculative_config=speculative, **(settings | options)
    ).create_engine_config()


def test_ray_becomes_multiprocessing(tiny: dict[str, Path]) -> None:
    """So vLLM's Ray executor cannot be run without a GPU. 0.19.1 asks for the module first."""
    pytest.importorskip("ray", reason="ray is not installed")
    made = config(tiny, tensor_parallel_size=2, distributed_executor_backend="ray")
    assert made.parallel_config.distributed_executor_backend == "mp"


def test_async_scheduling_is_off(tiny: dict[str, Path]) -> None:
    assert config(tiny, async_scheduling=True).scheduler_config.async_scheduling is False


def test_an_fp8_cache_is_none(tiny: dict[str, Path]) -> None:
    """Refused with chunked prefill or prefix caching, and without them replaced by one in the model's dtype."""
    with pytest.raises(RuntimeError, match="not compatible with FP8 KV cache"):
        config(tiny, kv_cache_dtype="fp8", enable_prefix_caching=True)
    options = {"enable_prefix_caching": False, "enable_chunked_prefill": False, "max_num_batched_tokens": 512}
    made = config(tiny, kv_cache_dtype="fp8", **options)
    assert made.cache_config.cache_dtype == "auto"


def test_sleep_mode_is_refused(tiny: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"[Ss]leep mode is not supported"):
        config(tiny, enable_sleep_mode=True)
