// Runs nvfp4_stream.cu on a CPU: a thread per CUDA thread, one block after the other (all at once with a low-rank branch or SPREAD,
// whose blocks wait for each other), copies that are done at once.
// Every device function that the kernel takes from the hardware is given here in plain C++.
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#define NVFP4_STREAM_ON_HOST
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(n)
#define __align__(n)

struct uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct dim { int x, y, z; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static thread_local dim threadIdx, blockIdx;
static dim blockDim, gridDim;
struct Arrivals { std::atomic<int> left, phase; int wanted; };
struct State {  // of a block
    explicit State(int threads) : whole(threads), exchange(threads / 32 * 192) {
        for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<std::barrier<>>(32));
        for (int w = 0; w < 8; w++) pairs.push_back(std::make_unique<std::barrier<>>(64));
    }
    alignas(1024) unsigned char memory[232448];
    std::barrier<> whole;
    std::vector<std::unique_ptr<std::barrier<>>> warps, pairs;
    std::vector<uint32_t> exchange;  // per warp: 32 lanes x 6 words
    Arrivals barriers[64];           // one for every 8 bytes from the first on
};
static thread_local State* state;
#define shared state->memory
static unsigned first_barrier;

static unsigned address(const void*) { return 0; }
static Arrivals& at_barrier(unsigned barrier) { return state->barriers[(barrier - first_barrier) / 8]; }
static void init_barrier(unsigned barrier, unsigned arrivals) {
    Arrivals& b = at_barrier(barrier);
    b.left = b.wanted = arrivals, b.phase = 0;
}
static void arrive(unsigned barrier) {
    Arrivals& b = at_barrier(barrier);
    if (b.left.fetch_sub(1) != 1) return;
    b.left = b.wanted, b.phase++;
    b.phase.notify_all();
}
static void arrive_with_copies(unsigned barrier) { arrive(barrier); }
static void wait(unsigned barrier, unsigned parity) {
    std::atomic<int>& phase = at_barrier(barrier).phase;
    for (int now = phase; (unsigned)(now & 1) == parity; now = phase) phase.wait(now);
    // A warp goes on together, as on a GPU: a lane left behind by two phases would wait for ever.
    state->warps[threadIdx.x / 32]->arrive_and_wait();
}
static void copies_finish() {}
static void prefetch(const void*) {}
static void copy_x(unsigned to, const void* from, bool there) {
    there ? (void)std::memcpy(shared + to, from, 16) : (void)std::memset(shared + to, 0, 16);
}
static void one_arrives(unsigned barrier) {
    if (threadIdx.x % 32 == 0 && barrier) arrive(barrier);
}
static uint2 load_codes(unsigned at) { return *(const uint2*)(shared + at); }
static unsigned load_scales(unsigned at) { return *(const unsigned*)(shared + at); }
static unsigned cycles() { static thread_local unsigned now; return now += 100; }
static bool is_full(unsigned barrier, unsigned parity) { return (at_barrier(barrier).phase & 1) != (int)parity; }
static void rest() { std::this_thread::yield(); }
static unsigned kept(unsigned value) { return value; }
struct Map { const unsigned char* data; int columns, rows, bytes; };
#define MAP Map
static void prepare(const Map&) {}
static void bring_tile(unsigned at, const Map& codes, const Map& scales, int column, int step, unsigned barrier,
                       unsigned long long);
static void bring_x(unsigned at, const Map& x, int k, unsigned barrier);
static uint4 load(const void* from) { return *(const uint4*)from; }
static void reread(float&) {}
static unsigned this_thread() { return threadIdx.x; }
static unsigned shift_right_8(unsigned value) { return value >> 8; }
template <int COUNT> static void give_registers() {}
template <int COUNT> static void take_registers() {}
static void pair_meets(int pair) { state->pairs[pair]->arrive_and_wait(); }
static void __syncthreads() { state->whole.arrive_and_wait(); }
static void __syncwarp() { state->warps[threadIdx.x / 32]->arrive_and_wait(); }
static void let_next_grid_start() {}
static void wait_for_previous_grid() {}
static void publish_barriers() {}
static unsigned long long leaves_first() { return 0; }
static unsigned count_arrival(unsigned* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }
static void announce(unsigned* counter, unsigned last) {
    unsigned before = __atomic_load_n(counter, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(counter, &before, before >= last ? 0 : before + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
}
static unsigned arrivals_at(const unsigned* counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }
static unsigned hidden(unsigned constant, unsigned zero) { return constant | zero; }
static float4 __ldcg(const float4* at) { return *at; }
static void __stcg(float4* at, float4 v) { *at = v; }
static float as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
static float __uint_as_float(unsigned bits) { return as_float(bits); }
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static unsigned __shfl_sync(unsigned, unsigned value, int lane) {
    uint32_t* all = state->exchange.data() + threadIdx.x / 32 * 192;
    all[threadIdx.x % 32] = value;
    __syncwarp();
    unsigned out = all[lane];
    __syncwarp();
    return out;
}
static uint16_t to_bf16(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static float half_of(unsigned pair, int i) { return as_float((i ? pair >> 16 : pair) << 16); }
static unsigned times(unsigned a, unsigned b) {
    return to_bf16(half_of(a, 0) * half_of(b, 0)) | (unsigned)to_bf16(half_of(a, 1) * half_of(b, 1)) << 16;
}
static unsigned times_low(unsigned a, unsigned both) { return times(a, (both & 0xFFFF) | both << 16); }
static unsigned times_high(unsigned a, unsigned both) { return times(a, (both & 0xFFFF0000u) | both >> 16); }

// ldmatrix.x4 and mma.m16n8k16 as the PTX manual lays them out over the lanes of a warp.
static void load_matrices(unsigned (&v)[4], unsigned at) {
    uint32_t* all = state->exchange.data() + threadIdx.x / 32 * 192;
    int lane = threadIdx.x % 32;
    all[lane] = at;
    __syncwarp();
    for (int i = 0; i < 4; i++) std::memcpy(&v[i], shared + all[i * 8 + lane / 4] + lane % 4 * 4, 4);
    __syncwarp();
}
static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t* all = state->exchange.data() + threadIdx.x / 32 * 192;
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(all + lane * 6, mine, 24);
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, column = t * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            int holder = k % 8 / 2, high = k / 8;
            d[i] += half_of(all[(row % 8 * 4 + holder) * 6 + high * 2 + row / 8], k % 2) *
                    half_of(all[(column * 4 + holder) * 6 + 4 + high], k % 2);
        }
    }
    __syncwarp();
}

// A warp's quarter of wgmma.m64nNk16: the first operand from registers, the second as a matrix descriptor tells: eight
// rows of 128 bytes behind each other, their 16-byte pieces swapped by bits 7 to 9 of the address. It runs as late as it
// may, so that a stage given back too early is filled again before it is read.
struct Product {
    float (*d)[4];
    unsigned a[4];
    unsigned long long matrix;
    int group;
};
static thread_local std::deque<Product> products;
static thread_local int groups;
static void multiply_now(const Product&);
static void mma_begins() {}
static void mma_commits() { groups++; }
static void mma_async(float (&d)[MT][4], const unsigned (&a)[4], unsigned long long matrix) {
    products.push_back({d, {a[0], a[1], a[2], a[3]}, matrix, groups});
}
template <int LEFT> static void mma_finishes() {
    for (; !products.empty() && products.front().group < groups - LEFT; products.pop_front()) multiply_now(products.front());
    __syncwarp();
}
static void multiply_now(const Product& product) {
    const auto& [d, a, matrix, group] = product;
    if (matrix >> 62 != 1 || (matrix >> 32 & 0x3FFF) != 1024 / 16) std::abort();
    const unsigned at = (matrix & 0x3FFF) * 16;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t* all = state->exchange.data() + threadIdx.x / 32 * 192;
    std::memcpy(all + lane * 6, a, 16);
    __syncwarp();
    for (int m = 0; m < MT; m++)
        for (int i = 0; i < 4; i++) {
            int row = g + i / 2 * 8, column = t * 2 + i % 2;
            for (int k = 0; k < 16; k++) {
                unsigned from = at + m * 1024 + column * 128 + k * 2;
                unsigned short x;
                std::memcpy(&x, shared + (from ^ (from >> 7 & 7) << 4), 2);
                d[m][i] += half_of(all[(row % 8 * 4 + k % 8 / 2) * 6 + k / 8 * 2 + row / 8], k % 2) * as_float((unsigned)x << 16);
            }
        }
    __syncwarp();
}

#include NVFP4_STREAM_SOURCE

static void bring_tile(unsigned at, const Map& codes, const Map& scales, int column, int step, unsigned barrier,
                       unsigned long long) {
    const auto copy = [&](unsigned to, const Map& from) {
        for (int s = 0; s < STEPS; s++)
            for (int c = 0; c < COLUMNS; c++) {
                unsigned char* at = shared + to + (s * COLUMNS + c) * from.bytes;
                if (step + s >= from.rows || column + c >= from.columns) std::memset(at, 0, from.bytes);
                else std::memcpy(at, from.data + ((long)(step + s) * from.columns + column + c) * from.bytes, from.bytes);
            }
    };
    copy(at + CODES_AT, codes);
    copy(at + SCALES_AT, scales);
    arrive(barrier);
}

static void bring_x(unsigned at, const Map& x, int k, unsigned barrier) {
    for (int row = 0; row < MT * 8; row++)
        for (int piece = 0; piece < DEPTH / 8; piece++) {
            const bool there = row < x.rows && k + piece * 8 < x.columns;
            copy_x(at + x_piece(row, piece), x.data + ((long)row * x.columns + k + piece * 8) * 2, there);
        }
    arrive(barrier);
}

extern "C" void run(const void* codes, const void* scales, const void* x, const void* pre, void* y,
                    const float* global_scale, float* partial, unsigned* arrivals, int rows, int N, int K,
                    int blocks, const void* down, const void* up, float* branch_parts, void* branch_t, unsigned* met) {
    gridDim = {blocks, 1, 1};
    blockDim = {THREADS, 1, 1};
    first_barrier = BARRIERS_AT;
    std::vector<std::unique_ptr<State>> states;
    std::vector<std::thread> threads;
    for (int block = 0; block < blocks; block++) {
        states.push_back(std::make_unique<State>(THREADS));
        for (int i = 0; i < THREADS; i++)
            threads.emplace_back([=, mine = states.back().get()] {
                threadIdx = {i, 0, 0};
                blockIdx = {block, 0, 0};
                state = mine;
                const Map of_codes = {(const unsigned char*)codes, N, K / 16, 8};
                const Map of_scales = {(const unsigned char*)scales, N, K / 16, 1};
                nvfp4_stream(of_codes, of_scales,
#if SCALED
                             (const u16*)x, (const u16*)pre,
#else
                             Map{(const unsigned char*)x, K, rows, 2},
#endif
#if RANK
                             (const u16*)x, (const u16*)down, (const u16*)up, branch_parts, (u16*)branch_t, met,
#endif
                             (u16*)y, global_scale, partial, arrivals, rows, N, K);
            });
        if ((RANK || SPREAD) && block + 1 < blocks) continue;
        for (auto& thread : threads) thread.join();
        threads.clear(), states.clear();
    }
}
