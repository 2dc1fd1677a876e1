// Runs nvfp4_rows.cu, nvfp4_gated.cu or bf16_rows.cu on a CPU: a thread per CUDA thread, barriers for __syncthreads and for a warp's mma.
// Every device function that the kernel takes from the hardware is given here in plain C++.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define ROWS_ON_HOST
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim { int x, y, z; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static thread_local dim threadIdx, blockIdx;
static dim blockDim, gridDim;
static std::vector<std::unique_ptr<std::barrier<>>> block_barriers;  // of the blocks that run at once
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
static std::vector<uint32_t> exchange;  // per warp: 32 lanes x 6 registers of an mma
static float all_shared[8][24 * 16 * 4 * 32];  // of a cluster's blocks
static int in_cluster() { return block_barriers.size() > 1 ? blockIdx.z : 0; }
#define shared (all_shared[in_cluster()])

static void __syncthreads() { block_barriers[in_cluster()]->arrive_and_wait(); }
static void __syncwarp() {}
static void __threadfence() {}
static unsigned atomicAdd(unsigned* at, unsigned value) { unsigned old = *at; *at += value; return old; }
static uint4 __ldg(const uint4* at) { return *at; }
template <class T> static T __ldcg(const T* at) { return *at; }
static float __uint_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static unsigned float_as_uint(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t all = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(all >> (selector >> (4 * i) & 7) * 8 & 255) << (8 * i);
    return out;
}
static uint16_t to_bf16(float value) {
    unsigned bits = float_as_uint(value);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static float half_of(unsigned pair, int i) { return __uint_as_float((i ? pair >> 16 : pair) << 16); }
static unsigned times(unsigned a, unsigned b) {
    return to_bf16(half_of(a, 0) * half_of(b, 0)) | (unsigned)to_bf16(half_of(a, 1) * half_of(b, 1)) << 16;
}
static void let_next_grid_start() {}
static void wait_for_previous_grid() {}
template <class T> static T load_once(const T* at) { return *at; }
template <class T> static T load_early(const T* at) { return *at; }

// mma.m16n8k16 as the PTX manual lays it out over the lanes of a warp.
static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    int warp = in_cluster() * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t* all = exchange.data() + warp * 192;
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(all + lane * 6, mine, 24);
    warp_barriers[warp]->arrive_and_wait();
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, column = t * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            int holder = k % 8 / 2, high = k / 8;
            float w = half_of(all[(row % 8 * 4 + holder) * 6 + high * 2 + row / 8], k % 2);
            float x = half_of(all[(column * 4 + holder) * 6 + 4 + high], k % 2);
            d[i] += w * x;
        }
    }
    warp_barriers[warp]->arrive_and_wait();
}

// A cluster's barrier: all of its threads arrive, and wait apart from that.
static std::unique_ptr<std::barrier<>> cluster_barrier;
static thread_local std::unique_ptr<std::barrier<>::arrival_token> arrived;
static void cluster_arrive() { arrived = std::make_unique<std::barrier<>::arrival_token>(cluster_barrier->arrive()); }
static void cluster_wait() { cluster_barrier->wait(std::move(*arrived)); }
template <class T> static void store_in_block(T* here, T value, int block) {
    *(T*)((char*)all_shared[block] + ((char*)here - (char*)all_shared[in_cluster()])) = value;
}

// All blocks of a grid, a cluster along z at a time.
template <class Kernel> static void launch(int x, int y, int cluster, int warps, const Kernel& kernel) {
    gridDim = {x, y, cluster};
    blockDim = {warps * 32, 1, 1};
    exchange.resize(cluster * warps * 192);
    for (int by = 0; by < y; by++)
        for (int bx = 0; bx < x; bx++) {
            block_barriers.clear(), warp_barriers.clear();
            for (int b = 0; b < cluster; b++) block_barriers.push_back(std::make_unique<std::barrier<>>(warps * 32));
            for (int w = 0; w < cluster * warps; w++) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
            cluster_barrier = std::make_unique<std::barrier<>>(cluster * warps * 32);
            std::vector<std::thread> threads;
            for (int i = 0; i < cluster * warps * 32; i++)
                threads.emplace_back([=, &kernel] {
                    threadIdx = {i % (warps * 32), 0, 0};
                    blockIdx = {bx, by, i / (warps * 32)};
                    kernel();
                    block_barriers[in_cluster()]->arrive_and_drop();
                });
            for (auto& thread : threads) thread.join();
        }
}

#include ROWS_DEVICE_SOURCE

#ifdef BF16_ROWS_SOURCE
#include BF16_ROWS_SOURCE

extern "C" void run(const void* weight, const void* x, void* y, int tokens, int N, int K, int split) {
    const int slots = WARPS / split;
    launch((N / 16 / NT + slots - 1) / slots, 1, 1, WARPS,
           [=] { bf16_rows((const u16*)weight, (const u16*)x, (u16*)y, tokens, N, K, split); });
}
#else
#include NVFP4_ROWS_SOURCE

extern "C" void run(const void* codes, const void* scales, const void* x, const void* pre, void* y, const float* global_scale,
                    float* partial, unsigned* arrivals, int tokens, int N, int K, int warps, int split, int parts, const void* by,
                    int apart) {
    const int chunks = (tokens + 8 * MT - 1) / (8 * MT);
    launch(chunks * (N / 16 / NT / (warps / split)), parts, 1, warps, [=] {
        nvfp4_rows((const uint4*)codes, (const uint2*)scales, (const u16*)x, (const u16*)pre, (u16*)y, global_scale, partial,
                   arrivals, tokens, N, K, split, chunks, (const u16*)by, apart);
    });
}
#endif

#ifdef NVFP4_GATED_SOURCE
#include NVFP4_GATED_SOURCE

extern "C" void run_gated(const void* gate_codes, const void* gate_scales, const float* gate_scale, const void* codes,
                          const void* scales, const float* scale, const void* x, const void* by, void* y, int tokens, int K,
                          int apart) {
    launch((tokens + 8 * MT - 1) / (8 * MT), 1, 8, K / 256 * 2 / NT, [=] {
        nvfp4_gated((const uint4*)gate_codes, (const uint2*)gate_scales, gate_scale, (const uint4*)codes, (const uint2*)scales,
                    scale, (const u16*)x, (const u16*)by, (u16*)y, tokens, K, apart);
    });
}
#endif
