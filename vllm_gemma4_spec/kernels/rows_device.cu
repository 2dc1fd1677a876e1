// What nvfp4_rows.cu, nvfp4_gated.cu and bf16_rows.cu take from the hardware; NVRTC compiles it ahead of them.

typedef unsigned int u32;
typedef unsigned short u16;

#ifndef ROWS_ON_HOST  // a test gives the functions below in plain C++ and runs the kernel on a CPU

extern __shared__ float shared[];

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u16 to_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Weights pass by once: keep them out of the L1. Not `.nc`, nor without a clobber: such loads are moved behind
// griddepcontrol.wait, which they are there to come before (findings/nc-loads-behind-griddepcontrol-wait.sh).
__device__ __forceinline__ uint4 load_once(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

__device__ __forceinline__ uint2 load_once(const uint2* at) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
    return v;
}

// What lies in memory alone and is needed last: asked for with the first weights, or a GEMM ends by waiting for it.
__device__ __forceinline__ float load_early(const float* at) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
    return v;
}

#ifdef GATED
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ void store_in_block(u16* here, u16 value, int block) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %2;\nst.shared::cluster.u16 [there], %1;\n}" ::"r"(
            (u32)__cvta_generic_to_shared(here)),
        "h"(value), "r"(block)
        : "memory");
}
#endif

// Programmatic dependent launch: where the launch allows it, this grid starts while the one before it still runs.
__device__ __forceinline__ void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif

__device__ __forceinline__ float rounded(float value) { return __uint_as_float((u32)to_bf16(value) << 16); }

__device__ __forceinline__ float gelu_tanh(float v) {
    return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
}

// Each of a warp's sums: f(its number, the sum).
#define EACH_SUM(...)                                                                       \
    _Pragma("unroll") for (int n = 0; n < NT; n++) _Pragma("unroll") for (int m = 0; m < MT; m++) \
        _Pragma("unroll") for (int i = 0; i < 4; i++) { __VA_ARGS__; }
