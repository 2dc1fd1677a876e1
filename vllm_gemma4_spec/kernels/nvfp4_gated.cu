// y = (gelu_tanh(x @ G.T) * by) @ P.T for a few rows and NVFP4 weights: a layer's per-layer input as one kernel.
//
// Compiled behind nvfp4_rows.cu, whose functions it takes, with NT tiles of 16 outputs a warp (1 or 2). G is [256, K], P
// is [K, 256]: a cluster of eight blocks takes 8 * MT tokens. A warp multiplies 256 inputs by 16 * NT of the block's 32
// rows of G; the block adds up and gives the 32 gated values of each token to all blocks of the cluster; then a warp
// has 16 * NT rows of P to itself. All weights are on their way before the kernel ahead has ended. Launched with
//
//   grid (chunks, 1, 8), clusters along z, block K / 256 * 64 / NT, shared memory K / 256 * MT * 1024 + MT * 8 * 528 bytes

constexpr int WIDE = 256, PADDED = WIDE + 8;  // values of a token; tokens apart, so that eight meet in no bank

extern "C" __global__ void __launch_bounds__(NT == 1 ? 768 : 512) nvfp4_gated(
    const uint4* gate_codes,      // [16, K / 256, 4, 32]
    const uint2* gate_scales,     // [16, K / 256, 32]
    const float* gate_scale,      // [1]
    const uint4* up_codes,        // [K / 16, 1, 4, 32]
    const uint2* up_scales,       // [K / 16, 1, 32]
    const float* up_scale,        // [1]
    const u16* x,                 // [tokens, K] bfloat16
    const u16* by,                // [tokens, 256] bfloat16, rows `apart` elements apart
    u16* y,                       // [tokens, K] bfloat16
    int tokens, int K, int apart) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int each = 2 / NT, inputs = warp / each;  // warps that share inputs; which inputs
    const int block = blockIdx.z, first = blockIdx.x * 8 * MT;
    float(*sums)[NT * MT * 4][32] = reinterpret_cast<float(*)[NT * MT * 4][32]>(shared);  // [warps]
    u16(*gated)[PADDED] = reinterpret_cast<u16(*)[PADDED]>(sums + warps);                 // [8 * MT]
    int none[NT];
    Block gate[NT], up[NT];
    int tiles[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) tiles[n] = (block * warps + warp) * NT + n, none[n] = -1;
#pragma unroll
    for (int n = 0; n < NT; n++)
        fetch(gate[n], gate_codes, gate_scales, (block * 2 + warp % each * NT + n) * (warps / each) + inputs, lane);
#pragma unroll
    for (int n = 0; n < NT; n++) fetch(up[n], up_codes, up_scales, tiles[n], lane);
    const float scale = load_early(gate_scale) * 256.0f, scale_up = load_early(up_scale) * 256.0f;
    cluster_arrive();
    wait_for_previous_grid();
    let_next_grid_start();  // not before: what waits behind it would be in its way
    tokens -= first;
    x += (long)first * K;
    by += (long)first * apart;
    float acc[NT][MT][4];
    EACH_SUM(acc[n][m][i] = 0.0f)
    // Thread by thread one of the block's values: its place among a warp's sums says token and column.
    auto token_of = [&](int which) { return which / 4 % MT * 8 + t * 2 + which % 2; };
    auto column_of = [&](int which) { return (block * 2 + which / 4 / MT) * 16 + g + which / 2 % 2 * 8; };
    auto factor_of = [&](int which) {
        return token_of(which) < tokens ? by[(long)token_of(which) * apart + column_of(which)] : u16(0);
    };
    const u16 early = warp < 8 * MT ? factor_of(warp) : u16(0);
    multiply(gate, x + (long)g * K + t * 16 + inputs * 256, x, g, tokens, (long)8 * K, nullptr, nullptr, none, acc);
    EACH_SUM(sums[warp][(n * MT + m) * 4 + i][lane] = acc[n][m][i])
    __syncthreads();
    cluster_wait();  // all blocks have started
    for (int which = warp; which < 8 * MT; which += warps) {
        const int tile = which / 4 / MT, at = which - tile / NT * NT * MT * 4;
        float sum = 0.0f;
        for (int w = tile / NT; w < warps; w += each) sum += sums[w][at][lane];
        const float factor = __uint_as_float((u32)(which == warp ? early : factor_of(which)) << 16);
        const bool live = token_of(which) < tokens;
        const u16 value = live ? to_bf16(gelu_tanh(rounded(sum * scale)) * factor) : u16(0);
#pragma unroll
        for (int b = 0; b < 8; b++) store_in_block(&gated[token_of(which)][column_of(which)], value, b);
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    EACH_SUM(acc[n][m][i] = 0.0f)
    multiply<true>(up, gated[g] + t * 16, x, g, tokens, 8 * PADDED, nullptr, nullptr, none, acc);
    EACH_SUM(const int token = m * 8 + t * 2 + i % 2, row = tiles[n] * 16 + g + i / 2 * 8;
             if (token < tokens) y[(long)(first + token) * K + row] = to_bf16(acc[n][m][i] * scale_up))
}
