// Runs all_reduce_norm.cu on a CPU: a process per rank with memory in common, a thread per CUDA thread, block after block.
// Every device function that the kernel takes from the hardware is given here in plain C++.
//
//   program CALLS ROWS < inputs > outputs
//
// inputs: weight, next weight, scale (as many values), then per call the residual and each rank's part; outputs: per rank and
// call hidden and normed. Call n has ROWS - n % 3 rows.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define ALL_REDUCE_NORM_ON_HOST
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim { int x, y, z; };
static thread_local dim threadIdx, blockIdx;
static dim blockDim;
static std::barrier<> block_barrier((WIDTH / 8 + 31) / 32 * 32);
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
static float lanes[1024];

static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static void __syncthreads() { block_barrier.arrive_and_wait(); }
static float __uint_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
static unsigned bf16(float f) {
    unsigned bits;
    std::memcpy(&bits, &f, 4);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
static unsigned two_bf16(float low, float high) { return bf16(low) | bf16(high) << 16; }
static std::atomic_ref<unsigned> word(const uint4* at, int i) {
    return std::atomic_ref<unsigned>(reinterpret_cast<unsigned*>(const_cast<uint4*>(at))[i]);
}
static uint4 load_word_by_word(const uint4* at) {
    std::this_thread::yield();
    return {word(at, 0), word(at, 1), word(at, 2), word(at, 3)};
}
static void store_word_by_word(uint4* at, const uint4& v) {  // words arrive singly
    word(at, 3) = v.w;
    if (threadIdx.x % 5 == 0) std::this_thread::yield();
    word(at, 2) = v.z, word(at, 1) = v.y, word(at, 0) = v.x;
}
static float sum_of_warp(float value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int mask = 16; mask; mask >>= 1) {
        lanes[threadIdx.x] = value;
        warp_barriers[warp]->arrive_and_wait();
        value += lanes[warp * 32 + (lane ^ mask)];
        warp_barriers[warp]->arrive_and_wait();
    }
    return value;
}
template <class T> static T load_early(const T* at) { return *at; }
static void let_next_grid_start() {}
static void wait_for_previous_grid() {}

#include KERNEL

typedef std::vector<u16> Values;

static const uint4* row_of(const Values& v) { return reinterpret_cast<const uint4*>(v.data()); }

static Values read_values(int count) {
    Values v(count + 8);  // what a uint4 wants aligned is: the allocator gives 16 bytes
    if (fread(v.data(), 2, count, stdin) != (size_t)count) exit(2);
    return v;
}

int main(int, char** argv) {
    const int calls = atoi(argv[1]), most = atoi(argv[2]), words = 3 * ROWS * WIDTH / 2, size = most * WIDTH;
    const int threads = (WIDTH / 8 + 31) / 32 * 32;
    Values weight = read_values(WIDTH), next = read_values(WIDTH), scale = read_values(WIDTH);
    std::vector<Values> inputs;
    for (int i = 0; i < 3 * calls; i++) inputs.push_back(read_values(size));
    const size_t bytes = (words + ROWS) * 4;
    u32* memory[2];
    u16* results[2];
    for (int rank = 0; rank < 2; rank++) {
        memory[rank] = (u32*)mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        results[rank] = (u16*)mmap(0, 4ll * calls * size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        blockDim.x = 1;
        for (int i = 0; i < words + ROWS; i++) {
            blockIdx.x = i, threadIdx.x = 0;
            all_reduce_norm_reset(memory[rank], words);
        }
    }
    for (int rank = 0; rank < 2; rank++) {
        if (fork()) continue;
        for (int i = 0; i < threads / 32; i++) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
        std::vector<std::thread> running;
        for (int t = 0; t < threads; t++)
            running.emplace_back([&, t] {
                threadIdx.x = t;
                for (int call = 0; call < calls; call++)
                    for (blockIdx.x = 0; blockIdx.x < most - call % 3; blockIdx.x++) {
                        u16* to = results[rank] + 2ll * call * size;
                        all_reduce_norm(row_of(inputs[3 * call + 1 + rank]), row_of(weight), row_of(inputs[3 * call]),
                                        scale.data(), row_of(next), (uint4*)to, (uint4*)(to + size), (uint4*)memory[rank],
                                        (uint4*)memory[1 - rank], memory[rank] + words);
                        __syncthreads();  // a block's shared memory is its own
                    }
            });
        for (auto& t : running) t.join();
        _exit(0);
    }
    int status, failed = 0;
    while (wait(&status) > 0) failed |= status;
    for (int rank = 0; rank < 2; rank++) fwrite(results[rank], 2, 2ll * calls * size, stdout);
    return failed ? 1 : 0;
}
