"""A draft model compiled by vLLM's own backend, on the CPU: ``python -m tests.performance.second_start``.

Prints, as JSON, how many graphs were compiled and loaded, and with which settings. The model has three layers of one
shape between splitting operators, which vLLM compiles once. A second start loads what the first one saved
(``VLLM_CACHE_ROOT``) and looks the others up by a key that the settings are part of. With ``forget`` this start does
not set them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from vllm.compilation.backends import set_model_tag
from vllm.compilation.counter import compilation_counter
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

import vllm_gemma4_spec
from vllm_gemma4_spec import scope
from vllm_gemma4_spec.performance import compile_settings


def cut(x: Tensor) -> Tensor:
    return x.clone()


direct_register_custom_op("gemma4_spec_test_cut", cut, fake_impl=torch.empty_like)


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Layers(torch.nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.full((64,), 1.0 + i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.nn.functional.silu(x * weight) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            x = torch.ops.vllm.gemma4_spec_test_cut(x)
        return x


def main() -> None:
    # A CPU has none; the setting changes no code here, but it is part of the key.
    compile_settings._takes_pdl = lambda: "forget" not in sys.argv
    scope.gemma4_model = lambda _: True  # there is no model's config here
    FixFunctionalizationPass.__call__ = lambda *_: None  # names operators that vLLM's CPU build has not
    vllm_gemma4_spec.apply()
    config = VllmConfig(
        compilation_config=CompilationConfig(
            mode=CompilationMode.VLLM_COMPILE,
            splitting_ops=["vllm::gemma4_spec_test_cut"],
            cudagraph_mode=CUDAGraphMode.NONE,
        )
    )
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE  # the CPU platform takes another
    config.compilation_config.backend, config.compilation_config.compile_sizes = "inductor", []
    with set_current_vllm_config(config), torch.no_grad():
        with set_model_tag("draft_model"):
            model = Layers(vllm_config=config)
        with set_forward_context({}, config):
            first = model(torch.ones(5, 64))
            second = model(torch.ones(9, 64))
    assert torch.equal(first[0], second[0])
    backend: Any = model.aot_compiled_fn._artifacts.compiled_fn.vllm_backend
    print(
        json.dumps(
            {
                "loaded": bool(model.was_aot_compile_fn_loaded_from_disk),
                "compiled": compilation_counter.num_inductor_compiles,
                "artifacts_saved": compilation_counter.num_compiled_artifacts_saved,
                "artifacts_loaded": compilation_counter.num_compiled_artifacts_loaded,
                "pdl": backend.inductor_config.get("triton.enable_pdl", False),
            }
        )
    )


if __name__ == "__main__":
    main()
