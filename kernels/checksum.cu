// A number for the bits of every weight: the sum of a hash of (index, bits) over its elements, modulo 2^64.
//
// Grid: any number of blocks x one row per weight; 256 threads. `sums` starts at zero. Reads each element once. Integer sums do not depend on their
// order, so the atomics do not make the result depend on the run. src/merge/checksum.rs computes the same on the CPU.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) checksum(const Target* targets, u64* sums) {
  const Target& target = targets[blockIdx.y];
  const u64 count = u64(target.rows) * target.columns;
  u64 sum = 0;
  for (u64 i = blockIdx.x * u64(256) + threadIdx.x; i < count; i += gridDim.x * u64(256)) {
    const u32 row = u32(i / target.columns), column = u32(i % target.columns);
    const u64 offset = target.base_columns ? target.base_columns[column] : column;
    u64 x = code_of(target.dtype, target.base, row * target.base_row + offset) ^ i * 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 32) * 0xd6e8feb86659fd93ull;
    sum += x ^ x >> 32;
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) atomicAdd(sums + blockIdx.y, sum);
}
