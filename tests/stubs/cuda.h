// A stand-in for CUDA's driver header: the names that plugins of this project use, and no more.
#pragma once

#include <cstddef>

typedef enum { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_NOT_FOUND = 500 } CUresult;
typedef enum { CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 } CUfunction_attribute;
typedef enum { CU_JIT_NONE } CUjit_option;
typedef enum { CU_LIBRARY_NONE } CUlibraryOption;
typedef struct CUlib_st* CUlibrary;
typedef struct CUkern_st* CUkernel;
typedef struct CUfunc_st* CUfunction;
typedef struct CUstream_st* CUstream;

extern "C" {
CUresult cuGetErrorName(CUresult code, char const** name);
CUresult cuLibraryLoadData(CUlibrary* made, void const* code, CUjit_option* options, void** values,
                           unsigned count, CUlibraryOption* more, void** moreValues, unsigned moreCount);
CUresult cuLibraryUnload(CUlibrary library);
CUresult cuLibraryGetKernel(CUkernel* made, CUlibrary library, char const* name);
CUresult cuKernelGetFunction(CUfunction* made, CUkernel kernel);
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value);
CUresult cuLaunchKernel(CUfunction function, unsigned gridX, unsigned gridY, unsigned gridZ,
                        unsigned blockX, unsigned blockY, unsigned blockZ, unsigned shared,
                        CUstream stream, void** arguments, void** extra);
}
