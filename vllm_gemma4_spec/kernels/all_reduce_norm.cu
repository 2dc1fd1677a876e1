// The sum of a row over two GPUs and what a Gemma 4 layer does next with it, in one kernel (sm_90 and newer):
//
//   hidden = (norm(sum, weight) + residual) * scale;   normed = norm(hidden, next_weight)
//
// A block has one row, a thread 8 values of it. Each rank writes its values into the other's memory and waits until all
// of the other's have arrived in its own: a word is there once it differs from EMPTY, two bfloat16 zeros with a sign, which
// is sent as zeros without. So no flag is written and no barrier waited for.
//
// Three slots per row, used in turn. In call n of a row slot n % 3 is received, and slot (n + 2) % 3 emptied for call n + 2:
// the other rank fills it after it has received what this rank sends in call n + 1, that is after call n has ended here.
//
// Compiled by NVRTC with WIDTH (values of a row), ROWS (of a slot), EPS, EXCHANGE (0: the input is the sum already), SCALE and
// NEXT (0: no such step). Launched with grid (rows, 1, 1), block WIDTH / 8 rounded up to 32.

typedef unsigned int u32;
typedef unsigned short u16;

#define EMPTY 0x80008000u
#define VECTORS (WIDTH / 8)
#define WARPS ((VECTORS + 31) / 32)

#ifndef ALL_REDUCE_NORM_ON_HOST  // a test gives the functions below in plain C++ and runs two ranks on a CPU

__device__ __forceinline__ u32 two_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ uint4 load_word_by_word(const uint4* at) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ void store_word_by_word(uint4* at, const uint4& v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};"
                 :: "l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Not `.nc`, nor without a clobber: such loads are moved behind griddepcontrol.wait, which these are there to come before
// (findings/nc-loads-behind-griddepcontrol-wait.sh).
__device__ __forceinline__ uint4 load_early(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ u16 load_early(const u16* at) {
    u16 v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) value += __shfl_xor_sync(~0u, value, mask);
    return value;
}

__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#endif

__device__ __forceinline__ u32 sendable(u32 word) { return word == EMPTY ? 0u : word; }

__device__ __forceinline__ uint4 sendable(const uint4& v) {
    return make_uint4(sendable(v.x), sendable(v.y), sendable(v.z), sendable(v.w));
}

__device__ __forceinline__ bool arrived(const uint4& v) {
    return v.x != EMPTY && v.y != EMPTY && v.z != EMPTY && v.w != EMPTY;
}

__device__ __forceinline__ void unpack(float (&to)[8], const uint4& from) {
    const u32 words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    }
}

__device__ __forceinline__ uint4 pack(const float (&v)[8]) {
    return make_uint4(two_bf16(v[0], v[1]), two_bf16(v[2], v[3]), two_bf16(v[4], v[5]), two_bf16(v[6], v[7]));
}

// 1 / sqrt(mean of the squares + EPS) of the row; `sums` is used by one such call alone.
__device__ __forceinline__ float reciprocal_of_norm(const float (&v)[8], float* sums) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += v[i] * v[i];
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    const int lane = threadIdx.x % 32;
    return rsqrtf(sum_of_warp(lane < WARPS ? sums[lane] : 0.0f) * (1.0f / WIDTH) + EPS);
}

// `scale` is read with SCALE alone, `next_weight` and `normed` with NEXT; `mine` (where the other rank writes), `theirs` and
// `slots` (of each row, the next in turn) with EXCHANGE.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
all_reduce_norm(const uint4* x, const uint4* weight, const uint4* residual, const u16* scale, const uint4* next_weight,
                uint4* hidden, uint4* normed, uint4* mine, uint4* theirs, u32* slots) {
    __shared__ float sums[2][WARPS];
    const int row = blockIdx.x, at = threadIdx.x;
    const bool inside = at < VECTORS;
    const long own = (long)row * VECTORS + at;
    uint4 w = make_uint4(0, 0, 0, 0), next_w = w, value = w, kept = w;
    let_next_grid_start();
    if (inside) {  // what no kernel before this one writes
        w = load_early(weight + at);
        if (NEXT) next_w = load_early(next_weight + at);
    }
    const float factor = SCALE ? __uint_as_float((u32)load_early(scale) << 16) : 1.0f;
    wait_for_previous_grid();
    const u32 slot = EXCHANGE ? slots[row] : 0;
    if (inside) value = x[own];
    if (EXCHANGE && inside) {
        value = sendable(value);
        store_word_by_word(theirs + (long)slot * ROWS * VECTORS + own, value);
        store_word_by_word(mine + (long)((slot + 2) % 3) * ROWS * VECTORS + own, make_uint4(EMPTY, EMPTY, EMPTY, EMPTY));
    }
    if (inside) kept = residual[own];

    float v[8], other[8];
    unpack(v, value);
    if (EXCHANGE && inside) {
        const uint4* from = mine + (long)slot * ROWS * VECTORS + own;
        do value = load_word_by_word(from);
        while (!arrived(value));
        unpack(other, value);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] += other[i];
        unpack(v, pack(v));  // an all-reduce gives bfloat16
    }

    const float r = reciprocal_of_norm(v, sums[0]);
    unpack(other, w);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= r * other[i];
    unpack(other, kept);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = (v[i] + other[i]) * factor;
    if (inside) hidden[own] = pack(v);
    if (NEXT) {
        const float next_r = reciprocal_of_norm(v, sums[1]);
        unpack(other, next_w);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= next_r * other[i];
        if (inside) normed[own] = pack(v);
    }
    if (EXCHANGE && at == 0) slots[row] = (slot + 1) % 3;  // every thread has read it: reciprocal_of_norm has a barrier
}

// Before the first call: all slots empty, slot 0 the next in turn. `words` of slots, then ROWS counters.
extern "C" __global__ void all_reduce_norm_reset(u32* memory, int words) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < words + ROWS) memory[i] = i < words ? EMPTY : 0u;
}
