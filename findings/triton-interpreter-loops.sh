#!/usr/bin/env bash
# One would guess: Triton 3.6.0 (the release of PyTorch 2.10, which vLLM 0.19.1 pins; it sets no bound for NumPy) interprets
# a kernel with one NumPy as with another.
# What happens: from NumPy 2.4 on a `for` whose bound is an argument of the kernel raises. `while` and `if` on the
# same number go on working, and so do loads, sums and products, so that a suite of kernels fails in part and far from
# NumPy. The interpreter keeps a number as an array of one element, of which NumPy 2.4 no longer makes an int.
# Needs Python 3.11 or newer, as NumPy 2.4 does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for python in python3 python3.13 python3.12 python3.11 none; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
done
[ "$python" != none ] || { echo "no Python 3.11 or newer on PATH" >&2; exit 1; }
"$python" -m venv env
env/bin/pip install --quiet torch==2.10.0 triton==3.6.0 numpy==2.2.6
cat >loops.py <<'PY'
import sys, numpy, torch, triton, triton.language as tl

@triton.jit
def for_loop(out, n):
    total = 0
    for k in range(n):
        total += k
    tl.store(out, total)

@triton.jit
def while_loop(out, n):
    total, k = 0, 0
    while k < n:
        total += k
        k += 1
    tl.store(out, total)

@triton.jit
def summed(out, n):
    k = tl.arange(0, 8)
    if n > 0:
        tl.store(out, tl.sum(tl.where(k < n, k, 0)))

seen = {}
for kernel in (for_loop, while_loop, summed):
    out = torch.full((1,), -1, dtype=torch.int32)
    try:
        kernel[(1,)](out, 5)
        seen[kernel.fn.__name__] = out.item()
    except Exception as error:
        seen[kernel.fn.__name__] = f"{type(error).__name__}: {error!r}"
print("triton", triton.__version__, "numpy", numpy.__version__, seen)
failed = [name for name, what in seen.items() if what != 10]
assert failed == sys.argv[1:], failed
if failed:
    assert "only 0-dimensional arrays" in seen["for_loop"]
PY
export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=""
env/bin/python -W ignore loops.py
env/bin/pip install --quiet numpy==2.4.6
env/bin/python -W ignore loops.py for_loop
