// y[m, n] = sum_k x[m, k] * W[n, k] for up to 128 rows m and NVFP4 weights W in Marlin's order (sm_90 and newer).
//
// A decode step is bound by reading its weights, so the grid is one block per multiprocessor, each with an equal
// share of the weights, and warps of a block do nothing but copy: they fill a ring of stages in shared memory while the
// others multiply, two groups of eight warps, each every other stage. Nothing drains where one tile of outputs ends and
// the next begins.
//
// Marlin packs weights as the B operand of mma.m16n8k16; the same four registers are its A operand for 16 outputs
// and 16 inputs, and a warp's part of the A operand of Hopper's wgmma.m64nNk16. So weights go in as A and the rows of x
// as B, which wgmma reads from shared memory by itself. W's codes times their block scale are exact in bfloat16 (two
// significand bits times four).
//
// Blocks that share a tile of outputs leave their parts of its sums in memory. The last one to arrive adds them up, or
// (SPREAD) all do, each some rows, and wait for each other's. They may: all blocks of the grid run at once, or will
// without them, as there are no more than multiprocessors and the next grid's start after them. (Two such grids at once,
// each with half of the multiprocessors, would wait for ever: see stream_gemm.spreads.)
//
// Which inputs are added up in which order depends on the shape and on the grid, never on the number of rows, so a
// row's result has the same bits whatever rows stand beside it.
//
// With a low-rank branch (RANK) y is x W^T + t up^T, t = x down^T. Warps of their own compute t while the others stream
// weights: a warp a slice of inputs, whose sums it leaves in memory; then a warp a row, which adds up the slices in their
// order and rounds t to bfloat16; then each block takes t into shared memory, long before a tile ends. They wait for those
// of other blocks, too. The block that begins a tile adds t up^T to its part of it.
//
// With GELU y is gelu(first half) * second half of the outputs. Tiles are read as gate 0, up 0, gate 1, up 1, ..., so that the
// two that belong together are few blocks'. All their parts go to memory, whoever has them, and are added up together: what
// is said above of the blocks of a tile holds for those of a pair.
//
// Compiled by NVRTC with the macros of stream_gemm.macros: MT (tiles of 8 rows), SCALED (1, without WGMMA: x is multiplied
// by pre_quant_scale first, each product rounded to bfloat16), RANK (of the branch, a multiple of 32; 0: none), GELU (1: as
// above; N is a multiple of 512), WGMMA (1 on Hopper: needs mma_async, see stream_gemm.py), SPREAD (1: as above) and a
// Form's fields.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define COLUMNS 256  // outputs of a tile
#define DEPTH 128    // inputs of a stage
#define STEPS (DEPTH / 16)
#define WARPS (8 * GROUPS)  // that multiply: 8 times 32 outputs
#define COPIERS (WGMMA ? 128 : RANK ? 96 : 64)  // a warp asks for weights, another for x; wgmma has fours of warps
#define BRANCH_WARPS (COPIERS / 32 - 2)  // what is left of them
#define CHUNK 2  // steps whose operands are in registers before they are needed
#define HANDOVER (WGMMA && (MT >= 6 || !RANK))  // of registers; what each warp starts with goes by THREADS
#define COPIER_REGISTERS (RANK ? (GROUPS == 1 ? 104 : 64) : 32)
#define OTHER_REGISTERS (GROUPS == 2 ? (RANK ? 104 : 112) : RANK ? 200 : 232)
#define FEW (GROUPS == 1 ? 3 : 4)  // parts of a tile; with few and with many: items and parts that a warp loads at a time
#define FEW_PARTS (GROUPS == 1 ? 10 : MT == 1 ? 2 : 4), FEW
#define MANY_PARTS (GROUPS == 1 ? 3 : MT == 1 || SPREAD ? 2 : 4), (MT == 1 || SPREAD ? 8 : 4)
#define BOTH_FEW (GROUPS == 1 ? 5 : 4)  // parts of a pair of tiles; items and parts that a warp loads at a time, as above
#define BOTH_FEW_PARTS (GROUPS == 1 ? 7 : MT == 1 || !WGMMA ? 2 : MT >= 6 ? 3 : 4), BOTH_FEW
#define BOTH_MANY_PARTS (GROUPS == 1 ? 4 : 2), (MT >= 6 || !WGMMA && MT > 1 ? 6 : 8)
#define TOGETHER (1 + GELU)  // tiles that are added up together
#define THREADS (WARPS * 32 + COPIERS)
#define CODES_AT 0
#define SCALES_AT (STEPS * COLUMNS * 8)
#define X_AT (SCALES_AT + STEPS * COLUMNS)
#define X_PART (MT * 1024)  // bytes of 64 inputs of all rows: 128 a row, their 16-byte pieces swapped about by row
#define PRE_AT (X_AT + DEPTH / 64 * X_PART)  // pre_quant_scale
#define STAGE_BYTES (PRE_AT + (SCALED ? DEPTH * 2 : 0))
#define SUMS_AT (STAGES * STAGE_BYTES)
#define SUMS 2048  // floats that the warps of one group hand to the other's, per tile of 8 rows
#define BARRIERS_AT (SUMS_AT + (GROUPS - 1) * 2 * SUMS * 4)
#define THERE_AT (BARRIERS_AT + 16 * STAGES)  // the barrier that t is there
#if SCALED && (WGMMA || RANK)
#error "wgmma and the branch read x as it lies in memory"
#endif
#if GELU && (SCALED || RANK)
#error "an activation stands behind neither pre_quant_scale nor a branch"
#endif
#if RANK
#define T_AT (THERE_AT + 16)              // [8 * MT, RANK] bfloat16
#define UP_AT (T_AT + MT * 8 * RANK * 2)  // of the tile that this block has begun: as each lane needs it
#define SLICES 64                         // of the inputs at most: as many as 32 lanes add up in two rounds
#define PAIR (MT == 1 ? 1 : 2)            // tiles of 8 rows that a warp takes at a time
#define BRANCH_DEEP (HANDOVER && GROUPS == 2 ? 1 : MT == 1 ? 3 : 2)  // 32 inputs each, loaded at a time
#endif

#ifndef NVFP4_STREAM_ON_HOST  // a test gives the functions below in plain C++ and runs the kernel on a CPU

extern __shared__ __align__(1024) unsigned char shared[];

__device__ __forceinline__ u32 address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// One lane of the warp arrives; none where the barrier is 0. By predicate: behind a branch ptxas would wait for every wgmma
// of the kernel (C7513).
__device__ __forceinline__ void one_arrives(u32 barrier) {
    asm volatile(
        "{\n.reg .pred there, one;\nsetp.ne.u32 there, %0, 0;\nelect.sync _|one, 0xFFFFFFFF;\nand.pred one, one, there;\n"
        "@one mbarrier.arrive.shared.b64 _, [%0];\n}" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copies_finish() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

__device__ __forceinline__ uint4 load(const void* from) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}

// 16 bytes, or as many zeros where `there` is not.
__device__ __forceinline__ void copy_x(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

struct alignas(64) Map {  // CUtensorMap
    u64 opaque[16];
};
#define MAP const __grid_constant__ Map

// A stage's codes and scales: 256 outputs from `column` and 128 inputs from `step * 16`; zeros where there are none. They
// pass by once, so they may leave the L2 first.
__device__ __forceinline__ void bring_tile(u32 at, const Map& codes, const Map& scales, int column, int step, u32 barrier, u64 policy) {
    arrive_expecting(barrier, STEPS * COLUMNS * 9);
    const auto copy = [&](u32 to, const Map& from) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], "
            "%5;" ::"r"(to), "l"(&from), "r"(column), "r"(step), "r"(barrier), "l"(policy)
            : "memory");
    };
    copy(at + CODES_AT, codes);
    copy(at + SCALES_AT, scales);
}

// 128 inputs of all rows from `k` on, their pieces swapped as x_piece() says; zeros where there are none.
__device__ __forceinline__ void bring_x(u32 at, const Map& x, int k, u32 barrier) {
    arrive_expecting(barrier, DEPTH / 64 * X_PART);
#pragma unroll
    for (int part = 0; part < DEPTH / 64; part++)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                at + X_AT + part * X_PART), "l"(&x), "r"(k + part * 64), "r"(0), "r"(barrier)
            : "memory");
}

// A copy waits less for a map that is there.
__device__ __forceinline__ void prepare(const Map& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

__device__ __forceinline__ u32 cycles() {
    u32 v;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(v));
    return v;
}

__device__ __forceinline__ bool is_full(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}

__device__ __forceinline__ void rest() { asm volatile("nanosleep.u32 40;"); }

// From shared memory: after the last wait, before the next arrival. Nothing else keeps them where they stand.
__device__ __forceinline__ uint2 load_codes(u32 at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}

__device__ __forceinline__ u32 load_scales(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}

// The compiler keeps the value in a register: it would compute it anew for every stage.
__device__ __forceinline__ u32 kept(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Arrive when all copies that this thread has started are done.
__device__ __forceinline__ void arrive_with_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// The two warps of 32 outputs wait for each other.
__device__ __forceinline__ void pair_meets(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory"); }

__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrices(u32 (&v)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at));
}

#if WGMMA
__device__ __forceinline__ void mma_begins() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void mma_commits() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT> __device__ __forceinline__ void mma_finishes() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
#endif

// The value may have changed behind the compiler's back.
__device__ __forceinline__ void reread(float& value) { asm volatile("" : "+f"(value)::"memory"); }

// Warps that copy leave registers to those that multiply.
template <int COUNT> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Asked anew: threadIdx.x stays in a register.
__device__ __forceinline__ u32 this_thread() {
    u32 v;
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(v));
    return v;
}

__device__ __forceinline__ u32 shift_right_8(u32 value) {
    u32 v;
    asm("shr.b32 %0, %1, %2;" : "=r"(v) : "r"(value), "n"(8));
    return v;
}

// A constant that the compiler does not know and so keeps in a register: an instruction takes one by itself.
__device__ __forceinline__ u32 hidden(u32 constant, u32 zero) {
    u32 v;
    asm volatile("or.b32 %0, %1, %2;" : "=r"(v) : "r"(constant), "r"(zero));
    return v;
}

__device__ __forceinline__ u16 to_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Programmatic dependent launch: where the launch allows it, this grid starts while the one before it still runs.
__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ u64 leaves_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Publishes what this warp has written before, and makes visible what those that counted earlier have.
__device__ __forceinline__ u32 count_arrival(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// The same for a warp that need not know who was there: one more, zero behind `last`.
__device__ __forceinline__ void announce(u32* counter, u32 last) {
    asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(counter), "r"(last) : "memory");
}

__device__ __forceinline__ u32 arrivals_at(const u32* counter) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    return v;
}

// a * {b, b} for the low or the high half b of `both`, which the multiplication selects by itself.
__device__ __forceinline__ u32 times_low(u32 a, u32 both) {
    u32 d;
    asm("{\n.reg .b16 low, high;\n.reg .b32 pair;\nmov.b32 {low, high}, %2;\nmov.b32 pair, {low, low};\n"
        "mul.rn.bf16x2 %0, %1, pair;\n}" : "=r"(d) : "r"(a), "r"(both));
    return d;
}

__device__ __forceinline__ u32 times_high(u32 a, u32 both) {
    u32 d;
    asm("{\n.reg .b16 low, high;\n.reg .b32 pair;\nmov.b32 {low, high}, %2;\nmov.b32 pair, {high, high};\n"
        "mul.rn.bf16x2 %0, %1, pair;\n}" : "=r"(d) : "r"(a), "r"(both));
    return d;
}

#endif

// E2M1 codes 0 and 4, or 1 and 5, of a word of eight as bfloat16: a code's value times 2^-126. One multiplication puts a
// code where its sign belongs and where its other bits do.
__device__ __forceinline__ u32 decode_even(u32 word) { return (word & 0x000F000Fu) * 0x1040u & 0x81C081C0u; }

__device__ __forceinline__ u32 decode_odd(u32 word) { return (word & 0x00F000F0u) * 0x104u & 0x81C081C0u; }

// Where 16 bytes of a row of x lie in a stage, and what wgmma is told of it: 128 bytes a row, eight rows in turn, their
// pieces swapped (128-byte swizzle).
__device__ __forceinline__ u32 x_piece(int row, int piece) {
    return X_AT + piece / 8 * X_PART + row * 128 + (piece % 8 ^ row % 8) * 16;
}

__device__ __forceinline__ u64 x_matrix(u32 at_16) { return (u64)(1u << 30 | 64u) << 32 | ((1u << 16) + at_16); }

// Two of Marlin's scale bytes (5 bits of exponent, 3 of mantissa; value scale * 2^7), bytes 0 and 2, as bfloat16 times
// 2^96 more. The top bit of a byte is set unless the scale is zero, and then the codes are (see stream_gemm.py).
// `shifted`: four bits to the left; `top`: 0x70007000.
__device__ __forceinline__ u32 scales_of(u32 shifted, u32 top) { return (shifted & 0x07F007F0u) | top; }

// Of the tiles in the order in which they are read, where its outputs begin.
__device__ __forceinline__ int column_of(int tile, int N) {
    return GELU ? tile / 2 * COLUMNS + tile % 2 * (N / 2) : tile * COLUMNS;
}

__device__ __forceinline__ float rounded(float value) { return __uint_as_float((u32)to_bf16(value) << 16); }

__device__ __forceinline__ float gelu_tanh(float v) {
    return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
}

struct Share {  // units of one block: a unit is a stage's worth of inputs of one tile of outputs
    int first, last;
};

__device__ __forceinline__ Share share_of(int block, int blocks, int units) {
    return {(int)((u32)units * block / blocks), (int)((u32)units * (block + 1) / blocks)};  // of 10^11 weights at most
}

// The block whose share holds this unit.
__device__ __forceinline__ int block_of(int unit, int blocks, int units) {
    return (int)(((u32)(unit + 1) * blocks - 1) / units);
}

// Of the 64 outputs of two warps each takes half, by turns of eight lanes.
__device__ __forceinline__ int outputs_of(int place) { return (place / 32 ^ place / 8 % 2) * 32; }

// Where a lane's sums go; lanes `place` of both groups have the same outputs. An item are four sums: rows item / 2 * 8 + t * 2
// and the next, times two outputs g and g + 8 of the 16 that item % 2 says.
struct Results {
    float4* parts;
    u16* y;
    float scale;
    int rows, N, place, outputs;

    // Of the p-th of the blocks that share a tile: its last tile where it is the first of them, else its first.
    __device__ __forceinline__ float4* part(int first, int p, int item) const {
        const u32 slot = (((first + p) * 2 + !p) * MT + item / 2) * 2 + item % 2;
        return parts + (slot * (SUMS / 8) + place);
    }

    // With GELU a block may have tiles between its first and its last. From one part to the next, in their order, its block
    // or its tile is another, or both: no two have the same sum of the two.
    __device__ __forceinline__ float4* part_at(int block_and_tile, int item) const {
        return parts + (((u32)block_and_tile * MT * 2 + item) * (SUMS / 8) + place);
    }

    __device__ __forceinline__ void write_gated(int pair, int item, const float4& gate, const float4& up) const {
        const int row = item / 2 * 8 + place % 4 * 2, apart = N / 2;
        u16* at = y + (long)row * apart + pair * COLUMNS + outputs + item % 2 * 16 + place % 32 / 4;
        const auto gated = [&](float g, float u) { return to_bf16(gelu_tanh(rounded(g * scale)) * rounded(u * scale)); };
        if (row < rows) at[0] = gated(gate.x, up.x), at[8] = gated(gate.z, up.z);
        if (row + 1 < rows) at[apart] = gated(gate.y, up.y), at[apart + 8] = gated(gate.w, up.w);
    }

    __device__ __forceinline__ void write(int tile, int item, const float4& v) const {
        const int column = tile * COLUMNS + outputs, row = item / 2 * 8 + place % 4 * 2;
        if (column >= N) return;
        u16* at = y + (long)row * N + column + item % 2 * 16 + place % 32 / 4;
        if (row < rows) at[0] = to_bf16(v.x * scale), at[8] = to_bf16(v.z * scale);
        if (row + 1 < rows) at[N] = to_bf16(v.y * scale), at[N + 8] = to_bf16(v.w * scale);
    }
};

__device__ __forceinline__ Results results_of(int place, float* partial, u16* y, const float* global_scale, int rows, int N) {
    const float scale = *global_scale * 1.262177448353619e-29f;  // 2^-96
    return {reinterpret_cast<float4*>(partial), y, scale, rows, N, place, outputs_of(place)};
}

// Sum of `count` parts for every `apart`-th item from `begin` on. A load takes a microsecond: ITEMS * DEEP of them at a time.
template <int ITEMS, int DEEP, class Part, class Write>
__device__ __forceinline__ void add_parts(int begin, int apart, int items, int count, const Part& part, const Write& write) {
#pragma unroll 1
    for (int item = begin; item < items; item += ITEMS * apart) {
        float4 sum[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; i++) sum[i] = make_float4(0, 0, 0, 0);
#pragma unroll 1
        for (int p = 0; p < count; p += DEEP) {
            float4 v[DEEP][ITEMS];
#pragma unroll
            for (int d = 0; d < DEEP; d++)
#pragma unroll
                for (int i = 0; i < ITEMS; i++) {  // where there are fewer, one again: no branch between loads
                    const int one = item + i * apart;
                    v[d][i] = __ldcg(part(p + d < count ? p + d : count - 1, one < items ? one : item));
                }
#pragma unroll
            for (int d = 0; d < DEEP; d++)
#pragma unroll
                for (int i = 0; i < ITEMS; i++)
                    if (p + d < count) {
                        const float4& b = v[d][i];
                        sum[i].x += b.x, sum[i].y += b.y, sum[i].z += b.z, sum[i].w += b.w;
                    }
        }
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (item + i * apart < items) write(item + i * apart, sum[i]);
    }
}

__device__ __forceinline__ void add_tile(const Results& of, int tile, int first, int count, int begin, int apart) {
    const auto from = [&](int p, int item) { return of.part(first, p, item); };
    const auto to = [&](int item, const float4& v) { of.write(tile, item, v); };
    const int items = (of.rows + 7) / 8 * 2;
    if (count > FEW) add_parts<MANY_PARTS>(begin, apart, items, count, from, to);
    else add_parts<FEW_PARTS>(begin, apart, items, count, from, to);
}

#if GELU
struct Parts {  // of a pair of tiles: gate's, then up's
    int at, gates, gap, count;  // gap: whether the first of up's is another block's than the last of gate's

    __device__ __forceinline__ int operator[](int p) const { return at + p + (p >= gates ? gap : 0); }
};

__device__ __forceinline__ Parts parts_of(int pair, int first, int last, int per_tile, int units) {
    const int middle = (pair * 2 + 1) * per_tile;
    const int ends = block_of(middle - 1, gridDim.x, units), begins = block_of(middle, gridDim.x, units);
    return {first + pair * 2, ends - first + 1, begins - ends, last - first + 2 - (begins - ends)};
}

__device__ __forceinline__ void add(float4& to, const float4& v) { to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w; }

// As add_parts, of both tiles; ONCE: there are no more than DEEP parts.
template <bool ONCE, int ITEMS, int DEEP>
__device__ __forceinline__ void add_both(const Results& of, int pair, const Parts& parts, int begin, int apart, int items) {
#pragma unroll 1
    for (int item = begin; item < items; item += ITEMS * apart) {
        float4 gate[ITEMS], up[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; i++) gate[i] = up[i] = make_float4(0, 0, 0, 0);
#pragma unroll 1
        for (int p = 0; p < (ONCE ? 1 : parts.count); p += DEEP) {
            float4 v[DEEP][ITEMS];
#pragma unroll
            for (int d = 0; d < DEEP; d++)
#pragma unroll
                for (int i = 0; i < ITEMS; i++) {
                    const int one = item + i * apart;
                    v[d][i] = __ldcg(of.part_at(parts[p + d < parts.count ? p + d : parts.count - 1], one < items ? one : item));
                }
#pragma unroll
            for (int d = 0; d < DEEP; d++) {
                if (p + d < parts.gates) {
#pragma unroll
                    for (int i = 0; i < ITEMS; i++) add(gate[i], v[d][i]);
                } else if (p + d < parts.count) {
#pragma unroll
                    for (int i = 0; i < ITEMS; i++) add(up[i], v[d][i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if (item + i * apart < items) of.write_gated(pair, item + i * apart, gate[i], up[i]);
    }
}

__device__ __forceinline__ void add_pair(const Results& of, int pair, const Parts& parts, int begin, int apart) {
    const int items = (of.rows + 7) / 8 * 2;
    if (parts.count > BOTH_FEW) add_both<false, BOTH_MANY_PARTS>(of, pair, parts, begin, apart, items);
    else add_both<true, BOTH_FEW_PARTS>(of, pair, parts, begin, apart, items);
}
#endif

#if RANK
// The branch's t = x down^T. The order of additions depends on K alone.
struct Branch {
    const u16 *x, *down, *up;  // [rows, K], [RANK, K], [N, RANK] bfloat16
    float* parts;              // [SLICES, 8 * MT, RANK]
    u16* t;                    // [rows, RANK] bfloat16
    u32* met;                  // slices that are there, rows that are; zero before and after
    int rows, K;
};

__device__ __forceinline__ void meet(const u32* counter, u32 wanted, int lane) {
    if (lane == 0)
        while (arrivals_at(counter) < wanted) rest();
    __syncwarp();
}

// One slice of the inputs for PAIR tiles of 8 rows. Of 32 inputs lane t of four takes eight, as both operands of mma.
__device__ __forceinline__ void add_slice(const Branch& of, int slice, int from, int to, int tile, int lane) {
    const int g = lane / 4, t = lane % 4;
    const uint4 none = make_uint4(0, 0, 0, 0);
    float sum[RANK / 16][PAIR][4];
#pragma unroll
    for (int j = 0; j < RANK / 16 * PAIR * 4; j++) sum[j / (4 * PAIR)][j / 4 % PAIR][j % 4] = 0.0f;
#pragma unroll 1
    for (int c = from; c < to; c += BRANCH_DEEP) {
        uint4 a[BRANCH_DEEP][RANK / 8], b[BRANCH_DEEP][PAIR];
#pragma unroll
        for (int d = 0; d < BRANCH_DEEP; d++) {
            const long k = (c + d < to ? c + d : to - 1) * 32 + t * 8;
#pragma unroll
            for (int j = 0; j < RANK / 8; j++) a[d][j] = load(of.down + (long)(j * 8 + g) * of.K + k);
#pragma unroll
            for (int m = 0; m < PAIR; m++) {
                const int row = (tile + m) * 8 + g;
                b[d][m] = row < of.rows ? load(of.x + (long)row * of.K + k) : none;
            }
        }
#pragma unroll
        for (int d = 0; d < BRANCH_DEEP; d++) {
            if (c + d >= to) break;
#pragma unroll
            for (int j = 0; j < RANK / 16; j++) {
                const uint4 &low = a[d][j * 2], &high = a[d][j * 2 + 1];
                const u32 one[4] = {low.x, high.x, low.y, high.y}, other[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                for (int m = 0; m < PAIR; m++) {
                    mma(sum[j][m], one, b[d][m].x, b[d][m].y);
                    mma(sum[j][m], other, b[d][m].z, b[d][m].w);
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < RANK / 16; j++)
#pragma unroll
        for (int m = 0; m < PAIR; m++) {
            const int row = (tile + m) * 8 + t * 2;
            float* at = of.parts + ((long)slice * MT * 8 + row) * RANK + j * 16 + g;
            if (row < of.rows) at[0] = sum[j][m][0], at[8] = sum[j][m][2];
            if (row + 1 < of.rows) at[RANK] = sum[j][m][1], at[RANK + 8] = sum[j][m][3];
        }
}

// t of one row: a lane adds up four of 32 values over a quarter of the slices.
__device__ __forceinline__ void add_row(const Branch& of, int row, int slices, int lane) {
#pragma unroll 1
    for (int r = 0; r < RANK; r += 32) {
        const float* from = of.parts + (long)row * RANK + r + lane % 8 * 4;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
        for (int p = lane / 8 * (SLICES / 4), end = p + SLICES / 4; p < end; p += 8) {
            float4 v[8];
#pragma unroll
            for (int d = 0; d < 8; d++)
                v[d] = __ldcg(reinterpret_cast<const float4*>(from + (long)(p + d < slices ? p + d : slices - 1) * MT * 8 * RANK));
#pragma unroll
            for (int d = 0; d < 8; d++)
                if (p + d < slices) sum.x += v[d].x, sum.y += v[d].y, sum.z += v[d].z, sum.w += v[d].w;
        }
#pragma unroll
        for (int apart = 8; apart <= 16; apart *= 2) {
            const auto plus = [&](float& v) {
                v += __uint_as_float(__shfl_sync(0xFFFFFFFFu, __float_as_uint(v), (lane + apart) % 32));
            };
            plus(sum.x), plus(sum.y), plus(sum.z), plus(sum.w);
        }
        if (lane < 8) {
            u32* to = reinterpret_cast<u32*>(of.t + (long)row * RANK + r + lane * 4);
            to[0] = (u32)to_bf16(sum.y) << 16 | to_bf16(sum.x), to[1] = (u32)to_bf16(sum.w) << 16 | to_bf16(sum.z);
        }
    }
}

// Warp `which` of the block's; `outputs`, `some`: those of its tiles.
__device__ __forceinline__ void branch(const Branch& of, int which, int lane, int output, int outputs, u32 there) {
    const int all = gridDim.x * BRANCH_WARPS, me = gridDim.x * which + blockIdx.x;
    const int inputs = of.K / 32, each = (inputs + SLICES - 1) / SLICES, slices = (inputs + each - 1) / each;
    const int tasks = slices * ((of.rows + PAIR * 8 - 1) / (PAIR * 8));
    // No kernel before this one writes weights: what comes from memory is on its way while it ends.
    if (me < tasks)
        for (int i = lane; i < RANK * each; i += 32) {
            const int k = (me % slices * each + i / RANK) * 32;
            if (k < of.K) prefetch(of.down + (long)(i % RANK) * of.K + k);
        }
    for (int i = (which * 32 + lane) * 64; i < outputs * RANK; i += BRANCH_WARPS * 32 * 64)
        prefetch(of.up + (long)output * RANK + i);
    wait_for_previous_grid();
    for (int task = me; task < tasks; task += all) {
        const int slice = task % slices, from = slice * each;
        add_slice(of, slice, from, from + each < inputs ? from + each : inputs, task / slices * PAIR, lane);
        __syncwarp();
        if (lane == 0) count_arrival(of.met);
    }
    for (int row = me; row < of.rows; row += all) {
        meet(of.met, tasks, lane);
        add_row(of, row, slices, lane);
        __syncwarp();
        if (lane == 0) count_arrival(of.met + 1);
    }
    if (which) return;
    meet(of.met + 1, of.rows, lane);
    for (int i = lane; i < of.rows * RANK / 8; i += 32)
        *reinterpret_cast<uint4*>(shared + T_AT + i * 16) = load(of.t + i * 8);
    __syncwarp();
    if (lane == 0) {
        arrive(there);
        if (count_arrival(of.met + 1) == of.rows + gridDim.x - 1) of.met[0] = 0, of.met[1] = 0;  // all have met twice
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) nvfp4_stream(
    MAP codes,   // [K / 16, N] words of eight bytes, Marlin's order
    MAP scales,  // [K / 16, N] bytes, Marlin's order
#if !SCALED
    MAP x,  // [rows, K] bfloat16
#else
    const u16* x,    // [rows, K] bfloat16
    const u16* pre,  // [K] bfloat16
#endif
#if RANK
    const u16* x_rows, const u16* down, const u16* up, float* branch_parts, u16* branch_t, u32* met,  // see Branch
#endif
    u16* y,                     // [rows, N] bfloat16; with GELU [rows, N / 2]
    const float* global_scale,  // [1], Marlin's: weight_scale_2 * 2^119 / scale_factor
    float* partial,             // [blocks, 2, MT, 2, 8, 32, 4]: a block's part of its first and of its last tile; with
                                // GELU [blocks + tiles - 1, MT, ...]: of every tile, see Results::part_at
    u32* arrivals,              // [tiles of outputs, or pairs, 8], zero before and after
    int rows, int N, int K) {
    const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    // Multiples of 64; what the last tile and the last stage of a tile lack stays as it is in shared memory, x zero.
    const int per_tile = (K + DEPTH - 1) / DEPTH, units = (N + COLUMNS - 1) / COLUMNS * per_tile;
    const Share mine = share_of(blockIdx.x, gridDim.x, units);
    const u32 base = address(shared), full = base + BARRIERS_AT, empty = full + 8 * STAGES;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            init_barrier(full + 8 * s, 1 + (SCALED ? 32 : 1));  // weights; x
            init_barrier(empty + 8 * s, WARPS / GROUPS);
        }
        init_barrier(base + THERE_AT, 1);
        publish_barriers();
    }
    __syncthreads();
    let_next_grid_start();

    if (warp >= WARPS) {
#if HANDOVER
        give_registers<COPIER_REGISTERS>();
#endif
        const int p = threadIdx.x - WARPS * 32, count = mine.last - mine.first;
#if RANK
        if (p >= 64) {
            const int output = mine.first / per_tile * COLUMNS, end = (mine.last + per_tile - 1) / per_tile * COLUMNS;
            const Branch of = {x_rows, down, up, branch_parts, branch_t, met, rows, K};
            branch(of, p / 32 - 2, lane, output, (end < N ? end : N) - output, base + THERE_AT);
            return;
        }
#endif
        int tile = mine.first / per_tile, block = mine.first % per_tile, stage = 0, parity = 1;
        const u64 policy = leaves_first();
        const auto bring_weights = [&]() {
            if (p == 0)
                bring_tile(base + stage * STAGE_BYTES, codes, scales, column_of(tile, N), block * STEPS, full + 8 * stage, policy);
        };
        const auto next = [&]() {
            if (++block == per_tile) block = 0, tile++;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        };
        if (p == 0) prepare(codes), prepare(scales);
        // No kernel before this one writes weights: the first are on their way while it ends.
        if (p < 32) {
            u32 last = 0;
            for (int i = 0; i < count; i++) {
                if (i >= STAGES) wait(empty + 8 * stage, parity);
                __syncwarp();  // a lane left two phases behind would wait for ever
#if PACE  // little by little until x is there: what that kernel reads would queue behind them, and x
                if (i >= FIRST && i < STAGES)
                    while (cycles() - last < PACE && !is_full(full, 0)) rest();
                last = cycles();
#endif
                bring_weights();
                next();
            }
            return;
        }
        if (p >= 64) return;
#if !SCALED
        if (p == 32) prepare(x);
#endif
        wait_for_previous_grid();
        for (int i = 0; i < count; i++) {
            if (i >= STAGES) wait(empty + 8 * stage, parity);
            __syncwarp();
            const u32 at = base + stage * STAGE_BYTES;
#if !SCALED
            if (p == 32) bring_x(at, x, block * DEPTH, full + 8 * stage);
#else
            const int piece = p % 16, k = block * DEPTH + piece * 8, from = k < K ? k : 0;
#pragma unroll
            for (int j = 0; j < MT * 4; j++) {
                const int row = j * 2 + p / 16 % 2;
                if (row < rows) copy_x(at + x_piece(row, piece), x + (long)row * K + from, k < K);
            }
            if (p < 48) copy_x(at + PRE_AT + piece * 16, pre + from, k < K);
            arrive_with_copies(full + 8 * stage);
#endif
            next();
        }
        return;
    }

#if HANDOVER
    take_registers<OTHER_REGISTERS>();
#endif
    const int g = lane / 4, part_n = warp % 8, part_k = warp / 8;
    float acc[2][MT][4];
#pragma unroll
    for (int j = 0; j < 2 * MT * 4; j++) acc[j / (4 * MT)][j / 4 % MT][j % 4] = 0.0f;
    // Where this lane's share of a step lies: two words of codes, four scales. Of the 64 outputs of two warps each takes
    // half, by turns of eight lanes, so that 16 lanes read from all banks.
    const int outputs = outputs_of(threadIdx.x % 256);
    const u32 codes_at = kept(base + CODES_AT + part_n / 2 * 512 + lane * 16 + outputs / 4 % 16);
    const u32 scales_at = kept(base + SCALES_AT + part_n / 2 * 64 + g * 8 + outputs / 8 % 8);
    const u32 top = hidden(0x70007000u, (u32)rows >> 31);
    // A multiplication: with GELU ptxas shifts on the unit that decoding keeps busy, else it multiplies by itself.
    const u32 sixteen = GELU ? hidden(16u, (u32)rows >> 31) : 16u;
#if WGMMA
    const u32 x_at_16 = (base + X_AT) >> 4;
#else
    // Four matrices at a time: two steps of eight rows, or one of sixteen.
    const u32 x_at =
        kept(base + (MT == 1 ? x_piece(lane % 8, lane / 8) : x_piece(lane / 16 * 8 + lane % 8, lane / 8 % 2)));
#endif
    float* sums = reinterpret_cast<float*>(shared + SUMS_AT) + (part_n * 32 + lane) * 4;

    const Results results = results_of(threadIdx.x % 256, partial, y, global_scale, rows, N);
    // Blocks that share a tile, or a pair.
    const int per_sum = per_tile * TOGETHER;
    const auto first_of = [&](int tile) { return block_of(tile * per_sum, gridDim.x, units); };
    const auto count_of = [&](int tile, int first) {
        return block_of((tile + 1) * per_sum - 1, gridDim.x, units) - first + 1;
    };
#if RANK
    // Where this lane's share of `up` lies: eight values of one of its outputs. Nobody else reads or writes it.
    const auto up_at = [&](int eight, int r) { return UP_AT + ((part_n * 4 + eight) * (RANK / 32) + r) * 512 + lane * 16; };
    const auto bring_up = [&](int tile) {
        // Asked anew: `lane` would take a register until here, and they are scarce at a tile's end.
        const int again = this_thread() % 32, column = tile * COLUMNS + outputs;
#pragma unroll
        for (int i = 0; i < 4 * (RANK / 32); i++) {
            const int eight = i % 4, r = i / 4;
            const long from = (long)(column < N ? column + eight * 8 + again / 4 : 0) * RANK + r * 32 + again % 4 * 8;
            copy_x(base + up_at(eight, r), up + from, column < N);
        }
    };
    const auto add_branch = [&](float4& sum, int item, float per_scale) {
        const int t = lane % 4;
        float add[4] = {0, 0, 0, 0};
#pragma unroll
        for (int r = 0; r < RANK / 32; r++) {
            const uint4 b = *reinterpret_cast<const uint4*>(shared + T_AT + ((item / 2 * 8 + g) * RANK + r * 32 + t * 8) * 2);
            const uint4* of = reinterpret_cast<const uint4*>(shared + up_at(item % 2 * 2, r));
            const uint4 low = of[0], high = of[RANK];
            const u32 one[4] = {low.x, high.x, low.y, high.y}, other[4] = {low.z, high.z, low.w, high.w};
            mma(add, one, b.x, b.y);
            mma(add, other, b.z, b.w);
        }
        sum.x = __fmaf_rn(add[0], per_scale, sum.x), sum.y = __fmaf_rn(add[1], per_scale, sum.y);
        sum.z = __fmaf_rn(add[2], per_scale, sum.z), sum.w = __fmaf_rn(add[3], per_scale, sum.w);
    };
#endif

    const auto decode = [&](u32 (&a)[2][4], const uint2& words, u32 bytes) {
#pragma unroll
        for (int q = 0; q < 2; q++) {
            const u32 word = q ? words.y : words.x, high = shift_right_8(word);
            const u32 both = scales_of(q ? bytes >> 4 : bytes * sixteen, top);
            a[q][0] = times_low(decode_even(word), both);
            a[q][1] = times_high(decode_even(high), both);
            a[q][2] = times_low(decode_odd(word), both);
            a[q][3] = times_high(decode_odd(high), both);
        }
    };
#if !WGMMA
    struct Operands {  // of a chunk of a stage's steps
        uint2 words[CHUNK];
        u32 bytes[CHUNK], in[MT == 1 ? CHUNK / 2 : CHUNK * MT / 2][4], by[SCALED ? CHUNK / 2 : 1][4];
    };
    const auto fetch = [&](Operands& to, u32 here, int chunk) {
#pragma unroll
        for (int s = 0; s < CHUNK; s++) {
            const int step = chunk * CHUNK + s;
            to.words[s] = load_codes(here + codes_at + step * (COLUMNS * 8));
            to.bytes[s] = load_scales(here + scales_at + step * COLUMNS);
            if (MT == 1 && s % 2 == 0) load_matrices(to.in[s / 2], here + (x_at ^ step % 4 * 32) + step / 4 * X_PART);
#pragma unroll
            for (int m = 0; m < MT / 2; m++)
                load_matrices(to.in[s * (MT / 2) + m], here + (x_at ^ step % 4 * 32) + step / 4 * X_PART + m * 2048);
            if (SCALED && s % 2 == 0)
                load_matrices(to.by[s / 2], here + base + PRE_AT + (step * 2 + lane / 8) * 16);
        }
    };
    const auto multiply = [&](const Operands& of) {
#pragma unroll
        for (int s = 0; s < CHUNK; s++) {
            u32 a[2][4];
            decode(a, of.words[s], of.bytes[s]);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                u32 b0 = MT == 1 ? of.in[s / 2][s % 2 * 2] : of.in[s * (MT / 2) + m / 2][m % 2 * 2];
                u32 b1 = MT == 1 ? of.in[s / 2][s % 2 * 2 + 1] : of.in[s * (MT / 2) + m / 2][m % 2 * 2 + 1];
                if (SCALED) b0 = times(b0, of.by[s / 2][s % 2 * 2]), b1 = times(b1, of.by[s / 2][s % 2 * 2 + 1]);
#pragma unroll
                for (int q = 0; q < 2; q++) mma(acc[q][m], a[q], b0, b1);
            }
        }
    };
#endif

    int tile = mine.first / per_tile, block = mine.first % per_tile, passed = 0, buffer = 0;
    for (int left = mine.last - mine.first; left > 0;) {
#if RANK
        if (block == 0 && !part_k) bring_up(tile);
#endif
        const int whole = per_tile - block, stages = whole < left ? whole : left;
        left -= stages;
        // Of a tile's stages in turn each is another group's: by where it stands in the tile, not in this share.
        const int turn = (part_k + block) % GROUPS;
        u32 stage = (passed + turn) % STAGES, parity = (passed + turn) / STAGES & 1;
        passed += stages;
        const auto next = [&]() {
            stage += GROUPS;
            if (stage >= STAGES) stage -= STAGES, parity ^= 1;
        };
#if !WGMMA
        const auto leave = [&](u32 stage) {  // it may be filled again
            __syncwarp();
            if (lane == 0) arrive(empty + 8 * stage);
        };
        Operands one, other;
        if (turn < stages) {
            wait(full + 8 * stage, parity);
            fetch(one, stage * STAGE_BYTES, 0);
        }
#pragma unroll 1
        for (int i = turn; i < stages; i += GROUPS) {
            u32 here = stage * STAGE_BYTES;
#pragma unroll
            for (int c = 1; c < STEPS / CHUNK; c++) {
                fetch(c % 2 ? other : one, here, c);
                if (c + 1 < STEPS / CHUNK) multiply(c % 2 ? one : other);
            }
            leave(stage);
            multiply(one);
            next();
            if (i + GROUPS < stages) {
                wait(full + 8 * stage, parity);
                fetch(one, stage * STAGE_BYTES, 0);
            }
            multiply(other);
        }
#else
        const auto leave = [&](u32 barrier) {  // its stage may be filled again
            __syncwarp();
            one_arrives(barrier);
        };
        // `empty` barrier of the stage before, whose last product still runs while this one's first is made ready; 0: none.
        u32 ended = 0;
#pragma unroll 1
        for (int i = turn; i < stages; i += GROUPS) {
            wait(full + 8 * stage, parity);
            const u32 from = codes_at + stage * STAGE_BYTES, scales_from = scales_at + stage * STAGE_BYTES;
            uint2 words = load_codes(from);
            u32 bytes = load_scales(scales_from);
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                u32 a[2][4];
                decode(a, words, bytes);
                if (s + 1 < STEPS) {  // the next step's are on their way while this one's are multiplied
                    words = load_codes(from + (s + 1) * COLUMNS * 8);
                    bytes = load_scales(scales_from + (s + 1) * COLUMNS);
                }
                const u64 rows_of_x = x_matrix(x_at_16 + stage * (STAGE_BYTES / 16) + s / 4 * (X_PART / 16) + s % 4 * 2);
                mma_begins();
                mma_async(acc[0], a[0], rows_of_x);
                mma_async(acc[1], a[1], rows_of_x);
                mma_commits();
                mma_finishes<1>();  // the step before: its registers are free again
                if (s == 0) leave(ended);
            }
            ended = empty + 8 * stage;
            next();
        }
        mma_finishes<0>();
        leave(ended);
#endif

        // The tile ends here, or this block's share does: add up what both groups have, then all parts.
#if !GELU
        const int first = first_of(tile), count = count_of(tile, first);
#endif
#if RANK
        const bool begun = first == blockIdx.x && !part_k;
        const float per_scale = 1.0f / results.scale;  // sums are multiplied by it when all parts are added up
        if (begun) {
            wait(base + THERE_AT, 0);
            copies_finish();
        }
#endif
#pragma unroll
        for (int m = 0; m < MT; m++) {
            if (m * 8 >= rows) break;
#pragma unroll
            for (int j = 0; j < 8; j++) reread(acc[j / 4][m][j % 4]);
#if GROUPS == 2
            float* here = sums + buffer * SUMS;  // two in turn, so that one meeting each is enough
            buffer ^= 1;
            if (part_k) {
#pragma unroll
                for (int q = 0; q < 2; q++)
                    *reinterpret_cast<float4*>(here + q * (SUMS / 2)) =
                        make_float4(acc[q][m][0], acc[q][m][1], acc[q][m][2], acc[q][m][3]);
            }
            pair_meets(part_n);
#endif
#pragma unroll
            for (int q = 0; q < 2; q++) {
                if (part_k) continue;
                float4 sum = make_float4(acc[q][m][0], acc[q][m][1], acc[q][m][2], acc[q][m][3]);
#if GROUPS == 2
                const float4 v = *reinterpret_cast<const float4*>(here + q * (SUMS / 2));
                sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
#endif
#if RANK
                if (begun) add_branch(sum, m * 2 + q, per_scale);
#endif
#if GELU
                __stcg(results.part_at(blockIdx.x + tile, m * 2 + q), sum);
#else
                if (count > 1) __stcg(results.part(first, blockIdx.x - first, m * 2 + q), sum);
                else results.write(tile, m * 2 + q, sum);
#endif
            }
        }
#if GELU
        // Not before the sums have left their registers. A block arrives once, when all of the pair that it has is there.
        const int of = kept(tile / 2), first = first_of(of), count = count_of(of, first);
        const bool complete = tile % 2 || left == 0;
#else
        const int of = tile;
        const bool complete = count > 1;
#endif
#if SPREAD
        if (complete && count > 1 && !part_k) {
            __syncwarp();
            if (lane == 0) announce(arrivals + of * 8 + part_n, count * (1 + GROUPS) - 1);
        }
#else
        if (complete && !part_k) {  // the last block to arrive adds up the parts, always in the same order
            __syncwarp();
            u32 arrived = 0;
            if (lane == 0 && (!GELU || count > 1)) {
                arrived = count_arrival(arrivals + of * 8 + part_n);
                if (arrived == count - 1) arrivals[of * 8 + part_n] = 0;
            }
            if (__shfl_sync(0xFFFFFFFFu, arrived, 0) == count - 1) {
#if GELU
                add_pair(results, of, parts_of(of, first, first + count - 1, per_tile, units), 0, 1);
#else
                add_tile(results, tile, first, count, 0, 1);
#endif
            }
        }
#endif
#pragma unroll
        for (int j = 0; j < 2 * MT * 4; j++) acc[j / (4 * MT)][j / 4 % MT][j % 4] = 0.0f;
        block = 0, tile++;
    }
#if SPREAD
    // Blocks that share a tile add its parts up together, each other items, in the order of the blocks. At the end of all
    // their shares, as no block then waits long: all end at about the same time. Nothing is kept in registers for it, which
    // wgmma needs to run beside decoding (ptxas says C7512 where it has not enough).
    const int thread = this_thread(), one = thread % 32;
    const Results again = results_of(thread % 256, partial, y, global_scale, rows, N);
    const int head = mine.first / per_sum, tail = (mine.last - 1) / per_sum;
    if (one <= (tail > head)) {  // a lane for each of the two
        const int of = one ? tail : head, first = first_of(of), count = count_of(of, first);
        u32* met = arrivals + of * 8 + thread / 32 % 8;
        while (count > 1 && arrivals_at(met) < count) rest();
        if (count > 1) announce(met, count * (1 + GROUPS) - 1);  // the last one that has seen all sets it to zero
    }
    __syncwarp();
#pragma unroll 1
    for (int of = head; of <= tail; of += !GELU && tail > head ? tail - head : 1) {
        const int first = first_of(of), count = count_of(of, first);
#if GELU
        if (count == 1 && thread >= 256) continue;  // of this block alone: who wrote the parts, as nobody has waited for them
        const Parts parts = parts_of(of, first, first + count - 1, per_tile, units);
        add_pair(again, of, parts, (blockIdx.x - first) * GROUPS + thread / 256, count > 1 ? count * GROUPS : 1);
#else
        if (count > 1) add_tile(again, of, first, count, (blockIdx.x - first) * GROUPS + thread / 256, count * GROUPS);
#endif
    }
#endif
}
