// Attention of a few queries per request over a paged KV cache in bfloat16, one cluster of eight blocks per request and KV
// head (sm_90 and newer): what two kernels did, one for parts of the keys and one for their sum.
//
// A block has an equal part of the keys that its request's queries see. Keys are the rows of the scores' mma.m16n8k16 and
// dimensions those of the output's, so that queries fill columns in eights: four rows of one query cost one tile, not a
// quarter of a larger one. Each warp ends with the sums of an eighth of the dimensions, and gives them to the block of
// the cluster that adds up just these.
//
// Compiled by NVRTC with SIZE (of a head: 256 or 512), GROUP (query heads of a KV head), WINDOW (keys that a query sees at
// most; 0: all), PAGE (tokens of a cache block), NT (tiles of eight rows, a row being a query and one of its heads), CHUNK
// (keys that are in shared memory at a time, a multiple of 16), STAGES (how many chunks), RECEIVE (where the other blocks'
// sums come to: 0 memory of their own, 1 over the keys, 2 over keys and values), ALONE (keys up to which one cluster takes
// a request) and EARLY (1: keys are asked for before the kernel ahead has ended, see below). Launched with
//
//   grid (requests, KV heads * clusters, 8), clusters of 8 along z, block 256, SHARED bytes of shared memory.
//
// EARLY. Launched programmatically, this kernel starts while kernels of its own pass still run. Up to its wait it reads
// what no kernel of the pass writes: lengths, block table and keys of earlier passes. Those are complete, as between two
// passes there are kernels without programmatic launch (new lengths and slots, inputs), which start when all before has
// ended. What the pass writes are the tokens behind each request's context; they may also lie in the prefix of
// another request that was scheduled at the same time. So a key is read early if it lies before its own request's queries
// and in no page that this pass writes for any request. All else, and every write, comes behind the wait.

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int BLOCKS = 8, WARPS = 8;  // one warp's dimensions are what one block adds up
constexpr int ROWS = NT * 8, SLICE = SIZE / BLOCKS, TILES = CHUNK / 16, EACH = CHUNK / WARPS, MT = SLICE / 16;
constexpr int SPLIT = TILES > 4 ? 1 : 8 / TILES;  // parts of a score's sum
constexpr int SCORES = CHUNK + 4, WEIGHTS = CHUNK + 8, SUMS = SLICE + 4;  // apart, so that lanes meet in no bank
constexpr bool READS_AHEAD = EARLY && ROWS / GROUP <= PAGE + 1;  // a request writes two pages at most

constexpr int K_AT = 0, V_AT = K_AT + STAGES * CHUNK * SIZE * 2, Q_AT = V_AT + STAGES * CHUNK * SIZE * 2;
constexpr int SCORES_AT = Q_AT + ROWS * SIZE * 2, WEIGHTS_AT = SCORES_AT + SPLIT * ROWS * SCORES * 4;
constexpr int FADES_AT = WEIGHTS_AT + ROWS * WEIGHTS * 2, TOTALS_AT = FADES_AT + ROWS * 4;
constexpr int OWN_AT = TOTALS_AT + BLOCKS * ROWS * 8, RECEIVED = BLOCKS * ROWS * SUMS * 4;
constexpr int RECEIVED_AT = RECEIVE ? K_AT : OWN_AT, NEEDED = OWN_AT + (RECEIVE ? 0 : RECEIVED);
static_assert(SIZE % 256 == 0 && CHUNK % 16 == 0 && CHUNK <= 256, "sizes");
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

extern "C" __global__ void __launch_bounds__(WARPS * 32) cluster_attention(
    u16* out,            // [tokens, heads, SIZE]
    const u16* q,        // [tokens, heads, SIZE]
    const u16* k,        // [blocks, PAGE, KV heads, SIZE]
    const u16* v,
    const int* table,    // [requests, pages]
    const int* lengths,  // [requests]: keys of a request, its queries' among them
    const int* starts,   // [requests + 1]: first token
    float* partial,      // [requests * KV heads * 8, clusters, ROWS, SLICE + 2], where clusters > 1
    u32* arrivals,       // [requests * KV heads * 8], zero before and after, where clusters > 1
    int scale_bits,      // of a score, times log2(e), as a float
    int requests, int table_stride, int q_stride, int q_head_stride, int out_stride, int out_head_stride, int page_stride,
    int token_stride, int head_stride, int clusters) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int request = blockIdx.x, rank = blockIdx.z;
    const int kv_head = clusters == 1 ? blockIdx.y : blockIdx.y / clusters, cluster = blockIdx.y - kv_head * clusters;
    u16 *keys = reinterpret_cast<u16*>(shared + K_AT), *values = reinterpret_cast<u16*>(shared + V_AT);
    u16 *queries_at = reinterpret_cast<u16*>(shared + Q_AT), *weights = reinterpret_cast<u16*>(shared + WEIGHTS_AT);
    float *scores = reinterpret_cast<float*>(shared + SCORES_AT), *fades = reinterpret_cast<float*>(shared + FADES_AT);
    float* totals = reinterpret_cast<float*>(shared + TOTALS_AT);      // [BLOCKS][ROWS][2]: largest score and sum
    float* received = reinterpret_cast<float*>(shared + RECEIVED_AT);  // [BLOCKS][ROWS][SUMS]

    let_next_grid_start();
    if (!READS_AHEAD) wait_for_previous_grid();
    const int start = __ldcg(starts + request), queries = __ldcg(starts + request + 1) - start;
    const int length = __ldcg(lengths + request), context = length - queries;
    const int first = WINDOW ? max(context - WINDOW + 1, 0) : 0;
    const int tiles = (max(length - first, 0) + 15) / 16, rows = min(queries * GROUP, ROWS);
    // Parts follow from the request alone: a row has the same bits whatever is beside it.
    int live = min(clusters, max((length - first + ALONE - 1) / ALONE, 1));
    const int each = max((tiles + live * BLOCKS - 1) / (live * BLOCKS), 1);
    live = max((tiles + each * BLOCKS - 1) / (each * BLOCKS), 1);
    const bool single = tiles <= 1;  // one block has all
    if (queries <= 0 || cluster >= live || (single && rank)) {
        if (READS_AHEAD) wait_for_previous_grid();  // a grid that ends before the one ahead would let the next one read too early
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
    auto bring = [&](int chunk, int pages, u32 which) {
#pragma unroll 2
        for (int i = 0; i < EACH; i++) {
            if (!(which >> i & 1)) continue;
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
    u32 ahead[STAGES];
#pragma unroll
    for (int s = 0; s < STAGES; s++) pages[s] = page_of(s), ahead[s] = 0;
    if (READS_AHEAD) {
        int written[4] = {-2, -2, -2, -2};  // pages that this pass writes, each lane's
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int other = lane + i * 32;
            if (other < requests) {
                const int all = __ldcg(lengths + other);
                const int before = max(all - __ldcg(starts + other + 1) + __ldcg(starts + other), 0);
                if (all > before) {
                    const int* of = table + (long)other * table_stride;
                    written[i * 2] = __ldcg(of + before / PAGE), written[i * 2 + 1] = __ldcg(of + (all - 1) / PAGE);
                }
            }
        }
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
#pragma unroll 2
            for (int i = 0; i < EACH; i++) {
                const int page = __shfl_sync(ALL, pages[s], i);
                const bool hit = page == written[0] || page == written[1] || page == written[2] || page == written[3];
                const bool is_written = __any_sync(ALL, hit);
                if (page >= 0 && key_of(s, i) < context && !is_written && requests <= 64) ahead[s] |= 1u << i;
            }
            bring(s, pages[s], ahead[s]);
            end_of_copies();
        }
        wait_for_previous_grid();
    }
    for (int row = warp; row < rows; row += WARPS) {
        const u16* from = q + (long)(start + row / GROUP) * q_stride + (kv_head * GROUP + row % GROUP) * q_head_stride;
#pragma unroll
        for (int j = 0; j < SIZE / 256; j++) {
            const int piece = j * 32 + lane;
            copy_16(queries_at + place(row, piece), from + piece * 8);
        }
    }
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        bring(s, pages[s], ~ahead[s]);
        end_of_copies();
    }
    int upcoming = page_of(STAGES);

    const float scale = __int_as_float(scale_bits);
    // A warp has rows warp, warp + 8, ... to itself, and each lane a part of their sums of weights.
    float largest[NT], total[NT], acc[MT][NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        largest[n] = minus_infinity(), total[n] = 0.0f;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] = 0.0f;
    }
    if (RECEIVE == 1 && !single && !chunks) cluster_arrive();
    for (int c = 0; c < chunks; c++) {
        const int from = begin + c * CHUNK, here = min((end - from + 15) / 16, TILES);
        const u16 *chunk_keys = keys + c % STAGES * CHUNK * SIZE, *chunk_values = values + c % STAGES * CHUNK * SIZE;
        wait_for_copies<STAGES - 1>();
        __syncthreads();
        // Sixteen keys by eight rows, a share of the dimensions: a lane's 16 bytes are two fragments of either side.
        for (int unit = warp; unit < TILES * SPLIT; unit += WARPS) {
            const int tile = unit % TILES, share = unit / TILES;
            if (tile >= here) continue;
            float sums[NT][4];
#pragma unroll
            for (int n = 0; n < NT; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
#pragma unroll
            for (int j = 0; j < SIZE / SPLIT / 32; j++) {
                const int piece = share * (SIZE / SPLIT / 8) + j * 4 + t;
                const uint4 low = *reinterpret_cast<const uint4*>(chunk_keys + place(tile * 16 + g, piece));
                const uint4 high = *reinterpret_cast<const uint4*>(chunk_keys + place(tile * 16 + g + 8, piece));
                const u32 a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const uint4 row = *reinterpret_cast<const uint4*>(queries_at + place(n * 8 + g, piece));
                    mma(sums[n], a, row.x, row.y);
                    mma(sums[n], b, row.z, row.w);
                }
            }
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    scores[(share * ROWS + n * 8 + t * 2 + i % 2) * SCORES + tile * 16 + g + i / 2 * 8] = sums[n][i];
        }
        __syncthreads();
        if (RECEIVE == 1 && !single && c + 1 == chunks) cluster_arrive();  // keys have been used
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int row = n * 8 + warp;
            if (row >= rows) break;
            const int position = context + row / GROUP;
            constexpr int MINE = (CHUNK + 31) / 32;
            float x[MINE], highest = minus_infinity(), sum = 0.0f;
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const int at = i * 32 + lane, key = from + at;
                x[i] = minus_infinity();
                if (at < CHUNK && key < end && key <= position && (!WINDOW || position - key < WINDOW)) {
                    float score = 0.0f;
#pragma unroll
                    for (int share = 0; share < SPLIT; share++) score += scores[(share * ROWS + row) * SCORES + at];
                    x[i] = score * scale;
                }
                highest = fmaxf(highest, x[i]);
            }
#pragma unroll
            for (int mask = 16; mask; mask >>= 1) highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, mask));
            highest = fmaxf(highest, largest[n]);
            const float base = finite(highest), fade = exp2f(largest[n] - base);
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                const float weight = exp2f(x[i] - base);
                sum += weight;
                if (i * 32 + lane < CHUNK) weights[row * WEIGHTS + i * 32 + lane] = to_bf16(weight);
            }
            total[n] = total[n] * fade + sum, largest[n] = highest;
            if (lane == 0) fades[row] = fade;
        }
        __syncthreads();
        if (c)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float fade = fades[n * 8 + t * 2 + i % 2];
#pragma unroll
                    for (int m = 0; m < MT; m++) acc[m][n][i] *= fade;
                }
        for (int tile = 0; tile < here; tile++) {
            u32 b[NT][2];
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const u32* pair = reinterpret_cast<const u32*>(weights + (n * 8 + g) * WEIGHTS + tile * 16 + t * 2);
                b[n][0] = pair[0], b[n][1] = pair[4];
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
                u32 a[4];
                const int key = tile * 16 + lane / 16 * 8 + lane % 8;
                load_transposed(a, chunk_values + place(key, (warp * MT + m) * 2 + lane / 8 % 2));
#pragma unroll
                for (int n = 0; n < NT; n++) mma(acc[m][n], a, b[n][0], b[n][1]);
            }
        }
        if (c + STAGES < chunks) {
            __syncthreads();
            bring(c + STAGES, upcoming, ALL);
            upcoming = page_of(c + STAGES + 1);
        }
        end_of_copies();
    }

#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int mask = 16; mask; mask >>= 1) total[n] += __shfl_xor_sync(ALL, total[n], mask);
    // Each row's largest score and sum to all blocks, an eighth of the dimensions to each.
    if (RECEIVE == 2) {
        if (single)
            __syncthreads();
        else
            cluster_arrive();
    }
    if (!single) cluster_wait();
    if (lane < (single ? 1 : BLOCKS)) {
        const u32 there = in_block(totals + rank * ROWS * 2, single ? rank : lane);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int row = n * 8 + warp;
            if (row < rows) store_there(there, row * 2, largest[n]), store_there(there, row * 2 + 1, total[n]);
        }
    }
    {
        // Alone a block keeps all, each warp's where another block's would be.
        const u32 there = in_block(received + (single ? warp : rank) * ROWS * SUMS, single ? rank : warp);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = n * 8 + t * 2 + i % 2;
                if (row < rows)
#pragma unroll
                    for (int m = 0; m < MT; m++) store_there(there, row * SUMS + m * 16 + g + i / 2 * 8, acc[m][n][i]);
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
    const int line = ((request * (gridDim.y / clusters) + kv_head) * BLOCKS + rank) * clusters;
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
