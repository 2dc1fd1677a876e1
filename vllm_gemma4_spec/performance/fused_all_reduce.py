"""Which engines get :mod:`vllm_gemma4_spec.performance.all_reduce_pass`: a Gemma 4 in bfloat16 on two GPUs.

The config says so before anything is compiled, because vLLM's cache of compiled graphs goes by the config.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.performance import compile_settings

MARK = "gemma4_spec_all_reduce_norm"  # of compile_settings.mark
_RANKS = 2


def vllm_config(original: Callable[..., None]) -> Callable[..., None]:
    """``VllmConfig.__post_init__``: the mark of an engine whose all-reduces are fused, and so the key of its graphs.

    Patch: ``fused-all-reduce``. Evidence:
    ``tests/performance/test_fused_all_reduce.py::test_stock_leaves_two_norms_behind_an_all_reduce``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        original(self)
        if scope.gemma4_model(self.model_config) and _fits(self):
            compile_settings.mark(self, MARK)

    return __post_init__


def _fits(config: Any) -> bool:
    return (
        config.parallel_config.tensor_parallel_size == _RANKS
        and not config.parallel_config.disable_custom_all_reduce  # it needs the same access to the other's memory
        and not config.compilation_config.pass_config.enable_sp  # looks for all-reduces, too
        and compile_settings.card_takes_pdl()
    )


def backend(original: Callable[..., None]) -> Callable[..., None]:
    """``VllmBackend.__init__``: the operator is there before a compiled graph that calls it is loaded from the cache.

    Patch: ``fused-all-reduce``. Evidence:
    ``tests/performance/test_fused_all_reduce.py::test_stock_leaves_two_norms_behind_an_all_reduce``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if compile_settings.marked(self.vllm_config, MARK):
            from vllm_gemma4_spec.kernels import all_reduce_norm

            all_reduce_norm.register()

    return wrapper


def configure(original: Callable[..., None]) -> Callable[..., None]:
    """``PostGradPassManager.configure``: this pass comes before vLLM's fusions.

    Patch: ``fused-all-reduce``. Evidence:
    ``tests/performance/test_fused_all_reduce.py::test_stock_leaves_two_norms_behind_an_all_reduce``. Related upstream
    change: none found.
    """

    @functools.wraps(original)
    def wrapper(self: Any, config: Any) -> None:
        original(self, config)
        if not compile_settings.marked(config, MARK) or not scope.gemma4_model(config.model_config):
            return
        from vllm.config import set_current_vllm_config

        from vllm_gemma4_spec.performance.all_reduce_pass import AllReduceNormPass, suits

        with set_current_vllm_config(config, check_compile=False):
            if suits(config.model_config):
                self.passes.insert(int(self.pass_config.eliminate_noops), AllReduceNormPass(config))

    return wrapper
