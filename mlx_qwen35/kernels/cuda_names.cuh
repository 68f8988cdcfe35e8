// Metal's names in CUDA, as far as the bodies here use them. MLX puts this before a kernel's text.
#pragma once
#ifndef __CUDACC_RTC__
#include <stdint.h>
#include <string.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef __nv_bfloat16 bfloat16_t;
typedef __half float16_t;
#define METAL_FUNC __device__ __forceinline__

namespace metal {
#define MATH_OF_METAL                                     \
  METAL_FUNC float exp(float x) { return ::expf(x); }     \
  METAL_FUNC float exp2(float x) { return ::exp2f(x); }   \
  METAL_FUNC float log(float x) { return ::logf(x); }     \
  METAL_FUNC float log2(float x) { return ::log2f(x); }   \
  METAL_FUNC float sqrt(float x) { return ::sqrtf(x); }   \
  METAL_FUNC float rsqrt(float x) { return ::rsqrtf(x); } \
  METAL_FUNC float tanh(float x) { return ::tanhf(x); }   \
  METAL_FUNC float sin(float x) { return ::sinf(x); }     \
  METAL_FUNC float cos(float x) { return ::cosf(x); }
MATH_OF_METAL
namespace precise {
MATH_OF_METAL
}
namespace fast {
MATH_OF_METAL
}
METAL_FUNC float floor(float x) { return ::floorf(x); }
METAL_FUNC float ceil(float x) { return ::ceilf(x); }
METAL_FUNC float abs(float x) { return ::fabsf(x); }
METAL_FUNC float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
template <class T>
METAL_FUNC T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
METAL_FUNC T max(T a, T b) {
  return a < b ? b : a;
}
template <class To, class From>
METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
METAL_FUNC T simd_shuffle(T v, ushort thread) {
  return __shfl_sync(0xffffffffu, v, thread);
}
template <class T>
METAL_FUNC T simd_broadcast(T v, ushort thread) {
  return __shfl_sync(0xffffffffu, v, thread);
}
template <class T>
METAL_FUNC T simd_broadcast_first(T v) {
  return __shfl_sync(0xffffffffu, v, 0);
}
template <class T>
METAL_FUNC T simd_shuffle_xor(T v, ushort by) {
  return __shfl_xor_sync(0xffffffffu, v, by);
}
template <class T>
METAL_FUNC T simd_shuffle_down(T v, ushort by) {
  return __shfl_down_sync(0xffffffffu, v, by);
}
template <class T>
METAL_FUNC T simd_shuffle_up(T v, ushort by) {
  return __shfl_up_sync(0xffffffffu, v, by);
}
template <class T>
METAL_FUNC T simd_sum(T v) {
  for (int step = 1; step < 32; step <<= 1) v = v + __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}
template <class T>
METAL_FUNC T simd_max(T v) {
  for (int step = 1; step < 32; step <<= 1) v = max(v, (T)__shfl_xor_sync(0xffffffffu, v, step));
  return v;
}
template <class T>
METAL_FUNC T simd_min(T v) {
  for (int step = 1; step < 32; step <<= 1) v = min(v, (T)__shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }
METAL_FUNC uint index_of_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
}  // namespace metal

#define thread_position_in_threadgroup (make_uint3(threadIdx.x, threadIdx.y, threadIdx.z))
#define threadgroup_position_in_grid (make_uint3(blockIdx.x, blockIdx.y, blockIdx.z))
#define threads_per_threadgroup (make_uint3(blockDim.x, blockDim.y, blockDim.z))
#define threadgroups_per_grid (make_uint3(gridDim.x, gridDim.y, gridDim.z))
#define thread_position_in_grid                                                             \
  (make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \
              blockIdx.z * blockDim.z + threadIdx.z))
#define thread_index_in_threadgroup (metal::index_of_thread())
#define thread_index_in_simdgroup (metal::index_of_thread() & 31u)
#define simdgroup_index_in_threadgroup (metal::index_of_thread() >> 5)
#define simdgroups_per_threadgroup ((blockDim.x * blockDim.y * blockDim.z) >> 5)
using namespace metal;
