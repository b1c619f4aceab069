// One source for the GPU and, to check its arithmetic without one, for the host.
//
// A kernel is written in phases: every loop over threads (FOR_THREADS) ends ahead of a BARRIER, and
// what one phase hands to the next lies in shared or global memory. A value that threads add up
// goes through block_sum and its kind. On the host a block is one thread that runs each loop whole.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE static __device__ __forceinline__
#define KERNEL __global__
#define FOR_THREADS(i, n) for (int i = threadIdx.x; i < (n); i += blockDim.x)
#define BARRIER __syncthreads()
#define BLOCK_X int(blockIdx.x)
#define BLOCK_Y int(blockIdx.y)
#define BLOCK_Z int(blockIdx.z)
#define SHARED(T, name) extern __shared__ float4 effopt_shared[]; T* name = reinterpret_cast<T*>(effopt_shared)

using half_t = __half;
using bfloat_t = __nv_bfloat16;

DEVICE float real(float x) { return x; }
DEVICE float real(half_t x) { return __half2float(x); }
DEVICE float real(bfloat_t x) { return __bfloat162float(x); }
template <class T> DEVICE T rounded(float x);
template <> __device__ __forceinline__ float rounded<float>(float x) { return x; }
template <> __device__ __forceinline__ half_t rounded<half_t>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bfloat_t rounded<bfloat_t>(float x) { return __float2bfloat16_rn(x); }
DEVICE float from_bits(int bits) { return __int_as_float(bits); }

struct Add { DEVICE float of(float a, float b) { return a + b; } };
struct Max { DEVICE float of(float a, float b) { return fmaxf(a, b); } };

// Every thread of the block must call; every thread gets the result. `none` changes nothing.
template <class Op> DEVICE float block_reduce(float value, float none) {
  __shared__ float warps[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, count = (blockDim.x + 31) >> 5;
  for (int step = 16; step; step >>= 1)
    value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, step));
  __syncthreads();  // the reduction ahead may still be read
  if (lane == 0) warps[warp] = value;
  __syncthreads();
  value = lane < count ? warps[lane] : none;
  for (int step = 16; step; step >>= 1)
    value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

#else  // the host

#include <cmath>
#include <cstdint>
#include <cstring>

#define DEVICE static inline
#define KERNEL
#define FOR_THREADS(i, n) for (int i = 0; i < (n); i++)
#define BARRIER
#define BLOCK_X effopt_place[0]
#define BLOCK_Y effopt_place[1]
#define BLOCK_Z effopt_place[2]
#define SHARED(T, name) T* name = reinterpret_cast<T*>(effopt_shared)

static int effopt_place[3];
alignas(16) [[maybe_unused]] static char effopt_shared[1 << 16];
extern "C" void effopt_set_block(int x, int y, int z) {
  effopt_place[0] = x, effopt_place[1] = y, effopt_place[2] = z;
}

using half_t = _Float16;
struct bfloat_t { uint16_t bits; };

DEVICE float real(float x) { return x; }
DEVICE float real(half_t x) { return float(x); }
DEVICE float real(bfloat_t x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T> T rounded(float x);
template <> inline float rounded<float>(float x) { return x; }
template <> inline half_t rounded<half_t>(float x) { return half_t(x); }
template <> inline bfloat_t rounded<bfloat_t>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {uint16_t(bits >> 16 | 64)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}
DEVICE float from_bits(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Add {};
struct Max {};
template <class Op> DEVICE float block_reduce(float value, float) { return value; }
using std::fmaxf;
using std::fminf;

#endif

DEVICE float block_sum(float value) { return block_reduce<Add>(value, 0.0f); }
DEVICE float block_max(float value) { return block_reduce<Max>(value, -3.402823466e38f); }

// The three entries of a kernel: PARAMETERS(T) declares its arguments, ARGUMENTS names them.
#define ENTRIES(NAME, PARAMETERS, ...)                                                   \
  extern "C" KERNEL void NAME##_float32 PARAMETERS(float) { NAME<float>(__VA_ARGS__); }  \
  extern "C" KERNEL void NAME##_float16 PARAMETERS(half_t) { NAME<half_t>(__VA_ARGS__); } \
  extern "C" KERNEL void NAME##_bfloat16 PARAMETERS(bfloat_t) { NAME<bfloat_t>(__VA_ARGS__); }
