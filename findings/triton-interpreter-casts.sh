#!/usr/bin/env bash
# One would guess: Triton's interpreter (TRITON_INTERPRET=1) gives what the compiled kernel gives, so that a kernel's
# numbers can be checked on a machine without a GPU.
# What happens: casts differ, without a warning. To bfloat16 the interpreter cuts bits off, where the compiled kernel
# rounds to nearest (cvt.rn). To float8 e4m3 the compiled kernel saturates at 448 (cvt.rn.satfinite); the interpreter
# makes 480 of 464, a value that the format does not have, and 320 of 10000. Compiling needs no GPU: the instructions
# are read from the PTX for sm_90.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 triton==3.7.1 numpy==2.2.6
cat >casts.py <<'PY'
import os, re, torch, triton, triton.language as tl

@triton.jit
def to_bfloat16(out, values):
    at = tl.arange(0, 4)
    tl.store(out + at, tl.load(values + at).to(tl.bfloat16).to(tl.float32))

@triton.jit
def to_float8(out, values):
    at = tl.arange(0, 4)
    tl.store(out + at, tl.load(values + at).to(tl.float8e4nv).to(tl.float32))

if os.environ.get("TRITON_INTERPRET") == "1":
    print("triton", triton.__version__, "- interpreted")
    for kernel, values, right, seen in (
        (to_bfloat16, [1.0, 1.00390625, 1.005859375, 1.01171875], "nearest", [1.0, 1.0, 1.0, 1.0078125]),
        (to_float8, [440.0, 464.0, 480.0, 10000.0], "saturated", [448.0, 480.0, 480.0, 320.0]),
    ):
        given, out = torch.tensor(values), torch.zeros(4)
        kernel[(1,)](out, given)
        nearest = given.bfloat16().float() if right == "nearest" else given.clamp(max=448.0).to(torch.float8_e4m3fn).float()
        print(f"{kernel.fn.__name__}: {values} -> {out.tolist()}; {right}: {nearest.tolist()}")
        assert out.tolist() == seen and not torch.equal(out, nearest)
else:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, instruction in ((to_bfloat16, "cvt.rn.bf16"), (to_float8, "cvt.rn.satfinite.e4m3x2")):
        source = ASTSource(fn=kernel, signature={"out": "*fp32", "values": "*fp32"}, constexprs={})
        found = sorted(set(re.findall(r"cvt[.\w]+", triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])))
        print(f"{kernel.fn.__name__}, compiled for sm_90: {found}")
        assert any(name.startswith(instruction) for name in found)
PY
export TRITON_CACHE_DIR="$work/cache" CUDA_VISIBLE_DEVICES=""
TRITON_INTERPRET=1 env/bin/python casts.py
TRITON_INTERPRET=0 env/bin/python casts.py
