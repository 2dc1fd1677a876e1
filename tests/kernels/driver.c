// A libcuda.so.1 without a GPU: it takes what cuda-bindings calls and prints, with cuda.h's own types, what it was given.
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 12080; return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    printf("load %s\n", (const char *)image);
    *module = (CUmodule)0x11;
    return strcmp(image, "refuse") ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    printf("function %s of %p\n", name, (void *)module);
    *function = (CUfunction)0x22;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    printf("attribute %d of %p: %d\n", attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (void *)function, value);
    return CUDA_SUCCESS;
}

// Of a kernel (const float *, int, const float *).
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **values, void **extra) {
    printf("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %p\n", (void *)function, c->gridDimX,
           c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, (void *)c->hStream,
           (void *)extra);
    for (unsigned i = 0; i < c->numAttrs; i++)
        if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            printf("cluster %u %u %u\n", c->attrs[i].value.clusterDim.x, c->attrs[i].value.clusterDim.y,
                   c->attrs[i].value.clusterDim.z);
        else
            printf("overlap %d %d\n", c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                   c->attrs[i].value.programmaticStreamSerializationAllowed);
    printf("values %g %d %g\n", **(float **)values[0], *(int *)values[1], **(float **)values[2]);
    fflush(stdout);
    return CUDA_SUCCESS;
}

#undef cuGetProcAddress
CUresult cuGetProcAddress(const char *symbol, void **address, int version, cuuint64_t flags) {
    *address = dlsym(RTLD_DEFAULT, symbol);
    if (!*address) {
        void *self = dlopen("libcuda.so.1", RTLD_NOW);
        *address = dlsym(self, symbol);
    }
    return CUDA_SUCCESS;
}
CUresult cuGetProcAddress_v2(const char *symbol, void **address, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
    return cuGetProcAddress(symbol, address, version, flags);
}
