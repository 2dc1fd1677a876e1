// y[m, n] = sum_k x[m, k] * W[n, k] for a few rows m and bfloat16 weights W as PyTorch holds them (sm_90 and newer).
//
// Memory-bound: all weights of a GEMM are on their way into registers before the kernel ahead has ended, as far as its
// blocks leave room; x is read then, once. Of 32 inputs lane t of four takes eight of outputs g and g + 8, 16 bytes each,
// and the same inputs of x: two products of mma.m16n8k16, to which it is the same which input stands where.
//
// Compiled by NVRTC behind rows_device.cu with MT (tiles of 8 tokens), GELU (1: gelu(first half) * second half of the
// outputs), CHUNKS (of 32 inputs, that a warp has in registers) and FIT (blocks on a multiprocessor). Launched with
//
//   grid (N / 16 / NT / (8 / split), 1, parts), clusters along z, block 256, shared memory parts * 8 * NT * MT * 512 bytes:
//
// `split` warps of a block and `parts` blocks, a cluster, share NT tiles of 16 outputs. The cluster's first block adds up
// their sums, always in the same order.

constexpr int WARPS = 8, NT = GELU ? 2 : 1;  // a tile of the gate and the tile of the up projection that goes with it
constexpr int UNIT = 32 * CHUNKS;            // inputs of a warp at a time
constexpr int AHEAD = CHUNKS < 8 / MT ? CHUNKS : 8 / MT;  // chunks of x that are loaded at once
constexpr int SUMS = MT * NT == 1 ? 2 : 1;   // of a tile, so that a product need not wait for the one before

extern "C" __global__ void __launch_bounds__(32 * WARPS, FIT) bf16_rows(
    const u16* weight,  // [N, K] bfloat16
    const u16* x,       // [tokens, K] bfloat16
    u16* y,             // [tokens, N] bfloat16; with GELU [tokens, N / 2]
    int tokens, int N, int K, int split) {
    float(*sums)[NT * MT * 4][32] = reinterpret_cast<float(*)[NT * MT * 4][32]>(shared);  // [parts * WARPS], first block's
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int slots = WARPS / split, tiles = N / 16 / NT, units = K / UNIT, part = blockIdx.z, parts = gridDim.z;
    const int tile = blockIdx.x * slots + warp / split, step = split * parts;
    int index = tile < tiles ? part * split + warp % split : units;
    const u16* from = weight + (long)(tile * 16 + g) * K + t * 8;
    const long second = (long)(N / 2) * K;  // the up projection

    let_next_grid_start();
    uint4 w[NT][2][CHUNKS];
    const auto fetch = [&](int index, int c) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                w[n][h][c] = load_once(reinterpret_cast<const uint4*>(from + n * second + h * 8 * (long)K + index * UNIT + c * 32));
    };
    if (index < units) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) fetch(index, c);
    }
    if (parts > 1) cluster_arrive();
    wait_for_previous_grid();

    float acc[NT][MT][4], odd[NT][MT][4];
    EACH_SUM(acc[n][m][i] = odd[n][m][i] = 0.0f)
    x += (long)g * K + t * 8;
    for (; index < units; index += step) {
        const bool more = index + step < units;
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
                if (more) fetch(index + step, first + c);
            }
        }
    }

    EACH_SUM(acc[n][m][i] += odd[n][m][i])
    if (parts > 1) {
        cluster_wait();  // the first block has started
        EACH_SUM(store_in_block(&sums[part * WARPS + warp][(n * MT + m) * 4 + i][lane], acc[n][m][i], 0))
        __syncwarp();
        cluster_arrive();
        if (part) return;
        cluster_wait();
    } else {
        EACH_SUM(sums[warp][(n * MT + m) * 4 + i][lane] = acc[n][m][i])
        __syncthreads();
    }
    for (int which = threadIdx.x; which < slots * MT * 128; which += 32 * WARPS) {
        const int one = which % 32, i = which / 32 % (MT * 4), slot = which / (MT * 128);
        float sum[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) sum[n] = 0.0f;
        for (int p = 0; p < parts; p++)
#pragma unroll 4
            for (int s = 0; s < split; s++)
#pragma unroll
                for (int n = 0; n < NT; n++) sum[n] += sums[p * WARPS + slot * split + s][n * MT * 4 + i][one];
        const int token = i / 4 * 8 + one % 4 * 2 + i % 2, of = blockIdx.x * slots + slot;
        const int output = of * 16 + one / 4 + i % 4 / 2 * 8;
        if (token >= tokens || of >= tiles) continue;
        y[(long)token * (N / NT) + output] = to_bf16(GELU ? gelu_tanh(rounded(sum[0])) * rounded(sum[NT - 1]) : sum[0]);
    }
}
