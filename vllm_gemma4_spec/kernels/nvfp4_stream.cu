// y[m, n] = sum_k x[m, k] * W[n, k] for up to 64 rows m and NVFP4 weights W in Marlin's order (sm_90 and newer).
//
// A decode step is bound by reading its weights, so the grid is one block per multiprocessor, each with an equal
// share of the weights, and four warps of a block do nothing but copy: they fill a ring of stages in shared memory
// while 16 warps multiply. Nothing drains where one tile of outputs ends and the next begins.
//
// Marlin packs weights as the B operand of mma.m16n8k16; the same four registers are its A operand for 16 outputs
// and 16 inputs, so weights go in as A and the rows of x as B. W's codes times their block scale are exact in
// bfloat16 (two significand bits times four).
//
// Which inputs are added up in which order depends on the shape and on the grid, never on the number of rows, so a
// row's result has the same bits whatever rows stand beside it.
//
// Compiled by NVRTC with MT (tiles of 8 rows: 1, 2, 4 or 8), STAGES and SCALED (1: x is multiplied by
// pre_quant_scale first, each product rounded to bfloat16). Launched with as many blocks as there are
// multiprocessors, 640 threads each, shared memory SHARED_BYTES.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define COLUMNS 256  // outputs of a tile
#define DEPTH 128    // inputs of a stage
#define STEPS (DEPTH / 16)
#define WARPS 16     // that multiply: 8 times 32 outputs, twice half of a stage's inputs
#define COPIERS 128  // threads that copy
#define ROWS (8 * MT)
#define X_STRIDE (DEPTH * 2 + 16)  // bytes; 16 more keep ldmatrix free of bank conflicts
#define CODES_AT 0
#define SCALES_AT (STEPS * COLUMNS * 8)
#define PRE_AT (SCALES_AT + STEPS * COLUMNS)
#define X_AT (PRE_AT + SCALED * DEPTH * 2)
#define STAGE_BYTES (X_AT + ROWS * X_STRIDE)
#define SUMS_AT (STAGES * STAGE_BYTES)
#define SUMS 2048  // floats that the warps of one half hand to the other's, per tile of 8 rows
#define BARRIERS_AT (SUMS_AT + 2 * SUMS * 4)

#ifndef NVFP4_STREAM_ON_HOST  // a test gives the functions below in plain C++ and runs the kernel on a CPU

extern __shared__ __align__(128) unsigned char shared[];

__device__ __forceinline__ u32 address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// Weights pass by once: they may leave the L2 first.
__device__ __forceinline__ void copy_once(u32 to, const void* from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}

__device__ __forceinline__ void copy(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Arrive when all copies that this thread has started are done.
__device__ __forceinline__ void arrive_with_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// The two warps that share 32 outputs wait for each other.
__device__ __forceinline__ void pair_meets(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory"); }

__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrices(u32 (&v)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ u16 to_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Programmatic dependent launch: where the launch allows it, this grid starts while the one before it still runs.
__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ u64 leaves_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Publishes what this warp has written before, and makes visible what those that counted earlier have.
__device__ __forceinline__ u32 count_arrival(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// a * {b, b} for the low or the high half b of `both`, which the multiplication selects by itself.
__device__ __forceinline__ u32 times_low(u32 a, u32 both) {
    u32 d;
    asm("{\n.reg .b16 low, high;\n.reg .b32 pair;\nmov.b32 {low, high}, %2;\nmov.b32 pair, {low, low};\n"
        "mul.rn.bf16x2 %0, %1, pair;\n}" : "=r"(d) : "r"(a), "r"(both));
    return d;
}

__device__ __forceinline__ u32 times_high(u32 a, u32 both) {
    u32 d;
    asm("{\n.reg .b16 low, high;\n.reg .b32 pair;\nmov.b32 {low, high}, %2;\nmov.b32 pair, {high, high};\n"
        "mul.rn.bf16x2 %0, %1, pair;\n}" : "=r"(d) : "r"(a), "r"(both));
    return d;
}

#endif

// Two E2M1 codes, in bits 12 to 15 and 28 to 31, as bfloat16: the code's value times 2^-126.
__device__ __forceinline__ u32 decode(u32 word) { return (word & 0x80008000u) | ((word >> 6) & 0x01C001C0u); }

// Two of Marlin's scale bytes (5 bits of exponent, 3 of mantissa; value scale * 2^7), bytes 0 and 2, as bfloat16 times
// 2^96 more. The top bit of a byte is set unless the scale is zero, and then the codes are (see stream_gemm.py).
__device__ __forceinline__ u32 scales_of(u32 bytes) { return ((bytes << 4) & 0x07F007F0u) | 0x70007000u; }

struct Share {  // units of one block: a unit is a stage's worth of inputs of one tile of outputs
    int first, last;
};

__device__ __forceinline__ Share share_of(int block, int blocks, int units) {
    return {(int)((long)units * block / blocks), (int)((long)units * (block + 1) / blocks)};
}

// The block whose share holds this unit.
__device__ __forceinline__ int block_of(int unit, int blocks, int units) {
    return (int)(((long)(unit + 1) * blocks - 1) / units);
}

extern "C" __global__ void __launch_bounds__(640, 1) nvfp4_stream(
    const unsigned char* codes,   // [K / 16, 8 * N] bytes, Marlin's order
    const unsigned char* scales,  // [K / 16, N] bytes, Marlin's order
    const u16* x,                 // [rows, K] bfloat16
    const u16* pre,               // [K] bfloat16, where SCALED
    u16* y,                       // [rows, N] bfloat16
    const float* global_scale,    // [1], Marlin's: weight_scale_2 * 2^119 / scale_factor
    float* partial,               // [N / 256, parts, MT, 8, 32, 8]
    u32* arrivals,                // [N / 32], zero before and after
    int rows, int N, int K, int parts) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int per_tile = K / DEPTH, units = N / COLUMNS * per_tile;
    const Share mine = share_of(blockIdx.x, gridDim.x, units);
    const u32 base = address(shared), full = base + BARRIERS_AT, empty = full + 8 * STAGES;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            init_barrier(full + 8 * s, COPIERS);
            init_barrier(empty + 8 * s, WARPS);
        }
        publish_barriers();
    }
    __syncthreads();
    let_next_grid_start();

    if (warp >= WARPS) {
        const int p = threadIdx.x - WARPS * 32, count = mine.last - mine.first;
        const u64 policy = leaves_first();
        for (int pass = 0; pass < 2; pass++) {
            // Pass 0 fills the ring with weights, which no kernel before this one writes; pass 1 brings x to these
            // stages and goes on with both.
            int tile = mine.first / per_tile, block = mine.first % per_tile, stage = 0, round = 0;
            for (int i = 0; i < count && (pass || i < STAGES); i++) {
                const u32 at = base + stage * STAGE_BYTES;
                if (round) wait(empty + 8 * stage, (round - 1) & 1);
                if (pass == 0 || round) {
                    const unsigned char* from = codes + ((long)block * STEPS * N + tile * COLUMNS) * 8 + p * 16;
#pragma unroll
                    for (int s = 0; s < STEPS; s++)
                        copy_once(at + CODES_AT + s * COLUMNS * 8 + p * 16, from + (long)s * N * 8, policy);
                    copy_once(at + SCALES_AT + p * 16,
                              scales + (long)(block * STEPS + p / 16) * N + tile * COLUMNS + p % 16 * 16, policy);
                    if (SCALED && p < DEPTH / 8) copy(at + PRE_AT + p * 16, pre + block * DEPTH + p * 8);
                }
                if (pass) {
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        const int row = m * 8 + p / 16;
                        if (row < rows)
                            copy(at + X_AT + row * X_STRIDE + p % 16 * 16, x + (long)row * K + block * DEPTH + p % 16 * 8);
                    }
                    arrive_with_copies(full + 8 * stage);
                }
                if (++block == per_tile) block = 0, tile++;
                if (++stage == STAGES) stage = 0, round++;
            }
            if (pass == 0) wait_for_previous_grid();
        }
        return;
    }

    const int g = lane / 4, t = lane % 4, part_n = warp % 8, part_k = warp / 8;
    float acc[2][MT][4];
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[q][m][i] = 0.0f;
    // Where this lane's share of a step lies: two words of codes, four scales, a row of x for ldmatrix.
    const u32 codes_at = CODES_AT + part_n / 2 * 512 + lane * 16 + part_n % 2 * 8;
    const u32 scales_at = SCALES_AT + part_n / 2 * 64 + g * 8 + part_n % 2 * 4;
    const u32 x_at = X_AT + (lane % 8 + (MT > 1 ? lane / 16 * 8 : 0)) * X_STRIDE + (MT > 1 ? lane / 8 % 2 : lane / 8) * 16;
    const float scale = *global_scale * 1.262177448353619e-29f;  // 2^-96
    float* sums = reinterpret_cast<float*>(shared + SUMS_AT) + (part_n * 32 + lane) * 8;

    int tile = mine.first / per_tile, block = mine.first % per_tile, stage = 0, parity = 0, buffer = 0;
    for (int left = mine.last - mine.first; left > 0; left--) {
        wait(full + 8 * stage, parity);
        const u32 here = stage * STAGE_BYTES;
        u32 in[MT > 1 ? MT / 2 : 1][4];
#pragma unroll
        for (int s = 0; s < STEPS / 2; s++) {
            const int step = part_k * (STEPS / 2) + s;
            const uint2 words = *reinterpret_cast<const uint2*>(shared + here + codes_at + step * COLUMNS * 8);
            const u32 bytes = *reinterpret_cast<const u32*>(shared + here + scales_at + step * COLUMNS);
            if (MT > 1 || s % 2 == 0) {  // with one tile of rows a load brings this step's and the next one's inputs
#pragma unroll
                for (int m = 0; m < MT; m += 2) {
                    u32(&v)[4] = in[m / 2];
                    load_matrices(v, base + here + x_at + m * 8 * X_STRIDE + step * 32);
                    if (SCALED) {
                        const u32* by = reinterpret_cast<const u32*>(shared + here + PRE_AT + step * 32) + t;
                        const u32* by_second = MT > 1 ? by : by + 8;
                        v[0] = times(v[0], by[0]), v[1] = times(v[1], by[4]);
                        v[2] = times(v[2], by_second[0]), v[3] = times(v[3], by_second[4]);
                    }
                }
            }
#pragma unroll
            for (int q = 0; q < 2; q++) {
                const u32 word = q ? words.y : words.x;
                const u32 both = scales_of(q ? bytes >> 8 : bytes);
                const u32 a[4] = {times_low(decode(word << 12), both), times_high(decode(word << 4), both),
                                  times_low(decode(word << 8), both), times_high(decode(word), both)};
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const int pair = MT > 1 ? m % 2 * 2 : s % 2 * 2;
                    mma(acc[q][m], a, in[m / 2][pair], in[m / 2][pair + 1]);
                }
            }
        }
        __syncwarp();
        if (lane == 0) arrive(empty + 8 * stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
        if (++block < per_tile && left > 1) continue;

        // The tile ends here, or this block's share does: add up both halves of the inputs, then all parts.
        const int column = tile * COLUMNS + part_n * 32;
        const int first = block_of(tile * per_tile, gridDim.x, units);
        const int count = block_of((tile + 1) * per_tile - 1, gridDim.x, units) - first + 1;
        float* of_tile = partial + ((long)tile * parts * MT * 8 + part_n) * 256 + lane * 8;
#pragma unroll
        for (int m = 0; m < MT; m++) {
            float* here = sums + buffer * SUMS;  // two in turn, so that one meeting each is enough
            buffer ^= 1;
            if (part_k) {
#pragma unroll
                for (int q = 0; q < 2; q++)
                    *reinterpret_cast<float4*>(here + q * 4) =
                        make_float4(acc[q][m][0], acc[q][m][1], acc[q][m][2], acc[q][m][3]);
            }
            pair_meets(part_n);
            if (!part_k) {
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    const float4 v = *reinterpret_cast<const float4*>(here + q * 4);
                    acc[q][m][0] += v.x, acc[q][m][1] += v.y, acc[q][m][2] += v.z, acc[q][m][3] += v.w;
                    if (count > 1)
                        __stcg(reinterpret_cast<float4*>(of_tile + ((long)(blockIdx.x - first) * MT + m) * SUMS) + q,
                               make_float4(acc[q][m][0], acc[q][m][1], acc[q][m][2], acc[q][m][3]));
                }
            }
        }
        bool writes = !part_k;
        if (count > 1 && writes) {  // the last block to arrive adds up the parts, always in the same order
            __syncwarp();
            u32 arrived = 0;
            if (lane == 0) {
                arrived = count_arrival(arrivals + tile * 8 + part_n);
                if (arrived == count - 1) arrivals[tile * 8 + part_n] = 0;
            }
            writes = __shfl_sync(0xFFFFFFFFu, arrived, 0) == count - 1;
            if (writes) {
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int q = 0; q < 2; q++) {
                        float4 a = make_float4(0, 0, 0, 0);
                        for (int p = 0; p < count; p += 4) {
                            float4 v[4];
#pragma unroll
                            for (int j = 0; j < 4; j++)
                                if (p + j < count)
                                    v[j] = __ldcg(reinterpret_cast<const float4*>(of_tile + ((long)(p + j) * MT + m) * SUMS) + q);
#pragma unroll
                            for (int j = 0; j < 4; j++)
                                if (p + j < count) a.x += v[j].x, a.y += v[j].y, a.z += v[j].z, a.w += v[j].w;
                        }
                        acc[q][m][0] = a.x, acc[q][m][1] = a.y, acc[q][m][2] = a.z, acc[q][m][3] = a.w;
                    }
            }
        }
#pragma unroll
        for (int q = 0; q < 2; q++)
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int row = m * 8 + t * 2 + j % 2, n = column + q * 16 + g + j / 2 * 8;
                    if (writes && row < rows) y[(long)row * N + n] = to_bf16(acc[q][m][j] * scale);
                    acc[q][m][j] = 0.0f;
                }
        block = 0, tile++;
    }
}
