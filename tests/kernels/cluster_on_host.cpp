// Runs cluster_attention.cu on a CPU: a fiber per CUDA thread, the eight blocks of a cluster together, cluster by cluster.
// Every device function that the kernel takes from the hardware is given here in plain C++. Copies arrive when they are
// waited for; what the kernel ahead writes is there when all threads of the cluster have come to their wait for it.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#define CLUSTER_ATTENTION_ON_HOST
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim { int x, y, z; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::max;
using std::min;

static dim threadIdx, blockIdx, gridDim;

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started = false, done = false;
    std::unique_ptr<char[]> stack{new char[32768]};
    std::vector<std::pair<void*, uint4>> copies;
    std::deque<size_t> groups;  // how many copies each has
    size_t open = 0;
};
constexpr int THREADS = 256, FIBERS = 8 * THREADS;
static std::vector<Fiber> fibers(FIBERS);
static int running;
static jmp_buf scheduler;
static void (*body)();

static void enter() {
    body();
    fibers[running].done = true;
    _longjmp(scheduler, 1);
}
static void yield() {
    if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
}

struct Barrier {
    int needed, here = 0, turn = 0;
    int arrive() {
        const int mine = turn;
        if (++here == needed) here = 0, turn++;
        return mine;
    }
    void wait(int mine) {
        while (turn == mine) yield();
    }
    void operator()() { wait(arrive()); }
};
static Barrier blocks[8], warps[64], cluster_barrier, grid_barrier;
static int arrived[FIBERS];
static uint32_t exchange[64][32][6];
alignas(128) static unsigned char all_shared[8 * SHARED];
#define shared (all_shared + blockIdx.z * SHARED)

static int warp_of() { return running / 32; }
static int lane_of() { return running % 32; }
static void __syncthreads() { blocks[blockIdx.z](); }
static void __threadfence() {}
static unsigned atomicAdd(unsigned* at, unsigned value) { unsigned old = *at; *at += value; return old; }
template <class T> static T __ldcg(const T* at) { return *at; }
static float __int_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static uint16_t to_bf16(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static float half_of(unsigned pair, int i) { return __int_as_float((i ? pair >> 16 : pair) << 16); }

template <class T> static T shuffled(T value, int from) {
    std::memcpy(exchange[warp_of()][lane_of()], &value, 4);
    warps[warp_of()]();
    T got;
    std::memcpy(&got, exchange[warp_of()][from], 4);
    warps[warp_of()]();
    return got;
}
template <class T> static T __shfl_sync(unsigned, T value, int from) { return shuffled(value, from); }
template <class T> static T __shfl_xor_sync(unsigned, T value, int mask) { return shuffled(value, lane_of() ^ mask); }
static bool __any_sync(unsigned, bool is) {
    exchange[warp_of()][lane_of()][0] = is;
    warps[warp_of()]();
    bool any = false;
    for (int i = 0; i < 32; i++) any |= exchange[warp_of()][i][0];
    warps[warp_of()]();
    return any;
}

// mma.m16n8k16 as the PTX manual lays it out over the lanes of a warp.
static void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    auto all = exchange[warp_of()];
    const int lane = lane_of(), g = lane / 4, t = lane % 4;
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(all[lane], mine, 24);
    warps[warp_of()]();
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8, column = t * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            const int holder = k % 8 / 2, high = k / 8;
            d[i] += half_of(all[row % 8 * 4 + holder][high * 2 + row / 8], k % 2) * half_of(all[column * 4 + holder][4 + high], k % 2);
        }
    }
    warps[warp_of()]();
}
static void load_transposed(unsigned (&a)[4], const uint16_t* row) {
    auto all = exchange[warp_of()];
    const int lane = lane_of();
    std::memcpy(all[lane], row, 16);
    warps[warp_of()]();
    for (int m = 0; m < 4; m++) {
        uint16_t low, high;
        std::memcpy(&low, (char*)all[m * 8 + lane % 4 * 2] + lane / 4 * 2, 2);
        std::memcpy(&high, (char*)all[m * 8 + lane % 4 * 2 + 1] + lane / 4 * 2, 2);
        a[m] = low | (unsigned)high << 16;
    }
    warps[warp_of()]();
}

static void copy_16(uint16_t* to, const uint16_t* from) {
    uint4 now;
    std::memcpy(&now, from, 16);
    fibers[running].copies.push_back({to, now});
    fibers[running].open++;
}
static void into_l2(const uint16_t*) {}
static void end_of_copies() {
    fibers[running].groups.push_back(fibers[running].open);
    fibers[running].open = 0;
}
template <int PENDING> static void wait_for_copies() {
    auto& mine = fibers[running];
    while (mine.groups.size() > PENDING) {
        for (size_t i = 0; i < mine.groups[0]; i++) std::memcpy(mine.copies[i].first, &mine.copies[i].second, 16);
        mine.copies.erase(mine.copies.begin(), mine.copies.begin() + mine.groups[0]);
        mine.groups.pop_front();
    }
}

static void cluster_arrive() { arrived[running] = cluster_barrier.arrive(); }
static void cluster_wait() { cluster_barrier.wait(arrived[running]); }
static unsigned in_block(const void* here, int block) { return (const unsigned char*)here - shared + block * SHARED; }
static void store_there(unsigned there, int offset, float value) { std::memcpy(all_shared + there + offset * 4, &value, 4); }

struct Written {  // what the kernel ahead leaves in place of what was there
    void* to;
    const void *before, *after;
    size_t bytes;
};
static Written written[3];
static void let_next_grid_start() {}
static void wait_for_previous_grid() {
    if (grid_barrier.here + 1 == grid_barrier.needed)
        for (auto& w : written) std::memcpy(w.to, w.after, w.bytes);
    grid_barrier();
}

#include KERNEL

static struct {
    u16 *out, *q, *k, *v;
    const int *table, *lengths, *starts, *numbers;
    float* partial;
    u32* arrivals;
} given;

static void one_thread() {
    const int* n = given.numbers;
    cluster_attention(given.out, given.q, given.k, given.v, given.table, given.lengths, given.starts, given.partial,
                      given.arrivals, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10]);
}

// `numbers`: the kernel's last arguments. Of q, k and v what is there before the kernel ahead writes, and after.
extern "C" int run(u16* out, u16* q, u16* k, u16* v, const int* table, const int* lengths, const int* starts, float* partial,
                   u32* arrivals, const int* numbers, const void* q_before, const void* k_before, const void* v_before,
                   const void* q_after, const void* k_after, const void* v_after, long q_bytes, long cache_bytes, int requests,
                   int kv_heads) {
    given = {out, q, k, v, table, lengths, starts, numbers, partial, arrivals};
    written[0] = {q, q_before, q_after, (size_t)q_bytes};
    written[1] = {k, k_before, k_after, (size_t)cache_bytes};
    written[2] = {v, v_before, v_after, (size_t)cache_bytes};
    gridDim = {requests, kv_heads * numbers[9] * numbers[10], 8};
    body = one_thread;
    for (int y = gridDim.y - 1; y >= 0; y--)  // the last cluster first: who comes last must not matter
        for (int x = 0; x < gridDim.x; x++) {
            for (auto& w : written) std::memcpy(w.to, w.before, w.bytes);
            std::memset(all_shared, 0xFF, sizeof all_shared);
            for (auto& b : blocks) b = {THREADS};
            for (auto& b : warps) b = {32};
            cluster_barrier = {FIBERS}, grid_barrier = {FIBERS};
            for (auto& f : fibers) f.started = f.done = false, f.copies.clear(), f.groups.clear(), f.open = 0;
            for (long turns = 0, left = FIBERS; left; turns++) {
                if (turns > 1000000) return 1;  // somebody waits for ever
                left = 0;
                for (running = 0; running < FIBERS; running++) {
                    auto& f = fibers[running];
                    if (f.done) continue;
                    threadIdx = {running % THREADS, 0, 0}, blockIdx = {x, y, running / THREADS};
                    if (!_setjmp(scheduler)) {
                        if (f.started) _longjmp(f.at, 1);
                        f.started = true;
                        getcontext(&f.start);
                        f.start.uc_stack.ss_sp = f.stack.get(), f.start.uc_stack.ss_size = 32768;
                        makecontext(&f.start, enter, 0);
                        setcontext(&f.start);
                    }
                    left += !fibers[running].done;
                }
            }
        }
    return 0;
}
