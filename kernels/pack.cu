// Factors as the fragments that mma.m16n8k16 takes, so that a merge reads them straight into registers, 16 bytes per lane, without shared memory.
//
//   up   [rows, rank]: blocks of 16 rows x 16 ranks,     [block][rank block][part][lane] of 16 bytes
//   down [rank, columns]: groups of 32 columns x 16 ranks, [group][rank block][part][half][lane] of 16 bytes
//   right [rank, channels]: up, whose ranks are channels here; of each 32 a lane has eight neighbours (right.cu, which takes them as right operands);
//     `ranks` is even, and the source is the transposed factor
//
// One part for bf16 and fp16 numbers, three for fp32 (`split`). In a group of 32 columns, mma's column n of product j is column
// (n / 2) * 8 + 2 * j + n % 2, so that a lane's eight results are neighbours: 16 bytes of a 16-bit weight. Ranks, rows and columns that the
// factor lacks are zero; `shift` is how many rows or columns of a block lie before its first.
//
// A down factor of `taps` > 1 becomes the matrix that acts on each tap of a kernel alike: element (tap * R + k, i * taps + tap) is the factor's (k, i),
// R its rows rounded up to 16, and the others are zero.
//
// One warp per block; grid (any, factors). Reads each factor once, writes it once.
#include "common.cuh"

enum Layout : u32 { UP = 0, DOWN = 1, PLAIN = 2, RIGHT = 4 };

struct Factor {
  const void* from;
  void* to;
  u64 row, column;  // strides of the source, in elements
  u32 dtype, layout, format;
  u32 rows, columns;  // of the source
  u32 shift;
  u32 blocks, ranks;  // of the result
  u32 taps;           // of DOWN; 1 otherwise
  u32 unused;
};

__device__ __forceinline__ float element(const Factor& f, u32 row, u32 column) {
  return row < f.rows && column < f.columns ? read_as(f.dtype, f.from, row * f.row + column * f.column) : 0.0f;
}

__device__ __forceinline__ float element_of_down(const Factor& f, u32 row, u32 column) {
  if (f.taps == 1) return element(f, row, column);
  const u32 ranks = (f.rows + 15) / 16 * 16;
  return row / ranks == column % f.taps ? element(f, row % ranks, column / f.taps) : 0.0f;
}

__device__ __forceinline__ u32 pair(u32 format, u32 part, float lower, float upper) {
  if (format == FORMAT_F16) return pack_half(lower, upper);
  if (format == FORMAT_BF16) return pack_bf16(lower, upper);
  float low[3], high[3];
  split(lower, low);
  split(upper, high);
  return pack_bf16(low[part], high[part]);
}

extern "C" __global__ void __launch_bounds__(256) pack(const Factor* factors) {
  const Factor f = factors[blockIdx.y];
  const u32 lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  const u32 parts = f.format == FORMAT_SPLIT ? 3 : 1;
  uint4* to = static_cast<uint4*>(f.to);
  if (f.layout == PLAIN) {
    // Packed, in fp32.
    const u64 count = u64(f.rows) * f.columns;
    for (u64 i = blockIdx.x * u64(blockDim.x) + threadIdx.x; i < count; i += u64(gridDim.x) * blockDim.x) {
      static_cast<float*>(f.to)[i] = element(f, u32(i / f.columns), u32(i % f.columns));
    }
    return;
  }
  const u32 units = f.blocks * f.ranks;
  for (u32 unit = blockIdx.x * 8 + threadIdx.x / 32; unit < units; unit += gridDim.x * 8) {
    const u32 block = unit / f.ranks, rank = unit % f.ranks;
    if (f.layout != DOWN) {
      const bool up = f.layout == UP;
      const u32 k = up ? rank * 16 + 2 * t : rank / 2 * 32 + t * 8 + rank % 2 * 4, next = up ? 8 : 2;
      // Rows before the first wrap around to numbers that no factor has.
      const u32 row = block * 16 + g - f.shift;
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = element(f, row + (i / 2 % 2) * 8, k + i % 2 + (i / 4) * next);
      for (u32 part = 0; part < parts; part++) {
        to[(unit * parts + part) * u64(32) + lane] = make_uint4(pair(f.format, part, x[0], x[1]), pair(f.format, part, x[2], x[3]),
                                                                pair(f.format, part, x[4], x[5]), pair(f.format, part, x[6], x[7]));
      }
    } else {
      const u32 k = rank * 16 + 2 * t;
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const u32 j = half * 2 + i / 4;
          x[i] = element_of_down(f, k + i % 2 + (i / 2 % 2) * 8, block * 32 + g / 2 * 8 + 2 * j + g % 2 - f.shift);
        }
        for (u32 part = 0; part < parts; part++) {
          to[((unit * parts + part) * u64(2) + half) * 32 + lane] =
              make_uint4(pair(f.format, part, x[0], x[1]), pair(f.format, part, x[2], x[3]), pair(f.format, part, x[4], x[5]),
                         pair(f.format, part, x[6], x[7]));
        }
      }
    }
  }
}
