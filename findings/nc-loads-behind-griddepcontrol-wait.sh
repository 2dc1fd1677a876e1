#!/usr/bin/env bash
# One would guess: a kernel for programmatic dependent launch loads its weights, which no kernel before it writes, in front
# of griddepcontrol.wait, and so has them on the way while the kernel before ends. Weights are read-only, so ld.global.nc
# suits them (or __ldg, or const __restrict__), and inline assembly that is volatile and clobbers memory stays in order.
# What happens: in PTX the loads stand in front of the wait, in machine code behind it. ptxas takes read-only loads for free to
# move and puts them where their values are used; volatile and the clobber only bind what comes before ptxas. Nothing is
# wrong but the time: the kernel waits first and then for memory. The same loads without .nc stay in front, and so do
# read-only ones in a branch of their own, so one added condition decides whether a kernel overlaps with the one before.
# No GPU is needed: the kernel is compiled, and the order in its PTX and in its machine code is looked at.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet nvidia-cuda-nvrtc-cu12==12.8.93 nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-nvdisasm==13.2.86
cat >kernel.cu <<'CU'
__device__ float4 load(const float4* at) {
#ifdef LOAD
    float4 v;
    asm volatile(LOAD ".v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at) : "memory");
    return v;
#else
    return __ldg(at);
#endif
}

extern "C" __global__ void scaled(const float4* weights, const float4* x, float4* y, int count) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    float4 w[4];
#if BRANCH
    if (at < count)
#endif
        for (int i = 0; i < 4; i++) w[i] = load(weights + at * 4 + i);
    asm volatile("griddepcontrol.wait;" ::: "memory");
#if BRANCH
    if (at >= count) return;
#endif
    float4 sum = x[at];
    for (int i = 0; i < 4; i++) sum.x += w[i].x, sum.y += w[i].y, sum.z += w[i].z, sum.w += w[i].w;
    y[at] = sum;
}
CU
cat >look.py <<'PY'
import ctypes, re, subprocess, sys
from importlib.metadata import version
from pathlib import Path

package, folder, so = sys.argv[1:]
where = next(Path("env").glob(f"lib/python*/site-packages/nvidia/{folder}")).resolve()
disassembler = next(Path("env").glob("lib/python*/site-packages/nvidia/cu13/bin/nvdisasm"))
for builtins in where.glob("lib/libnvrtc-builtins.so.*"):
    ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
nvrtc = ctypes.CDLL(str(where / "lib" / so))


def text(program, what):
    size = ctypes.c_size_t()
    assert not getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    assert not getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def in_front(load, branch):
    """How many of the four loads of weights, and the one of x, come before the wait: in PTX, in machine code."""
    program = ctypes.c_void_p()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), Path("kernel.cu").read_bytes(), b"kernel.cu", 0, None, None)
    options = ["--gpu-architecture=sm_90", f"-DBRANCH={branch}", *([f'-DLOAD="{load}"'] if load else [])]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    assert not failed, text(program, "ProgramLog")
    Path("code").write_bytes(text(program, "CUBIN"))
    machine = subprocess.run([disassembler, "-c", "code"], check=True, capture_output=True, text=True).stdout
    counts = []
    for code, one, wait in ((text(program, "PTX").decode(), r"ld\.global", "griddepcontrol.wait"), (machine, "LDG", "ACQBULK")):
        before, behind = code.split(wait)
        counts.append(len(re.findall(one, before)))
        assert counts[-1] + len(re.findall(one, behind)) == 5
    return counts


print(package, version(package), "nvidia-cuda-nvdisasm", version("nvidia-cuda-nvdisasm"))
for load, branch, machine in (
    ("ld.global.nc", 0, 0),
    ("ld.global.nc.L1::no_allocate", 0, 0),
    (None, 0, 0),
    ("ld.global", 0, 4),
    ("ld.global.L1::no_allocate", 0, 4),
    ("ld.global.nc", 1, 4),
):
    found = in_front(load, branch)
    print(f"{load or '__ldg'}{' in a branch' * branch}: of 4 loads in front of the wait, {found[0]} in PTX, {found[1]} in machine code")
    assert found[1] == machine and (found[0] == 4 or not load)
PY
env/bin/python look.py nvidia-cuda-nvrtc-cu12 cuda_nvrtc libnvrtc.so.12
env/bin/python look.py nvidia-cuda-nvrtc cu13 libnvrtc.so.13
