#!/usr/bin/env bash
# One would guess: Inductor's setting triton.enable_pdl (programmatic dependent launch, for Hopper and newer) can be switched
# on in PyTorch 2.10.0, the release that vLLM 0.19.1 pins and that documents it in torch/_inductor/config.py.
# What happens: with it, code generation ends in an AssertionError ("TritonCSEVariable must have shape") for a kernel as
# plain as gelu(x) * y, so nothing compiles; without it the same kernel is written. The cause is the line that lets the
# next kernel start: a deferred line without a value's shape. No GPU is needed: Inductor is told that it has a Hopper, and
# only writes Triton code.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.10.0 triton==3.6.0 numpy==2.2.6
cat >pdl.py <<'PY'
import torch
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _triton

torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda *_: (9, 0)
_triton.triton_hash_with_backend = lambda: ""


def function(x, y):
    return torch.nn.functional.gelu(x) * y


def written(pdl):
    inputs = torch.randn(4, 512), torch.randn(512)
    with config.patch({"cpu_backend": "triton", "triton.enable_pdl": pdl}):
        graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
        lowered = GraphLowering(graph)
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
            lowered.run(*(n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"))
            return lowered.codegen()[0].value


print("torch", torch.__version__)
code = written(False)
print("enable_pdl=False:", code.count("tl.load"), "loads,", code.count("tl.store"), "store")
assert "tl.load" in code and "gdc_" not in code
try:
    written(True)
except AssertionError as error:
    print("enable_pdl=True: AssertionError:", error)
    assert "must have shape" in str(error)
else:
    raise SystemExit("enable_pdl=True: the kernel was written")
PY
CUDA_VISIBLE_DEVICES="" env/bin/python pdl.py
