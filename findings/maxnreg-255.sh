#!/usr/bin/env bash
# One would guess: __maxnreg__ and --maxrregcount limit a kernel's registers, so 255, which is all that a thread can have, limits
# nothing, and the kernel is the one that is compiled without it.
# What happens: the kernel takes more than twice as many registers (78 for 32 here), and its loads stand in another order: all are
# asked for before the first is used, where without the limit each is waited for by turns. ptxas takes the number for what it is to
# work with. Without one it saves registers so that more warps fit on a multiprocessor, and does so with __launch_bounds__ of 256
# threads, whose limit is as wide. So a "limit" that cannot bind decides how many warps run, and how many loads of each are on
# their way; and one well below (64) doubles what is used, too. No GPU is needed: registers and machine code are looked at.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet nvidia-cuda-nvrtc-cu12==12.8.93 nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-nvdisasm==13.2.86
cat >kernel.cu <<'CU'
extern "C" __global__ void BOUNDS products(const float4* x, const float4* w, float4* y, int apart, int steps) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    float4 sum = make_float4(0, 0, 0, 0);
    for (int step = 0; step < steps; step++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float4 a = __ldg(x + (step * 8 + i) * apart + at), b = __ldg(w + (step * 8 + i) * apart + at);
            sum.x = fmaf(a.x, b.x, sum.x), sum.y = fmaf(a.y, b.y, sum.y);
            sum.z = fmaf(a.z, b.z, sum.z), sum.w = fmaf(a.w, b.w, sum.w);
        }
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


def compiled(bounds, *more):
    """Registers, and how many of the 16 loads of a step stand in front of the first product."""
    program = ctypes.c_void_p()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), Path("kernel.cu").read_bytes(), b"kernel.cu", 0, None, None)
    options = ["--gpu-architecture=sm_90", "--ptxas-options=-v", f"-DBOUNDS={bounds}", *more]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    log = text(program, "ProgramLog").decode()
    assert not failed, log
    Path("code").write_bytes(text(program, "CUBIN"))
    machine = subprocess.run([disassembler, "-c", "code"], check=True, capture_output=True, text=True).stdout
    assert machine.count("LDG") == 16
    return int(re.search(r"Used (\d+) registers", log)[1]), machine.split("FFMA")[0].count("LDG")


print(package, version(package), "nvidia-cuda-nvdisasm", version("nvidia-cuda-nvdisasm"))
found = {}
for name, bounds, *more in (
    ("no limit", ""),
    ("__launch_bounds__(256)", "__launch_bounds__(256)"),
    ("--maxrregcount=255", "", "--maxrregcount=255"),
    ("__maxnreg__(255)", "__maxnreg__(255)"),
    ("__maxnreg__(64)", "__maxnreg__(64)"),
):
    found[name] = registers, loads = compiled(bounds, *more)
    print(f"{name}: {registers} registers, {loads} of 16 loads in front of the first product")
usual = found["no limit"]
assert found["__launch_bounds__(256)"] == usual
assert found["--maxrregcount=255"] == found["__maxnreg__(255)"]
assert found["__maxnreg__(255)"][0] > 2 * usual[0] and found["__maxnreg__(64)"][0] > 1.5 * usual[0]
assert found["__maxnreg__(255)"][1] == 16 > usual[1]
PY
env/bin/python look.py nvidia-cuda-nvrtc-cu12 cuda_nvrtc libnvrtc.so.12
env/bin/python look.py nvidia-cuda-nvrtc cu13 libnvrtc.so.13
