// One source for the GPU and, to check its arithmetic without one, for the host.
//
// A kernel is written in phases: every loop over threads (FOR_THREADS) ends ahead of a BARRIER, and
// what one phase hands to the next lies in shared or global memory. A value that threads add up
// goes through block_sum. On the host a block is one thread that runs each loop whole.
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

// Every thread of the block must call, and gets the sum.
DEVICE float block_sum(float value) {
  __shared__ float warps[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, count = (blockDim.x + 31) >> 5;
  for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();  // the sum ahead may still be read
  if (lane == 0) warps[warp] = value;
  __syncthreads();
  value = lane < count ? warps[lane] : 0.0f;
  for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

#else  // the host

#include <cmath>
#include <cstdint>
#include <cstring>

#define DEVICE static inline
#define KERNEL
#ifdef EFFOPT_REVERSED  // the last thread first: what one thread takes from another shows
#define FOR_THREADS(i, n) for (int i = (n) - 1; i >= 0; i--)
#else
#define FOR_THREADS(i, n) for (int i = 0; i < (n); i++)
#endif
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

DEVICE float block_sum(float value) { return value; }
using std::fmaxf;
using std::fminf;

#endif

// V neighbours that are read and written at once, 16 bytes unless told.
template <class T, int V = 16 / sizeof(T)>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack { T at[V]; };

template <class T, int V = 16 / sizeof(T)> DEVICE Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <class T, int V> DEVICE void store(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Whether all rows of `width` values can be read and written by 16 bytes.
template <class T, class... More>
DEVICE bool whole(int width, const T* one, const More*... more) {
  size_t bits = (reinterpret_cast<size_t>(one) | ... | reinterpret_cast<size_t>(more));
  return width % int(16 / sizeof(T)) == 0 && bits % 16 == 0;
}

// Copies the slice of a block of THREADS, one of `slices` of rows [rows, width]: row i comes from
// from(i), which can be read for every row, and is left alone where wanted(i) is false.
template <int THREADS, int V, class T, class From, class Wanted>
DEVICE void copy_packs(
    int rows, int width, int slice, int slices, T* to, From from, Wanted wanted) {
  constexpr int EACH = 4;  // loads that a thread has under way
  unsigned packs = width / V, total = rows * packs, step = slices * THREADS;
  FOR_THREADS(lane, THREADS) {
    for (unsigned start = slice * THREADS + lane; start < total; start += EACH * step) {
      Pack<T, V> held[EACH];
      for (int e = 0; e < EACH; e++) {
        unsigned at = start + e * step < total ? start + e * step : total - 1;
        held[e] = load<T, V>(from(int(at / packs)) + at % packs * V);
      }
      for (int e = 0; e < EACH; e++) {
        unsigned at = start + e * step;
        if (at < total && wanted(int(at / packs))) store(to + (long long)at * V, held[e]);
      }
    }
  }
}

template <int THREADS, int V, class T, class From>
DEVICE void copy_packs(int rows, int width, int slice, int slices, T* to, From from) {
  copy_packs<THREADS, V>(rows, width, slice, slices, to, from, [](int) { return true; });
}

// The three entries of a kernel: PARAMETERS(T) declares its arguments, ARGUMENTS names them.
#define ENTRIES(NAME, PARAMETERS, ...)                                                   \
  extern "C" KERNEL void NAME##_float32 PARAMETERS(float) { NAME<float>(__VA_ARGS__); }  \
  extern "C" KERNEL void NAME##_float16 PARAMETERS(half_t) { NAME<half_t>(__VA_ARGS__); } \
  extern "C" KERNEL void NAME##_bfloat16 PARAMETERS(bfloat_t) { NAME<bfloat_t>(__VA_ARGS__); }
