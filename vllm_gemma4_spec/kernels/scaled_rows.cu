// y = x * by, each product rounded to bfloat16: what a GEMM reads that cannot multiply on its way (sm_90 and newer). A
// thread takes eight values; the GEMM starts meanwhile and fetches its weights.

#ifndef SCALED_ROWS_ON_HOST  // a test gives these in plain C++

__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {  // as in the GEMM that multiplies itself
    unsigned d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}

__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#endif

extern "C" __global__ void __launch_bounds__(256) scaled_rows(
    const uint4* x,   // [rows, K] bfloat16
    const uint4* by,  // [K] bfloat16
    uint4* y,         // [rows, K] bfloat16
    int pieces,       // of eight values, of all rows
    int per_row) {
    const int at = blockIdx.x * 256 + threadIdx.x;
    let_next_grid_start();
    if (at >= pieces) return;
    const uint4 factor = by[at % per_row];
    wait_for_previous_grid();
    const uint4 v = x[at];
    y[at] = make_uint4(times(v.x, factor.x), times(v.y, factor.y), times(v.z, factor.z), times(v.w, factor.w));
}
