// Attention of a few queries per request over a paged KV cache in bfloat16, by a cluster of eight blocks for eight rows of a
// request and KV head, a row being a query and one of its heads (sm_90 and newer): what two kernels did, one for parts of
// the keys and one for their sum.
//
// A block has an equal part of the keys that the rows see. Keys are the rows of the scores' mma.m16n8k16 and dimensions
// those of the output's, so that the rows are columns, of which a tile has eight. Each warp ends with the sums of an eighth
// of the dimensions, and gives them to the block of the cluster that adds up just these.
//
// Compiled by NVRTC with SIZE (of a head: 256 or 512), GROUP (query heads of a KV head, at most 8), WINDOW (keys that a
// query sees at most; 0: all), PAGE (tokens of a cache block), CHUNK (keys that are in shared memory at a time, a multiple
// of 16), STAGES (how many chunks), RECEIVE (where the other blocks' sums come to: 0 memory of their own, 1 over the keys,
// 2 over keys and values), ALONE (keys up to which one cluster takes a tile of rows) and EARLY (see below). Launched with
//
//   grid (requests, KV heads * tiles * clusters, 8), clusters of 8 along z, block 256, SHARED bytes of shared memory.
//
// EARLY: 1: lengths and the block table are read before the kernel ahead has ended. No kernel of a pass writes them; between
// two passes they are written by kernels without programmatic launch, with others behind, which start when all before has
// ended. 2: keys and values are brought into the L2 meanwhile, too, where what is written later counts. 0: all comes behind
// the wait. Queries, keys and values are read and results are written behind it always.

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int BLOCKS = 8, WARPS = 8;  // one warp's dimensions are what one block adds up
constexpr int ROWS = 8, QUERIES = ROWS / GROUP;       // of a tile
constexpr int SLICE = SIZE / BLOCKS, TILES = CHUNK / 16, EACH = CHUNK / WARPS, MT = SLICE / 16;
constexpr int SPLIT = TILES > 4 ? 1 : 8 / TILES;  // parts of a score's sum
constexpr int SCORES = CHUNK + 4, WEIGHTS = CHUNK + 8, SUMS = SLICE + 4;  // apart, so that lanes meet in no bank

constexpr int K_AT = 0, V_AT = K_AT + STAGES * CHUNK * SIZE * 2, Q_AT = V_AT + STAGES * CHUNK * SIZE * 2;
constexpr int SCORES_AT = Q_AT + ROWS * SIZE * 2, WEIGHTS_AT = SCORES_AT + SPLIT * ROWS * SCORES * 4;
constexpr int FADES_AT = WEIGHTS_AT + ROWS * WEIGHTS * 2, TOTALS_AT = FADES_AT + ROWS * 4;
constexpr int OWN_AT = TOTALS_AT + BLOCKS * ROWS * 8, RECEIVED = BLOCKS * ROWS * SUMS * 4;
constexpr int RECEIVED_AT = RECEIVE ? K_AT : OWN_AT, NEEDED = OWN_AT + (RECEIVE ? 0 : RECEIVED);
static_assert(SIZE % 256 == 0 && CHUNK % 16 == 0 && CHUNK <= 256 && GROUP <= ROWS, "sizes");
static_assert(NEEDED <= SHARED, "shared memory");
static_assert(RECEIVE != 1 || (STAGES == 1 && RECEIVED <= V_AT), "the other blocks' sums fit over the keys");
static_assert(RECEIVE != 2 || RECEIVED <= Q_AT, "the other blocks' sums fit over keys and values");

#ifndef CLUSTER_ATTENTION_ON_HOST  // a test gives the functions below in plain C++ and runs the kernel on a CPU

extern __shared__ __align__(128) unsigned char shared[];

__device__ __forceinline__ u32 address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 x 8, each transposed: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_transposed(u32 (&a)[4], const u16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address(row))
                 : "memory");
}

__device__ __forceinline__ void copy_16(u16* to, const u16* from) {  // past the L1, which may hold what was there before
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void into_l2(const u16* row) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row), "n"(SIZE * 2) : "memory");
}

__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ u16 to_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ void cluster_arrive() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ u32 in_block(const void* here, int block) {  // the same place in another block's memory
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(here)), "r"(block));
    return there;
}

__device__ __forceinline__ void store_there(u32 there, int offset, float value) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there + offset * 4), "f"(value) : "memory");
}

// Programmatic dependent launch: where the launch allows it, this grid starts while the one before it still runs.
__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#endif

constexpr u32 ALL = 0xFFFFFFFFu;

// Where 16 bytes of a row are: eight rows of one column, and two rows of four columns, meet in no bank.
__device__ __forceinline__ int place(int row, int piece) {
    return row * SIZE + (piece ^ ((row & 1) << 2 | ((row >> 1) & 3))) * 8;
}

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xFF800000); }

__device__ __forceinline__ float finite(float largest) { return largest > minus_infinity() ? largest : 0.0f; }

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) cluster_attention(
    u16* out,            // [tokens, heads, SIZE]
    const u16* q,        // [tokens, heads, SIZE]
    const u16* k,        // [blocks, PAGE, KV heads, SIZE]
    const u16* v,
    const int* table,    // [requests, pages]
    const int* lengths,  // [requests]: keys of a request, its queries' among them
    const int* starts,   // [requests + 1]: first token
    float* partial,      // [requests * KV heads * tiles * 8, clusters, ROWS, SLICE + 2], where clusters > 1
    u32* arrivals,       // [requests * KV heads * tiles * 8], zero before and after, where clusters > 1
    int scale_bits,      // of a score, times log2(e), as a float
    int table_stride, int q_stride, int q_head_stride, int out_stride, int out_head_stride, int page_stride, int token_stride,
    int head_stride, int tiles_of_rows, int clusters) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int request = blockIdx.x, rank = blockIdx.z;
    const int unit = clusters == 1 ? blockIdx.y : blockIdx.y / clusters, cluster = blockIdx.y - unit * clusters;
    const int kv_head = tiles_of_rows == 1 ? unit : unit / tiles_of_rows, skipped = (unit - kv_head * tiles_of_rows) * QUERIES;
    u16 *keys = reinterpret_cast<u16*>(shared + K_AT), *values = reinterpret_cast<u16*>(shared + V_AT);
    u16 *queries_at = reinterpret_cast<u16*>(shared + Q_AT), *weights = reinterpret_cast<u16*>(shared + WEIGHTS_AT);
    float *scores = reinterpret_cast<float*>(shared + SCORES_AT), *fades = reinterpret_cast<float*>(shared + FADES_AT);
    float* totals = reinterpret_cast<float*>(shared + TOTALS_AT);      // [BLOCKS][ROWS][2]: largest score and sum
    float* received = reinterpret_cast<float*>(shared + RECEIVED_AT);  // [BLOCKS][ROWS][SUMS]

    let_next_grid_start();
    if (!EARLY) wait_for_previous_grid();
    const int first_token = __ldcg(starts + request), all = __ldcg(starts + request + 1) - first_token;
    const int start = first_token + skipped, queries = min(all - skipped, QUERIES), rows = queries * GROUP;
    const int context = __ldcg(lengths + request) - all + skipped, length = context + queries;
    const int first = WINDOW ? max(context - WINDOW + 1, 0) : 0;
    const int tiles = (max(length - first, 0) + 15) / 16;
    // Parts follow from the request alone: a row has the same bits whatever is beside it.
    int live = min(clusters, max((length - first + ALONE - 1) / ALONE, 1));
    const int each = max((tiles + live * BLOCKS - 1) / (live * BLOCKS), 1);
    live = max((tiles + each * BLOCKS - 1) / (each * BLOCKS), 1);
    const bool single = tiles <= 1;  // one block has all
    if (queries <= 0 || cluster >= live || (single && rank)) {
        if (EARLY) wait_for_previous_grid();  // a grid that ends before the one ahead lets the next one read too early
        return;
    }
    if (RECEIVE == 0 && !single) cluster_arrive();
    const int begin = first + (cluster * BLOCKS + rank) * each * 16, end = min(begin + each * 16, length);
    const int chunks = begin < end ? (end - begin + CHUNK - 1) / CHUNK : 0;

    // A warp brings rows warp, warp + 8, ... of a chunk; lane i knows the page of the i-th.
    const int* pages_of = table + (long)request * table_stride;
    auto key_of = [&](int chunk, int i) { return begin + chunk * CHUNK + warp + i * WARPS; };
    auto page_of = [&](int chunk) {
        const int key = key_of(chunk, lane);
        return lane < EACH && key < end ? __ldcg(pages_of + key / PAGE) : -1;
    };
    auto bring = [&](int chunk, int pages) {
#pragma unroll 2
        for (int i = 0; i < EACH; i++) {
            const int key = key_of(chunk, i), page = __shfl_sync(ALL, pages, i);
            const int row = chunk % STAGES * CHUNK + warp + i * WARPS;
            const long from = (long)page * page_stride + key % PAGE * token_stride + kv_head * head_stride;
#pragma unroll
            for (int j = 0; j < SIZE / 256; j++) {
                const int piece = j * 32 + lane;
                if (page >= 0) {
                    copy_16(keys + place(row, piece), k + from + piece * 8);
                    copy_16(values + place(row, piece), v + from + piece * 8);
                } else {  // weights of what is not there are zero, which the values must not make NaN
                    *reinterpret_cast<uint4*>(values + place(row, piece)) = make_uint4(0, 0, 0, 0);
                }
            }
        }
    };

    int pages[STAGES];
#pragma unroll
    for (int c = 0; c < STAGES; c++) pages[c] = page_of(c);
    if (EARLY == 2)
        for (int i = threadIdx.x; i < STAGES * CHUNK * 2; i += WARPS * 32) {
            const int key = begin + i / 2;
            if (key < end)
                into_l2((i % 2 ? v : k) + (long)__ldcg(pages_of + key / PAGE) * page_stride + key % PAGE * token_stride +
                        kv_head * head_stride);
        }
    if (EARLY) wait_for_previous_grid();
    if (warp < rows) {
        const u16* from = q + (long)(start + warp / GROUP) * q_stride + (kv_head * GROUP + warp % GROUP) * q_head_stride;
#pragma unroll
        for (int j = 0; j < SIZE / 256; j++) {
            const int piece = j * 32 + lane;
            copy_16(queries_at + place(warp, piece), from + piece * 8);
        }
    }
#pragma unroll
    for (int c = 0; c < STAGES; c++) {
        bring(c, pages[c]);
        end_of_copies();
    }
    int upcoming = page_of(STAGES);

    const float scale = __int_as_float(scale_bits);
    // A warp has a row to itself, and each lane a part of its sum of weights.
    float largest = minus_infinity(), total = 0.0f, acc[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) acc[m][0] = acc[m][1] = acc[m][2] = acc[m][3] = 0.0f;
    if (RECEIVE == 1 && !single && !chunks) cluster_arrive();
    for (int c = 0; c < chunks; c++) {
        const int from = begin + c * CHUNK, here = min((end - from + 15) / 16, TILES);
        const u16 *chunk_keys = keys + c % STAGES * CHUNK * SIZE, *chunk_values = values + c % STAGES * CHUNK * SIZE;
        if (STAGES == 1 || !c)
            wait_for_copies<STAGES - 1>();
        else
            wait_for_copies<(STAGES + 6) % 8>();  // all but STAGES - 2
        __syncthreads();
        if (STAGES > 1 && c) {  // nobody needs the chunk before any more
            if (c + STAGES - 1 < chunks) {
                bring(c + STAGES - 1, upcoming);
                upcoming = page_of(c + STAGES);
            }
            end_of_copies();
        }
        // Sixteen keys by eight rows, a share of the dimensions: a lane's 16 bytes are two fragments of either side.
        for (int at = warp; at < TILES * SPLIT; at += WARPS) {
            const int tile = at % TILES, share = at / TILES;
            if (tile >= here) continue;
            float sums[2][4] = {};
#pragma unroll
            for (int j = 0; j < SIZE / SPLIT / 32; j++) {
                const int piece = share * (SIZE / SPLIT / 8) + j * 4 + t;
                const uint4 low = *reinterpret_cast<const uint4*>(chunk_keys + place(tile * 16 + g, piece));
                const uint4 high = *reinterpret_cast<const uint4*>(chunk_keys + place(tile * 16 + g + 8, piece));
                const uint4 row = *reinterpret_cast<const uint4*>(queries_at + place(g, piece));
                const u32 a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
                mma(sums[0], a, row.x, row.y);
                mma(sums[1], b, row.z, row.w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                scores[(share * ROWS + t * 2 + i % 2) * SCORES + tile * 16 + g + i / 2 * 8] = sums[0][i] + sums[1][i];
        }
        __syncthreads();
        if (RECEIVE == 1 && !single && c + 1 == chunks) cluster_arrive();  // keys have been used
        if (warp < rows) {
            const int position = context + warp / GROUP;
            constexpr int MINE = (CHUNK + 31) / 32;
            float x[MINE], highest = minus_infinity(), sum = 0.0f;
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const int at = i * 32 + lane, key = from + at;
                x[i] = minus_infinity();
                if (at < CHUNK && key < end && key <= position && (!WINDOW || position - key < WINDOW)) {
                    float score = 0.0f;
#pragma unroll
                    for (int share = 0; share < SPLIT; share++) score += scores[(share * ROWS + warp) * SCORES + at];
                    x[i] = score * scale;
                }
                highest = fmaxf(highest, x[i]);
            }
#pragma unroll
            for (int mask = 16; mask; mask >>= 1) highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, mask));
            highest = fmaxf(highest, largest);
            const float base = finite(highest), fade = exp2f(largest - base);
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const float weight = exp2f(x[i] - base);
                sum += weight;
                if (i * 32 + lane < CHUNK) weights[warp * WEIGHTS + i * 32 + lane] = to_bf16(weight);
            }
            total = total * fade + sum, largest = highest;
            if (lane == 0) fades[warp] = fade;
        }
        __syncthreads();
        if (c) {
            const float even = fades[t * 2], odd = fades[t * 2 + 1];
#pragma unroll
            for (int m = 0; m < MT; m++) acc[m][0] *= even, acc[m][1] *= odd, acc[m][2] *= even, acc[m][3] *= odd;
        }
        for (int tile = 0; tile < here; tile++) {
            const u32* pair = reinterpret_cast<const u32*>(weights + g * WEIGHTS + tile * 16 + t * 2);
            const u32 b0 = pair[0], b1 = pair[4];
            const int key = tile * 16 + lane / 16 * 8 + lane % 8;
#pragma unroll
            for (int m = 0; m < MT; m++) {
                u32 a[4];
                load_transposed(a, chunk_values + place(key, (warp * MT + m) * 2 + lane / 8 % 2));
                mma(acc[m], a, b0, b1);
            }
        }
        if (STAGES == 1 && c + 1 < chunks) {
            __syncthreads();
            bring(c + 1, upcoming);
            end_of_copies();
            upcoming = page_of(c + 2);
        }
    }

#pragma unroll
    for (int mask = 16; mask; mask >>= 1) total += __shfl_xor_sync(ALL, total, mask);
    // Each row's largest score and sum to all blocks, an eighth of the dimensions to each.
    if (RECEIVE == 2) {
        if (single)
            __syncthreads();
        else
            cluster_arrive();
    }
    if (!single) cluster_wait();
    if (warp < rows && lane < (single ? 1 : BLOCKS)) {
        const u32 there = in_block(totals + (rank * ROWS + warp) * 2, single ? rank : lane);
        store_there(there, 0, largest), store_there(there, 1, total);
    }
    {
        // Alone a block keeps all, each warp's where another block's would be.
        const u32 there = in_block(received + (single ? warp : rank) * ROWS * SUMS, single ? rank : warp);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = t * 2 + i % 2;
            if (row < rows)
#pragma unroll
                for (int m = 0; m < MT; m++) store_there(there, row * SUMS + m * 16 + g + i / 2 * 8, acc[m][i]);
        }
    }
    auto write = [&](int row, int dim, float low, float high, float sum) {
        const float share = 1.0f / (sum > 0.0f ? sum : 1.0f);
        u16* to = out + (long)(start + row / GROUP) * out_stride + (kv_head * GROUP + row % GROUP) * out_head_stride + dim;
        *reinterpret_cast<u32*>(to) = to_bf16(low * share) | (u32)to_bf16(high * share) << 16;
    };
    if (single) {
        __syncthreads();
        for (int at = threadIdx.x; at < rows * (SIZE / 2); at += WARPS * 32) {
            const int row = at / (SIZE / 2), dim = at % (SIZE / 2) * 2;
            const float* sums = received + (dim / SLICE * ROWS + row) * SUMS + dim % SLICE;
            write(row, dim, sums[0], sums[1], totals[(rank * ROWS + row) * 2 + 1]);
        }
        return;
    }
    cluster_arrive();
    cluster_wait();
    const int line = ((request * (gridDim.y / clusters) + unit) * BLOCKS + rank) * clusters;
    for (int at = threadIdx.x; at < rows * (SLICE / 2); at += WARPS * 32) {
        const int row = at / (SLICE / 2), dim = at % (SLICE / 2) * 2;
        float highest = minus_infinity(), sum = 0.0f, low = 0.0f, high = 0.0f;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) highest = fmaxf(highest, totals[(b * ROWS + row) * 2]);
        const float base = finite(highest);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const float share = exp2f(totals[(b * ROWS + row) * 2] - base);
            const float* sums = received + (b * ROWS + row) * SUMS + dim;
            sum += share * totals[(b * ROWS + row) * 2 + 1], low += share * sums[0], high += share * sums[1];
        }
        if (live == 1) {
            write(row, rank * SLICE + dim, low, high, sum);
        } else {
            float* to = partial + ((long)(line + cluster) * ROWS + row) * (SLICE + 2);
            to[2 + dim] = low, to[3 + dim] = high;
            if (dim == 0) to[0] = highest, to[1] = sum;
        }
    }
    if (live == 1) return;
    // The last cluster to arrive adds up the clusters, always in the same order.
    u32* last = reinterpret_cast<u32*>(fades);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = atomicAdd(arrivals + line / clusters, 1u) == live - 1;
        if (*last) arrivals[line / clusters] = 0;
    }
    __syncthreads();
    if (!*last) return;
    __threadfence();
    for (int at = threadIdx.x; at < rows * (SLICE / 2); at += WARPS * 32) {
        const int row = at / (SLICE / 2), dim = at % (SLICE / 2) * 2;
        const float* of = partial + ((long)line * ROWS + row) * (SLICE + 2);
        constexpr long apart = ROWS * (SLICE + 2);
        float highest = minus_infinity(), sum = 0.0f, low = 0.0f, high = 0.0f;
        for (int c = 0; c < live; c++) highest = fmaxf(highest, __ldcg(of + c * apart));
        const float base = finite(highest);
        for (int c = 0; c < live; c++) {
            const float share = exp2f(__ldcg(of + c * apart) - base);
            sum += share * __ldcg(of + c * apart + 1);
            low += share * __ldcg(of + c * apart + 2 + dim), high += share * __ldcg(of + c * apart + 3 + dim);
        }
        write(row, rank * SLICE + dim, low, high, sum);
    }
}
