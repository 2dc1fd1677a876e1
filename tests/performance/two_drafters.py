"""A target and a drafter compiled by vLLM's own backend on a CPU: ``python -m tests.performance.two_drafters FACTOR``.

Prints, as JSON, what the drafter, which multiplies by FACTOR, makes of 2. Its configuration says which factor it is, as
that of a real one names the model and what is compiled into its graph. ``VLLM_CACHE_ROOT`` is where graphs are kept.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

import vllm_gemma4_spec
from vllm_gemma4_spec import scope


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Model(torch.nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.weight, self.factor = torch.nn.Parameter(torch.ones(8)), vllm_config.additional_config["factor"]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.factor


def configured(factor: int, compilation: CompilationConfig) -> VllmConfig:
    made = VllmConfig(compilation_config=compilation, additional_config={"factor": factor})
    assert made.compilation_config is compilation
    compilation.mode = CompilationMode.VLLM_COMPILE  # the CPU platform takes another
    compilation.backend, compilation.compile_sizes = "inductor", []
    return made


def main(factor: int) -> None:
    scope.gemma4_model = lambda _: True  # there is no model's config here
    FixFunctionalizationPass.__call__ = lambda *_: None  # names operators that vLLM's CPU build has not
    vllm_gemma4_spec.apply()
    compilation = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE, splitting_ops=[], cudagraph_mode=CUDAGraphMode.NONE
    )
    found = {}
    for tag, number in (("target", 11), (scope.DRAFT_GRAPH, factor)):
        config = configured(number, compilation)
        with set_current_vllm_config(config), torch.inference_mode(), set_forward_context({}, config):
            with set_model_tag(tag):
                model = Model(vllm_config=config)
            found[tag] = float(model(torch.full((4, 8), 2.0))[0, 0])
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
