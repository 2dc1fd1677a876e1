// y[m, n] = sum_k x[m, k] * W[n, k] for a few rows m and NVFP4 weights W, on tensor cores (sm_80 and newer).
//
// Memory-bound: what counts is bytes in flight and few instructions per weight. Weights are stored in the order
// in which a warp feeds them to mma.m16n8k16 as its A operand (see packing.py), so that a lane's 16-byte load is
// four fragments, decoded by shifts and masks. W is exact in bfloat16 (two significand bits times four).
//
// Compiled by NVRTC with MT (tiles of 8 tokens), GELU (0 or 1) and SCALED (1: x is multiplied by pre_quant_scale
// first, each product rounded to bfloat16). Launched with
//
//   grid (N / 16 / (warps / split), parts), block 32 * warps, shared memory warps * MT * 512 bytes:
//
// `split` warps of a block and `parts` blocks share a tile of 16 outputs.

typedef unsigned int u32;
typedef unsigned short u16;

// Two E2M1 codes of a word as bfloat16 bit patterns; their value is the code's times 2^-126 (subnormals mean it).
__device__ __forceinline__ void decode(u32 word, u32 (&a)[4]) {
    const u32 sign_and_magnitude = 0x81C081C0u;
    a[0] = word & sign_and_magnitude;
    a[1] = (word << 3) & sign_and_magnitude;
    a[2] = (word << 6) & sign_and_magnitude;
    a[3] = ((word << 1) & 0x80008000u) | ((word >> 5) & 0x01000100u) | ((word >> 4) & 0x00C000C0u);
}

// Block scale times 2^118, twice, as bfloat16: byte `which` of `bytes` is (exponent + 10) << 3 | mantissa.
__device__ __forceinline__ u32 scale_pair(u32 bytes, u32 selector) {
    return __byte_perm(bytes, 0u, selector) * 16u + 0x75807580u;
}

#ifndef NVFP4_ROWS_ON_HOST  // a test gives the functions below in plain C++ and runs the kernel on a CPU

extern __shared__ float shared[];

__device__ __forceinline__ u32 times(u32 a, u32 b) {  // fma: bfloat16x2 has no mul before sm_90
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u16 to_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ uint4 load_once(const uint4* at) {  // weights pass by once: keep them out of the L1
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

__device__ __forceinline__ uint2 load_once(const uint2* at) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
    return v;
}

// Programmatic dependent launch: where the launch allows it, this grid starts while the one before it still runs.
__device__ __forceinline__ void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif

__device__ __forceinline__ float rounded(float value) { return __uint_as_float((u32)to_bf16(value) << 16); }

__device__ __forceinline__ float gelu_tanh(float v) {
    return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
}

struct Block {  // 16 outputs x 256 inputs: one lane's share
    uint4 codes[4];
    uint2 scales;
};

__device__ __forceinline__ void fetch(Block& b, const uint4* codes, const uint2* scales, int index, int lane) {
#pragma unroll
    for (int q = 0; q < 4; q++) b.codes[q] = load_once(codes + (index * 4 + q) * 32 + lane);
    b.scales = load_once(scales + index * 32 + lane);
}

__device__ __forceinline__ void scale_by(uint4& v, const uint4& by) {
    v.x = times(v.x, by.x), v.y = times(v.y, by.y), v.z = times(v.z, by.z), v.w = times(v.w, by.w);
}

// x, pre: this lane's token and inputs of the block; stride in elements between tiles of 8 tokens.
__device__ __forceinline__ void multiply(const Block& b, const u16* x, const u16* pre, int token, int tokens,
                                         long stride, float (&acc)[MT][4]) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const u32 bytes = q < 2 ? b.scales.x : b.scales.y;
        const u32 top = scale_pair(bytes, q % 2 ? 0x4242u : 0x4040u);
        const u32 bottom = scale_pair(bytes, q % 2 ? 0x4343u : 0x4141u);
        uint4 in[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const uint4* at = reinterpret_cast<const uint4*>(x + m * stride + q * 64);
            const bool live = token + m * 8 < tokens;
            in[m][0] = live ? __ldg(at) : make_uint4(0, 0, 0, 0);
            in[m][1] = live ? __ldg(at + 1) : make_uint4(0, 0, 0, 0);
        }
        if (SCALED) {
            const uint4* at = reinterpret_cast<const uint4*>(pre + q * 64);
            const uint4 by[2] = {__ldg(at), __ldg(at + 1)};
#pragma unroll
            for (int m = 0; m < MT; m++) scale_by(in[m][0], by[0]), scale_by(in[m][1], by[1]);
        }
        const u32 words[4] = {b.codes[q].x, b.codes[q].y, b.codes[q].z, b.codes[q].w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 a[4];
            decode(words[j], a);
            a[0] = times(a[0], top);
            a[1] = times(a[1], bottom);
            a[2] = times(a[2], top);
            a[3] = times(a[3], bottom);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint4 v = in[m][j / 2];
                mma(acc[m], a, j % 2 ? v.z : v.x, j % 2 ? v.w : v.y);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(MT > 4 ? 256 : 512) nvfp4_rows(
    const uint4* codes,         // [N / 16, K / 256, 4, 32]
    const uint2* scales,        // [N / 16, K / 256, 32]
    const u16* x,               // [tokens, K] bfloat16
    const u16* pre,             // [K] bfloat16, where SCALED
    u16* y,                     // [tokens, N] bfloat16; with GELU [tokens, N / 2]: gelu(first half) * second half
    const float* global_scale,  // [1]
    float* partial,             // [parts, N / 16, 32, MT * 4], where parts > 1
    u32* arrivals,              // [gridDim.x], zero before and after, where parts > 1
    int tokens, int N, int K, int split) {
    float(*sums)[MT * 4][32] = reinterpret_cast<float(*)[MT * 4][32]>(shared);  // [warps]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int blocks = K / 256, parts = gridDim.y, share = warp % split;
    const int slot = blockIdx.x * (blockDim.x / 32 / split) + warp / split;
    // With GELU neighbouring slots are a tile of the gate and the tile of the up projection that goes with it.
    const int tile = GELU ? slot / 2 + (slot % 2) * (N / 32) : slot;

    float acc[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[m][i] = 0.0f;

    const uint4* my_codes = codes + (long)tile * blocks * 128;
    const uint2* my_scales = scales + (long)tile * blocks * 32;
    const u16 *my_x = x + (long)g * K + t * 16, *my_pre = pre + t * 16;
    const int step = split * parts;
    int index = blockIdx.y * split + share;
    Block now, next;
    // Weights do not depend on the grid before this one: fetch them while it finishes, and touch x only then.
    let_next_grid_start();
    if (index < blocks) fetch(now, my_codes, my_scales, index, lane);
    wait_for_previous_grid();
    if (index < blocks) {
        for (; index + step < blocks; index += step) {
            fetch(next, my_codes, my_scales, index + step, lane);
            multiply(now, my_x + index * 256, my_pre + index * 256, g, tokens, (long)8 * K, acc);
            now = next;
        }
        multiply(now, my_x + index * 256, my_pre + index * 256, g, tokens, (long)8 * K, acc);
    }

    if (split > 1 || GELU || parts > 1) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[warp][m * 4 + i][lane] = acc[m][i];
        __syncthreads();
        if (share == 0) {
            for (int w = 1; w < split; w++)
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[m][i] += sums[warp + w][m * 4 + i][lane];
        }
    }
    if (parts > 1) {  // the last block to arrive adds up the parts, always in the same order
        __shared__ u32 last;
        const long size = (long)(N / 16) * 32 * MT * 4;
        float* mine = partial + ((long)tile * 32 + lane) * MT * 4;
        if (share == 0) {
#pragma unroll
            for (int m = 0; m < MT; m++)
                *reinterpret_cast<float4*>(mine + blockIdx.y * size + m * 4) =
                    make_float4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
            __threadfence();
        }
        __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(arrivals + blockIdx.x, 1u) == parts - 1;
        __syncthreads();
        if (!last) return;
        if (threadIdx.x == 0) arrivals[blockIdx.x] = 0;
        if (share == 0) {
            __threadfence();
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[m][i] = 0.0f;
            for (int p = 0; p < parts; p++)
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const float4 v = __ldcg(reinterpret_cast<const float4*>(mine + p * size + m * 4));
                    acc[m][0] += v.x, acc[m][1] += v.y, acc[m][2] += v.z, acc[m][3] += v.w;
                }
        }
    }
    const float scale = *global_scale * 256.0f;
    if (GELU) {  // exchange the finished sums of the two tiles
        __syncthreads();
        if (share == 0) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[warp][m * 4 + i][lane] = rounded(acc[m][i] * scale);
        }
        __syncthreads();
        if (share || slot % 2) return;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int token = m * 8 + t * 2 + i % 2, row = tile * 16 + g + i / 2 * 8;
                if (token < tokens)
                    y[(long)token * (N / 2) + row] =
                        to_bf16(gelu_tanh(sums[warp][m * 4 + i][lane]) * sums[warp + split][m * 4 + i][lane]);
            }
        return;
    }
    if (share) return;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = m * 8 + t * 2 + i % 2, row = tile * 16 + g + i / 2 * 8;
            if (token < tokens) y[(long)token * N + row] = to_bf16(acc[m][i] * scale);
        }
}
