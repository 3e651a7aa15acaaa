// mma, once in the code where it is emulated: sm_75's is long, and a kernel of hundreds of products would be megabytes.
#pragma once
#include "common.cuh"

#if __CUDA_ARCH__ >= 800
template <bool HALF>
__device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
  mma<HALF>(d, a, b0, b1);
}
#else
template <bool HALF>
__device__ __noinline__ float4 emulated(float4 sum, uint4 a, u32 b0, u32 b1) {
  float d[4] = {sum.x, sum.y, sum.z, sum.w};
  mma<HALF>(d, a, b0, b1);
  return make_float4(d[0], d[1], d[2], d[3]);
}

template <bool HALF>
__device__ __forceinline__ void multiply(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
  const float4 sum = emulated<HALF>(make_float4(d[0], d[1], d[2], d[3]), a, b0, b1);
  d[0] = sum.x, d[1] = sum.y, d[2] = sum.z, d[3] = sum.w;
}
#endif
