// y[m, n] = sum_k x[m, k] * W[n, k] for a few rows m and NVFP4 weights W, on tensor cores (sm_80 and newer).
//
// Memory-bound: what counts is bytes in flight and few instructions per weight. Weights are stored in the order
// in which a warp feeds them to mma.m16n8k16 as its A operand (see packing.py), so that a lane's 16-byte load is
// four fragments, decoded by shifts and masks. W is exact in bfloat16 (two significand bits times four).
//
// Compiled by NVRTC behind rows_device.cu with MT (tiles of 8 tokens that a warp takes at once), NT (tiles of 16 outputs, 1 or 2), ROLL (1: the
// next weights come into registers whose weights have been used), WHOLE (1: x of 64 inputs is loaded at once, 0: of 32),
// FIT (blocks of four warps that the registers of a multiprocessor are to hold; 0: no matter), REGISTERS (of a thread, to
// plan with; 0: no matter), GELU (0; 1: gelu(first half) * second half; 2: gelu(y) * by) and SCALED (1: x is multiplied
// by pre_quant_scale first, each product rounded to bfloat16). Launched with
//
//   grid (chunks * N / 16 / NT / (warps / split), parts), block 32 * warps, shared memory warps * NT * MT * 512 bytes:
//
// each chunk of 8 * MT tokens reads all weights, side by side with the other chunks, so that they come from memory once;
// `split` warps of a block and `parts` blocks share NT tiles of outputs.

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

#ifndef ROWS_ON_HOST
__device__ __forceinline__ u32 times(u32 a, u32 b) {  // fma: bfloat16x2 has no mul before sm_90
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}
#endif

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

template <bool SHARED_X>
__device__ __forceinline__ uint4 load_x(const uint4* at) {
    return SHARED_X ? *at : __ldg(at);
}

// Of a tile, so that a product need not wait for the one before. Tried for one tile of tokens and outputs alone.
constexpr bool TWO_SUMS = MT * NT == 1;

// x, pre: this lane's token and inputs of the block; stride in elements between tiles of 8 tokens. Codes and scales of
// the block at `next` of each tile (none if negative) come into b, register by register as they have been used.
template <bool SHARED_X = false>
__device__ __forceinline__ void multiply(Block (&b)[NT], const u16* x, const u16* pre, int token, int tokens, long stride,
                                         const uint4* codes, const uint2* scales, const int (&next)[NT],
                                         float (&acc)[NT][MT][4]) {
    const int lane = threadIdx.x % 32;
    uint2 next_scales[NT];
    float odd[NT][MT][4] = {};
    if (ROLL && next[0] >= 0)
#pragma unroll
        for (int n = 0; n < NT; n++) next_scales[n] = load_once(scales + next[n] * 32 + lane);
#pragma unroll
    for (int q = 0; q < 4; q++) {
        uint4 other_half[MT];
        if (WHOLE)
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint4* at = reinterpret_cast<const uint4*>(x + m * stride + q * 64);
                other_half[m] = token + m * 8 < tokens ? load_x<SHARED_X>(at + 1) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 in[MT];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint4* at = reinterpret_cast<const uint4*>(x + m * stride + q * 64);
                if (WHOLE && half)
                    in[m] = other_half[m];
                else
                    in[m] = token + m * 8 < tokens ? load_x<SHARED_X>(at + half) : make_uint4(0, 0, 0, 0);
            }
            if (SCALED) {
                const uint4 by = __ldg(reinterpret_cast<const uint4*>(pre + q * 64) + half);
#pragma unroll
                for (int m = 0; m < MT; m++) scale_by(in[m], by);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const u32 bytes = q < 2 ? b[n].scales.x : b[n].scales.y;
                const u32 top = scale_pair(bytes, q % 2 ? 0x4242u : 0x4040u);
                const u32 bottom = scale_pair(bytes, q % 2 ? 0x4343u : 0x4141u);
                const u32 words[2] = {half ? b[n].codes[q].z : b[n].codes[q].x, half ? b[n].codes[q].w : b[n].codes[q].y};
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    u32 a[4];
                    decode(words[j], a);
                    a[0] = times(a[0], top);
                    a[1] = times(a[1], bottom);
                    a[2] = times(a[2], top);
                    a[3] = times(a[3], bottom);
#pragma unroll
                    for (int m = 0; m < MT; m++)
                        mma(TWO_SUMS && j ? odd[n][m] : acc[n][m], a, j ? in[m].z : in[m].x, j ? in[m].w : in[m].y);
                }
            }
        }
        if (ROLL && next[0] >= 0)
#pragma unroll
            for (int n = 0; n < NT; n++) b[n].codes[q] = load_once(codes + (next[n] * 4 + q) * 32 + lane);
    }
    if (ROLL && next[0] >= 0)
#pragma unroll
        for (int n = 0; n < NT; n++) b[n].scales = next_scales[n];
    if (TWO_SUMS) EACH_SUM(acc[n][m][i] += odd[n][m][i])
}

#if FIT
#define BOUNDS __launch_bounds__(128, FIT)
#elif REGISTERS && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1204
#define BOUNDS __maxnreg__(REGISTERS)
#else
#define BOUNDS __launch_bounds__(MT * NT > 4 ? 256 : 512)
#endif

extern "C" __global__ void BOUNDS nvfp4_rows(
    const uint4* codes,         // [N / 16, K / 256, 4, 32]
    const uint2* scales,        // [N / 16, K / 256, 32]
    const u16* x,               // [tokens, K] bfloat16
    const u16* pre,             // [K] bfloat16, where SCALED
    u16* y,                     // [tokens, N] bfloat16; with GELU [tokens, N / 2]: gelu(first half) * second half
    const float* global_scale,  // [1]
    float* partial,             // [chunks, parts, N / 16, 32, MT * 4], where parts > 1
    u32* arrivals,              // [gridDim.x], zero before and after, where parts > 1
    int tokens, int N, int K, int split, int chunks,
    const u16* by,              // [tokens, N] bfloat16, rows `apart` elements apart, where GELU is 2
    int apart) {
    float(*sums)[NT * MT * 4][32] = reinterpret_cast<float(*)[NT * MT * 4][32]>(shared);  // [warps]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int group = chunks == 1 ? blockIdx.x : blockIdx.x / chunks, chunk = blockIdx.x - group * chunks;
    const int part = blockIdx.y, parts = gridDim.y;
    const int blocks = K / 256, share = warp % split;
    const int slot = group * (blockDim.x / 32 / split) + warp / split;
    // With GELU 1 a tile of the gate and the tile of the up projection that goes with it are neighbours: two tiles of a
    // warp, or those of two slots.
    int tiles[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const int at = slot * NT + n;
        tiles[n] = GELU == 1 ? at / 2 + (at % 2) * (N / 32) : at;
    }
    x += (long)chunk * 8 * MT * K;
    y += (long)chunk * 8 * MT * (GELU == 1 ? N / 2 : N);
    by += (long)chunk * 8 * MT * apart;
    tokens -= chunk * 8 * MT;

    float acc[NT][MT][4];
    EACH_SUM(acc[n][m][i] = 0.0f)

    const u16 *my_x = x + (long)g * K + t * 16, *my_pre = pre + t * 16;
    const int step = split * parts;
    int index = part * split + share;
    Block now[NT];
    int none[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) none[n] = -1;
    // Weights do not depend on the grid before this one: fetch them while it finishes, and touch x only then.
    if (GELU != 2) let_next_grid_start();
    if (index < blocks) {
#pragma unroll
        for (int n = 0; n < NT; n++) fetch(now[n], codes, scales, tiles[n] * blocks + index, lane);
    }
    const float whole_scale = load_early(global_scale);
    wait_for_previous_grid();
    if (GELU == 2) let_next_grid_start();  // a small GEMM: what waits behind it would be in its way
    u16 factors[NT][MT][4];
    if (GELU == 2 && share == 0)
        EACH_SUM(const int token = m * 8 + t * 2 + i % 2;
                 factors[n][m][i] = token < tokens ? by[(long)token * apart + tiles[n] * 16 + g + i / 2 * 8] : u16(0))
    if (index < blocks) {
        for (; index + step < blocks; index += step) {
            int following[NT];
#pragma unroll
            for (int n = 0; n < NT; n++) following[n] = tiles[n] * blocks + index + step;
            const u16 *here = my_x + index * 256, *scale_here = my_pre + index * 256;
            if (ROLL) {
                multiply(now, here, scale_here, g, tokens, (long)8 * K, codes, scales, following, acc);
            } else {
                Block next[NT];
#pragma unroll
                for (int n = 0; n < NT; n++) fetch(next[n], codes, scales, following[n], lane);
                multiply(now, here, scale_here, g, tokens, (long)8 * K, codes, scales, none, acc);
#pragma unroll
                for (int n = 0; n < NT; n++) now[n] = next[n];
            }
        }
        multiply(now, my_x + index * 256, my_pre + index * 256, g, tokens, (long)8 * K, codes, scales, none, acc);
    }

    if (split > 1 || (GELU == 1 && NT == 1) || parts > 1) {
        EACH_SUM(sums[warp][(n * MT + m) * 4 + i][lane] = acc[n][m][i])
        __syncthreads();
        if (share == 0) {
            for (int w = 1; w < split; w++) EACH_SUM(acc[n][m][i] += sums[warp + w][(n * MT + m) * 4 + i][lane])
        }
    }
    if (parts > 1) {  // the last block to arrive adds up the parts, always in the same order
        __shared__ u32 last;
        const long size = (long)(N / 16) * 32 * MT * 4;
        float* mine = partial + chunk * parts * size + (long)lane * MT * 4;
        const int counter = blockIdx.x;
        if (share == 0) {
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int m = 0; m < MT; m++)
                    *reinterpret_cast<float4*>(mine + part * size + (long)tiles[n] * 32 * MT * 4 + m * 4) =
                        make_float4(acc[n][m][0], acc[n][m][1], acc[n][m][2], acc[n][m][3]);
            __threadfence();
        }
        __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(arrivals + counter, 1u) == parts - 1;
        __syncthreads();
        if (!last) return;
        if (threadIdx.x == 0) arrivals[counter] = 0;
        if (share == 0) {
            __threadfence();
            EACH_SUM(acc[n][m][i] = 0.0f)
            for (int p = 0; p < parts; p++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        const float4 v = __ldcg(
                            reinterpret_cast<const float4*>(mine + p * size + (long)tiles[n] * 32 * MT * 4 + m * 4));
                        acc[n][m][0] += v.x, acc[n][m][1] += v.y, acc[n][m][2] += v.z, acc[n][m][3] += v.w;
                    }
        }
    }
    const float scale = whole_scale * 256.0f;
    if (GELU == 1) {
        if (NT == 1) {  // exchange the finished sums of the two tiles
            __syncthreads();
            if (share == 0) EACH_SUM(sums[warp][(n * MT + m) * 4 + i][lane] = acc[n][m][i])
            __syncthreads();
            if (slot % 2) return;
        }
        if (share) return;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float up = NT == 1 ? sums[warp + split][m * 4 + i][lane] : acc[NT - 1][m][i];
                const int token = m * 8 + t * 2 + i % 2, row = tiles[0] * 16 + g + i / 2 * 8;
                if (token < tokens)
                    y[(long)token * (N / 2) + row] = to_bf16(gelu_tanh(rounded(acc[0][m][i] * scale)) * rounded(up * scale));
            }
        return;
    }
    if (share) return;
    EACH_SUM(const int token = m * 8 + t * 2 + i % 2, row = tiles[n] * 16 + g + i / 2 * 8;
             float v = acc[n][m][i] * scale;
             if (GELU == 2) v = gelu_tanh(rounded(v)) * __uint_as_float((u32)factors[n][m][i] << 16);
             if (token < tokens) y[(long)token * N + row] = to_bf16(v))
}
