#!/usr/bin/env bash
# One would guess: in a loop of Hopper's wgmma whose operand A is made in registers, step by step, a product left in flight
# over the loop's end either can run beside the next iteration or cannot; where a branch stands among the products (a wait
# for data, giving back what was read) makes no difference. And ptxas' C7513, "serialized due to non wgmma instructions
# defining input registers", says that such a register is written too early.
# What happens: with four products an iteration and one in flight over the end, all is well without a branch, and with one
# before the first product or behind the second, third or fourth. Behind the first (where one would give back what the last
# iteration read) ptxas serializes, with C7513, every wgmma of the function, also those of another loop that needs none of
# this: each is waited for before the next. It compiles, and NVRTC's log is the only word of it. The same branch is fine if
# all products are done at the loop's end; the same store under a predicate is fine, and so is a wait with A in shared memory.
# No GPU is needed: the kernel is compiled, and the waits in its machine code are counted.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet nvidia-cuda-nvrtc-cu12==12.8.93 nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-nvdisasm==13.2.86
cat >kernel.cu <<'CU'
using u32 = unsigned;
using u64 = unsigned long long;

template <int LEFT> __device__ void wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

// 64 x 16 or 16 x 64 in shared memory, without swizzle: cores of 8 rows of 16 bytes, next to each other along k.
__device__ u64 matrix(const void* at) {
    return (u64)__cvta_generic_to_shared(at) >> 4 & 0x3fff | 128ull >> 4 << 16 | 256ull >> 4 << 32;
}

__device__ void behind(int place, int k, const u32* ready, u32* left) {
    if (place != PLACE) return;
#if KIND == 0  // wait for data
    while (!*(volatile const u32*)(ready + k)) {}
#elif KIND == 1  // give back what the iteration before has read, with a branch
    if (k) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) *(volatile u32*)(left + k * 4 + threadIdx.x / 32 - 4) = 1;
    }
#else  // the same with a predicate
    __syncwarp();
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p st.volatile.global.u32 [%0], 1; }"
                 ::"l"(left + k * 4 + threadIdx.x / 32 - 4), "r"((u32)(k > 0) & (u32)(threadIdx.x % 32 == 0)) : "memory");
#endif
}

template <bool OVER>
__device__ void loop(float (&d)[32], const u32* codes, const uint4* a, const uint4* b, int count, const u32* ready, u32* left) {
    int k = 0;
#pragma unroll 1
    do {
        if (OVER || !TWO) behind(0, k, ready, left);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const u32 code = codes[(k * 4 + s) * 128 + threadIdx.x];
            u32 r[4];
            for (int i = 0; i < 4; i++) r[i] = code >> 4 * i & 0x000f000f | 0x43004300;  // 128 + code in bfloat16
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            PRODUCT
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            wait_group<1>();  // the product before is done: its registers are free again
            if (OVER || !TWO) behind(s + 1, k, ready, left);
        }
        if (!OVER) wait_group<0>();
    } while (++k < count);
    wait_group<0>();
}

extern "C" __global__ void __launch_bounds__(128)
products(const u32* codes, const uint4* x, float* y, int count, const u32* ready, u32* left) {
    __shared__ __align__(128) uint4 a[128], b[4 * 128];
    a[threadIdx.x] = x[threadIdx.x];
    for (int i = threadIdx.x; i < 4 * 128; i += 128) b[i] = x[i];
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();
    float d[32] = {};
#if TWO
    loop<false>(d, codes, a, b, count, ready, left);
#endif
    loop<OVER_END>(d, codes, a, b, count, ready, left);
    for (int i = 0; i < 32; i++) y[i * 128 + threadIdx.x] = d[i];
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
sums = ",".join(f"%{i}" for i in range(32))
outputs = ",".join(f'"+f"(d[{i}])' for i in range(32))
form = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"
source = Path("kernel.cu").read_text()
b_at = "matrix(b + s * 128)"
registers = f"""asm volatile("{form} {{{sums}}}, {{%32,%33,%34,%35}}, %36, 1, 1, 1, 0;" : {outputs}
                         : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"({b_at}));"""
shared = f"""asm volatile("{form} {{{sums}}}, %32, %33, 1, 1, 1, 0, 0;" : {outputs} : "l"(matrix(a)), "l"({b_at}));"""


def text(program, what):
    size = ctypes.c_size_t()
    assert not getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    assert not getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def serialized(product, over, place, kind=0, two=0):
    """What the log and the machine code say; they must agree."""
    program = ctypes.c_void_p()
    code = source.replace("PRODUCT", product).encode()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"kernel.cu", 0, None, None)
    options = ["--gpu-architecture=sm_90a", "-w", f"-DOVER_END={over}", f"-DPLACE={place}", f"-DKIND={kind}", f"-DTWO={two}"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    log = text(program, "ProgramLog").rstrip(b"\0").decode().strip()
    assert not failed, log
    Path("code").write_bytes(text(program, "CUBIN"))
    machine = subprocess.run([disassembler, "-c", "code"], check=True, capture_output=True, text=True).stdout
    products = len(re.findall("HGMMA", machine))
    waits = re.findall(r"DEPBAR\.LE gsb0, (0x\d)", machine)
    assert products == (8 if two else 4)
    if not log:
        assert waits.count("0x1") == products, waits  # as written
        return False
    logs.add(re.sub(r"\s+", " ", log))
    assert waits == ["0x0"] * products, waits  # each is waited for
    return True


logs = set()
print(package, version(package), "nvidia-cuda-nvdisasm", version("nvidia-cuda-nvdisasm"))
NONE, PLACES = 9, range(5)
for over in (0, 1):
    assert not serialized(registers, over, NONE)
print("no branch: not serialized, with or without a product in flight over the loop's end")
for kind, act in enumerate(("a wait for data", "giving back with a branch", "giving back with a predicate")):
    done, flying = ([place for place in PLACES if serialized(registers, over, place, kind)] for over in (0, 1))
    print(f"{act}: serialized behind product {flying} of 1 to 4; if all are done at the loop's end, behind {done}")
    assert not done and flying == ([] if kind == 2 else [1])
flying = [place for place in PLACES if serialized(shared, 1, place)]
print(f"a wait for data, A in shared memory: serialized behind product {flying}")
assert not flying
both = [place for place in PLACES if serialized(registers, 1, place, two=1)]
print(f"two loops, only the second with a branch and over its end: the 8 products of both serialized behind product {both}")
assert both == [1]
print("log:", *logs)
assert len(logs) == 1 and all(what in str(logs) for what in ("C7513", "due to non wgmma instructions defining input registers"))
PY
env/bin/python look.py nvidia-cuda-nvrtc-cu12 cuda_nvrtc libnvrtc.so.12
env/bin/python look.py nvidia-cuda-nvrtc cu13 libnvrtc.so.13
