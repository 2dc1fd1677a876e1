// y[m, n] = sum_k x[m, k] * W[n, k] for a few rows m and bfloat16 weights W as PyTorch holds them (sm_90 and newer).
//
// Memory-bound: a block has a multiprocessor's registers, and fills half of them with weights before the kernel ahead has
// ended; what more it has to multiply comes in where weights have been used. Of 32 inputs lane t of four takes eight of
// outputs g and g + 8, 16 bytes each, and the same inputs of x: two products of mma.m16n8k16, to which it is the same
// which input stands where.
//
// Compiled by NVRTC behind rows_device.cu with MT (tiles of 8 tokens), NT (tiles of 16 outputs of a warp, 1 or 2), GELU (1,
// with NT 2: gelu(first half) * second half of the outputs), CHUNKS (of 32 inputs, that a warp has in registers), AHEAD (of
// x, that are loaded at once) and WARPS. Launched with
//
//   grid N / 16 / NT / (WARPS / split) rounded up, block 32 * WARPS, shared memory WARPS * NT * MT * 512 bytes:
//
// `split` warps of a block share NT tiles of outputs; their sums are added up in their order.

constexpr int UNIT = 32 * CHUNKS;           // inputs of a warp at a time
constexpr int SUMS = MT * NT == 1 ? 2 : 1;  // of a tile, so that a product need not wait for the one before

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) bf16_rows(
    const u16* weight,  // [N, K] bfloat16
    const u16* x,       // [tokens, K] bfloat16
    u16* y,             // [tokens, N] bfloat16; with GELU [tokens, N / 2]
    int tokens, int N, int K, int split) {
    float(*sums)[NT * MT * 4][32] = reinterpret_cast<float(*)[NT * MT * 4][32]>(shared);  // [WARPS]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int slots = WARPS / split, slot = blockIdx.x * slots + warp / split, all = N / 16 / NT, units = K / UNIT;
    int index = slot < all ? warp % split : units;
    // With GELU a tile of the gate and the tile of the up projection that goes with it, else neighbours.
    const u16* from = weight + (long)(slot * (GELU ? 16 : 16 * NT) + g) * K + t * 8;
    const long second = (long)(GELU ? N / 2 : 16) * K;

    let_next_grid_start();
    uint4 w[NT][2][CHUNKS];
    const auto fetch = [&](int index, int c) {
        const u16* at = from + index * UNIT + c * 32;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                w[n][h][c] = load_once(reinterpret_cast<const uint4*>(at + n * second + h * 8 * (long)K));
    };
    if (index < units) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) fetch(index, c);
    }
    wait_for_previous_grid();

    float acc[NT][MT][4], odd[NT][MT][4];
    EACH_SUM(acc[n][m][i] = odd[n][m][i] = 0.0f)
    x += (long)g * K + t * 8;
    for (; index < units; index += split) {
        const bool more = index + split < units;
#pragma unroll
        for (int first = 0; first < CHUNKS; first += AHEAD) {
            uint4 in[AHEAD][MT];
#pragma unroll
            for (int c = 0; c < AHEAD; c++)
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const u16* at = x + (long)m * 8 * K + index * UNIT + (first + c) * 32;
                    in[c][m] = g + m * 8 < tokens ? __ldcg(reinterpret_cast<const uint4*>(at)) : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const uint4 &low = w[n][0][first + c], &high = w[n][1][first + c];
                    const u32 one[4] = {low.x, high.x, low.y, high.y}, other[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        mma(acc[n][m], one, in[c][m].x, in[c][m].y);
                        mma(SUMS == 2 ? odd[n][m] : acc[n][m], other, in[c][m].z, in[c][m].w);
                    }
                }
                if (more) fetch(index + split, first + c);
            }
        }
    }

    EACH_SUM(sums[warp][(n * MT + m) * 4 + i][lane] = acc[n][m][i] + odd[n][m][i])
    __syncthreads();
    for (int which = threadIdx.x; which < slots * MT * 128; which += 32 * WARPS) {
        const int one = which % 32, i = which / 32 % (MT * 4), s = which / (MT * 128), tile = blockIdx.x * slots + s;
        const int token = i / 4 * 8 + one % 4 * 2 + i % 2, output = one / 4 + i % 4 / 2 * 8;
        if (token >= tokens || tile >= all) continue;
        float sum[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            sum[n] = 0.0f;
#pragma unroll 4
            for (int w = s * split; w < (s + 1) * split; w++) sum[n] += sums[w][n * MT * 4 + i][one];
        }
        if (GELU) {
            y[(long)token * (N / 2) + tile * 16 + output] = to_bf16(gelu_tanh(rounded(sum[0])) * rounded(sum[NT - 1]));
            continue;
        }
#pragma unroll
        for (int n = 0; n < NT; n++) y[(long)token * N + (tile * NT + n) * 16 + output] = to_bf16(sum[n]);
    }
}
