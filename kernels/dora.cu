// DoRA in training on a Linear layer, what belongs to each row of V = W + s U D: src/algo/dora.rs has the formulas and mirrors the struct.
//
//   rows_DTYPE  Q, |V|, m / |V|, m / |V| o U, m / |V| - 1
//   pull_DTYPE  from the gradient of m / |V|, and from that of m / |V| o U: what is added to those of m and U, and what of U goes to D
//
// DTYPE is that of W, U and what is made for products with them. Blocks of 256 threads, a warp for each row. rows reads each number of W once; the
// ranks' square matrix comes from L1.
#include "common.cuh"

struct Job {
  const void *base, *up;
  const float *own, *gram, *magnitude;  // s W D^T, s^2 D D^T, m
  float *crossed, *lengths, *ratio;     // Q, |V|, m / |V|
  void *turned_up, *beyond_one;         // m / |V| o U, m / |V| - 1
  const float *grad_ratio, *grad_up;    // dL/d(m / |V|), and dL/d(m / |V| o U)
  float *into_up, *into_magnitude;
  void* pulled_up;
  u32 rows, columns, ranks;
};

__device__ __forceinline__ float over_warp(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

template <u32 DTYPE>
__device__ __forceinline__ void write(void* to, u64 at, float value) {
  if constexpr (DTYPE == F32) static_cast<float*>(to)[at] = value;
  else static_cast<u16*>(to)[at] = u16(encode(DTYPE, value, false, 0));
}

template <u32 DTYPE>
__device__ __forceinline__ float square_of_row(const void* base, u64 start, u32 columns) {
  constexpr u32 EACH = DTYPE == F32 ? 4 : 8;
  const u32 lane = threadIdx.x & 31;
  float sum = 0.0f;
  if (columns % EACH == 0 && reinterpret_cast<u64>(base) % 16 == 0) {
    const uint4* from = static_cast<const uint4*>(base) + start / EACH;
#pragma unroll 4
    for (u32 at = lane; at < columns / EACH; at += 32) {
      const uint4 loaded = __ldg(from + at);
      const u32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (u32 i = 0; i < EACH; i++) {
        const u32 code = DTYPE == F32 ? words[i % 4] : words[i / 2] >> 16 * (i % 2) & 0xffff;
        const float value = decode(DTYPE, code);
        sum = fmaf(value, value, sum);
      }
    }
  } else {
    for (u32 at = lane; at < columns; at += 32) {
      const float value = read_as(DTYPE, base, start + at);
      sum = fmaf(value, value, sum);
    }
  }
  return over_warp(sum);
}

template <u32 DTYPE>
__device__ __forceinline__ void rows(const Job& job) {
  const u32 row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (row >= job.rows) return;
  const float square = square_of_row<DTYPE>(job.base, u64(row) * job.columns, job.columns);
  const u64 start = u64(row) * job.ranks;
  float added = 0.0f;
  for (u32 j = lane; j < job.ranks; j += 32) {
    const float own = job.own[start + j];
    float crossed = own;
    for (u32 k = 0; k < job.ranks; k++) crossed = fmaf(read_as(DTYPE, job.up, start + k), __ldg(job.gram + u64(k) * job.ranks + j), crossed);
    job.crossed[start + j] = crossed;
    added = fmaf(own + crossed, read_as(DTYPE, job.up, start + j), added);
  }
  // A row of zeros stays one.
  const float length = sqrtf(fmaxf(square + over_warp(added), 1.17549435e-38f));
  const float ratio = job.magnitude[row] / length;
  for (u32 j = lane; j < job.ranks; j += 32) write<DTYPE>(job.turned_up, start + j, ratio * read_as(DTYPE, job.up, start + j));
  if (lane == 0) {
    job.lengths[row] = length;
    job.ratio[row] = ratio;
    write<DTYPE>(job.beyond_one, row, ratio - 1.0f);
  }
}

template <u32 DTYPE>
__device__ __forceinline__ void pull(const Job& job) {
  const u32 row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (row >= job.rows) return;
  const float grad = job.grad_ratio[row], length = job.lengths[row], ratio = job.ratio[row];
  const float twice = -grad * ratio / (length * length);
  const u64 start = u64(row) * job.ranks;
  for (u32 j = lane; j < job.ranks; j += 32) {
    job.into_up[start + j] += fmaf(twice, job.crossed[start + j], ratio * job.grad_up[start + j]);
    write<DTYPE>(job.pulled_up, start + j, twice * read_as(DTYPE, job.up, start + j));
  }
  if (lane == 0) job.into_magnitude[row] += grad / length;
}

#define KERNELS(NAME, DTYPE)                                                                         \
  extern "C" __global__ void __launch_bounds__(256) rows_##NAME(const Job job) { rows<DTYPE>(job); } \
  extern "C" __global__ void __launch_bounds__(256) pull_##NAME(const Job job) { pull<DTYPE>(job); }

KERNELS(f32, F32)
KERNELS(f16, F16)
KERNELS(bf16, BF16)
