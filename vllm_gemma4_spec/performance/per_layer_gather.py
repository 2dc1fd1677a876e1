"""An E4B's per-layer inputs under tensor parallelism, gathered without NCCL: no call of it is left in a draft's graph.

The config says which engines do so, before anything is compiled, because vLLM's cache of compiled graphs goes by it. A
drafter's graphs lie in the folder of its target's key, so the target's config says it for both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_gemma4_spec import scope
from vllm_gemma4_spec.performance import compile_settings

MARK = "gemma4_spec_per_layer_gather"  # of compile_settings.mark


def vllm_config(original: Callable[..., None]) -> Callable[..., None]:
    """``VllmConfig.__post_init__``: the mark of an engine that gathers per-layer inputs so, and so the key of its
    graphs.

    Patch: ``per-layer-gather``. Evidence:
    ``tests/performance/test_per_layer_gather.py::test_stock_gathers_per_layer_inputs_by_an_all_gather``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        original(self)
        if scope.gemma4_engine(self) and _fits(self):
            compile_settings.mark(self, MARK)

    return __post_init__


def _fits(config: Any) -> bool:
    spec = config.speculative_config
    return (
        config.parallel_config.tensor_parallel_size > 1
        and not config.parallel_config.disable_custom_all_reduce
        and config.lora_config is None  # LoRA's layer in the place of this one gathers by itself
        and any(map(_has_per_layer_inputs, (config.model_config, getattr(spec, "draft_model_config", None))))
        and _on_cuda()
    )


def _has_per_layer_inputs(model_config: Any) -> bool:
    return scope.gemma4_model(model_config) and bool(
        getattr(model_config.hf_text_config, "hidden_size_per_layer_input", None)
    )


def _on_cuda() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cuda()


def model_init(original: Callable[..., None]) -> Callable[..., None]:
    """``Gemma4ForCausalLM.__init__``: its ``per_layer_model_projection`` leaves the gather to our operator.

    ``Gemma4SelfDecoderLayers``, which calls that layer, has the same one. Where the group's custom all-reduce is off
    the operator gathers as the layer would: the graph may not depend on what the config does not say.

    Patch: ``per-layer-gather``. Evidence:
    ``tests/performance/test_per_layer_gather.py::test_stock_gathers_per_layer_inputs_by_an_all_gather``. Related
    upstream change: none found.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        layer = self.model.per_layer_model_projection
        if layer is None or layer.tp_size == 1 or not compile_settings.marked(kwargs["vllm_config"], MARK):
            return
        from vllm_gemma4_spec.kernels import gather_columns

        gather_columns.register_operator()
        layer.gather_output = False
        layer.register_forward_hook(_gather)

    return __init__


def _gather(_layer: Any, _inputs: Any, output: Tensor) -> Tensor:
    from vllm.distributed import get_tp_group

    return torch.ops.vllm.gemma4_spec_gather_columns(output, get_tp_group().unique_name)
