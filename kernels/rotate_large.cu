// Rotations in blocks of any size on tensor cores, a stage of every weight in one launch; rotate.cuh has the formulas.
//
// A tile is whole blocks of one size and up to 64 n at a time. W waits in shared memory as bf16, in as many parts as its numbers need. Up to eight
// warps take 16 rows of a matrix each, split them into three bf16 as they come from L2, and multiply all n.
// Bytes: each element of W read and written, and read once more from L2 for its old bits (not bf16); of matrices size / 16 an element of W.
//
// The products are those of fp32: all partial ones down to 2^-24 of the largest, summed in fp32. An infinite element makes its group NaN.
//
//   rotate_large_DTYPE  the first stage; if there are more it leaves fp32 in scratch memory
//   rotate_scratch      a later one, from there, one launch each
#include "rotate.cuh"

constexpr u32 LARGE_THREADS = 256;  // at most

// Where a number stands in its 16 so that lane t of a product's four has what lies at 4t .. 4t + 3: in the product's numbering 2t, 2t + 1, 2t + 8,
// 2t + 9.
__device__ __forceinline__ u32 slot(u32 at) { return (at & ~15u) | (at >> 1 & 1) << 3 | (at >> 2 & 3) << 1 | (at & 1); }

// How many bf16 a number is the sum of; NO_DTYPE is scratch memory.
template <u32 DTYPE>
constexpr int PARTS = DTYPE == F32 || DTYPE == NO_DTYPE ? 3 : DTYPE == F16 ? 2 : 1;

// The upper halves of two numbers as a pair of bf16, and what is left of the numbers.
__device__ __forceinline__ u32 take_pair(float& low, float& high) {
  const u32 first = __float_as_uint(low) & 0xffff0000, second = __float_as_uint(high) & 0xffff0000;
  low -= bits_to_float(first), high -= bits_to_float(second);
  return first >> 16 | second;
}

// The tile as it lies in W, rows by columns, in bf16. In every block k are padded with zeros to whole 16; k stand at their slots, columns as well.
struct Planes {
  u16* first;
  u32 stride;  // an odd multiple of 16 bytes: eight rows meet all banks
  u32 size;    // of a plane, one for each part
  u32 block, padded;  // k
  u32 k_count;  // with pads

  __device__ __forceinline__ Planes(const Tile& tile, u32 block, u32 axis) : block(block) {
    padded = (block + 15) / 16 * 16, k_count = tile.count / block * padded;
    first = reinterpret_cast<u16*>(shared);
    stride = (axis == 0 ? tile.step : k_count) + 8;
    size = (axis == 0 ? k_count : tile.step) * stride;
  }

  // Eight neighbours from a column that is a multiple of 8: even pairs go to the first half of their 16, odd ones to the second.
  template <int PARTS>
  __device__ __forceinline__ void put_eight(u32 row, u32 column, float (&values)[8]) const {
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      u32 words[4];
#pragma unroll
      for (int w = 0; w < 4; w++) words[w] = take_pair(values[2 * w], values[2 * w + 1]);
      u16* const to = first + p * size + row * stride + slot(column);
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[2]);
      *reinterpret_cast<uint2*>(to + 8) = make_uint2(words[1], words[3]);
    }
  }

  // Eight bf16 as they are.
  __device__ __forceinline__ void put_eight(u32 row, u32 column, const u32 (&words)[4]) const {
    u16* const to = first + row * stride + slot(column);
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[2]);
    *reinterpret_cast<uint2*>(to + 8) = make_uint2(words[1], words[3]);
  }

  // Four of them from a column that is a multiple of 4.
  __device__ __forceinline__ Few<BF16, 4> four(u32 row, u32 column) const {
    const u16* const from = this->first + row * stride + slot(column);
    Few<BF16, 4> few;
    few.raw[0] = *reinterpret_cast<const u32*>(from), few.raw[1] = *reinterpret_cast<const u32*>(from + 8);
    return few;
  }

  template <int PARTS>
  __device__ __forceinline__ void put(u32 row, u32 column, float value) const {
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      float none = 0.0f;
      first[p * size + row * stride + slot(column)] = u16(take_pair(value, none));
    }
  }
};

// W, or what the stages before have left of it, to shared memory.
template <u32 DTYPE>
__device__ __forceinline__ void load_planes(const Planes& planes, const Rotation& job, const Tile& tile, const u32* order, u32 from, u32 width) {
  const u32 axis = job.axis, across = axis == 0 ? width : planes.k_count, total = planes.k_count * width;
  for (u32 i = threadIdx.x; i < total; i += blockDim.x) {
    const u32 line = i / across, along = i % across, at = axis == 0 ? line : along;
    const u32 block = at / planes.padded, k = at % planes.padded;
    float value = 0.0f;
    if (k < planes.block) {
      const u32 position = tile.first + block * planes.block + k, place = order ? order[position] : position;
      const u32 row = axis == 0 ? place : from + line, column = axis == 0 ? from + along : place;
      if constexpr (DTYPE == NO_DTYPE) value = job.scratch[u64(row) * job.columns + column];
      else value = read_as(DTYPE, job.base, row * job.base_row + (job.base_columns ? job.base_columns[column] : column));
    }
    planes.put<PARTS<DTYPE>>(axis == 0 ? slot(line) : line, along, value);
  }
}

// The same with eight neighbours at a time. On axis 1 blocks are multiples of 8 and there is no order. Along a row stand step / 8 threads (axis 0) or
// 32 (axis 1).
template <u32 DTYPE>
__device__ __forceinline__ void load_eights(const Planes& planes, const Ending& ending, const Tile& tile, u32 axis, const u32* order, u32 from,
                                            u32 width) {
  constexpr u32 AHEAD = 4;
  const u32 shift = axis == 0 ? __popc(tile.step / 8 - 1) : 5, lines = blockDim.x >> shift;
  const u32 across = axis == 0 ? width : planes.k_count, count = axis == 0 ? planes.k_count : width, padded = planes.padded, size = planes.block;
  for (u32 along = (threadIdx.x & (1 << shift) - 1) * 8; along < across; along += 8 << shift) {
    // The block and k of the thread's place: fixed on axis 1.
    u32 block = along / padded, k = along % padded, line = threadIdx.x >> shift;
    if (axis == 0) block = line / padded, k = line % padded;
    while (line < count) {
      Few<DTYPE, 8> few[AHEAD] = {};  // zeros, in every dtype
      u32 ahead = line;
#pragma unroll
      for (u32 a = 0; a < AHEAD; a++, ahead += lines) {
        if (ahead < count && k < size) {
          const u32 position = tile.first + block * size + k;
          few[a] = axis == 1 ? ending.old<DTYPE, 8>(from + ahead, position) : ending.old<DTYPE, 8>(order ? order[position] : position, from + along);
        }
        if (axis == 0) {
          for (k += lines; k >= padded; k -= padded) block++;
        }
      }
#pragma unroll
      for (u32 a = 0; a < AHEAD; a++, line += lines) {
        if (line >= count) break;
        const u32 row = axis == 0 ? slot(line) : line;
        if constexpr (DTYPE == BF16) {
          planes.put_eight(row, along, few[a].raw);
        } else {
          float values[8];
#pragma unroll
          for (int e = 0; e < 8; e++) values[e] = few[a].value(e);
          planes.put_eight<PARTS<DTYPE>>(row, along, values);
        }
      }
    }
  }
}

// [unit of 16 n][half][d]: in a unit's 16 x 16 numbers, as they lie in W, row g + 8 * (d / 2) and column 4t + 2 * half + d % 2.
typedef float Turned[4][2][4];

// 16 x 16 numbers of W as an operand of a product; lanes 8i .. 8i + 7 name the rows of its i-th 8 x 8.
template <u32 AXIS>
__device__ __forceinline__ uint4 load_unit(const u16* from) {
  uint4 w;
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(from));
  if (AXIS == 0) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "r"(at) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "r"(at) : "memory");
  }
  return w;
}

// 16 rows of a block's matrix times all n of the tile. Axis 0: matrix x W, axis 1: W x matrix^T, so that a lane's results are neighbours in a row.
template <int PARTS, u32 AXIS>
__device__ __forceinline__ void product(Turned& sum, const Planes& planes, const float* matrix, u32 block_at, u32 first_row, u32 units,
                                        float strength) {
  const u32 lane = threadIdx.x & 31, size = planes.block;
  // Of the second operand lane g holds the columns; they stand at slots.
  const u32 row = first_row + (AXIS == 0 ? lane / 4 : lane / 8 * 4 + lane / 4 % 2), other_row = row + (AXIS == 0 ? 8 : 2);
  const u32 k0 = lane % 4 * 4;
  // Rows past the end are not written; k past the end meet zeros of W.
  const float* const upper_row = matrix + u64(min(row, size - 1)) * size;
  const float* const lower_row = matrix + u64(min(other_row, size - 1)) * size;
  const bool fours = size % 4 == 0;
  const auto four = [&](const float* row, u32 k) {
    if (fours) return *reinterpret_cast<const float4*>(row + min(k, size - 4));
    return make_float4(row[min(k, size - 1)], row[min(k + 1, size - 1)], row[min(k + 2, size - 1)], row[min(k + 3, size - 1)]);
  };
  const u32 k_step = AXIS == 0 ? 16 * planes.stride : 16, unit_step = AXIS == 0 ? 16 : 16 * planes.stride;
  const u16* from = planes.first + (lane & 15) * planes.stride + lane / 16 * 8 + block_at * planes.padded * (AXIS == 0 ? planes.stride : 1);
  float4 upper = four(upper_row, k0), lower = four(lower_row, k0);
  for (u32 k = 0; k < size; k += 16) {
    float4 r[2] = {upper, lower};
    if (k + 16 < size) upper = four(upper_row, k + 16 + k0), lower = four(lower_row, k + 16 + k0);
    if (strength != 1.0f) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 diagonal = (i ? other_row : row) - (k + k0);
        r[i].x = blend(r[i].x, diagonal == 0, strength), r[i].y = blend(r[i].y, diagonal == 1, strength);
        r[i].z = blend(r[i].z, diagonal == 2, strength), r[i].w = blend(r[i].w, diagonal == 3, strength);
      }
    }
    uint4 parts[3];
#pragma unroll
    for (int p = 0; p < 3; p++) {
      parts[p].x = take_pair(r[0].x, r[0].y), parts[p].y = take_pair(r[1].x, r[1].y);
      parts[p].z = take_pair(r[0].z, r[0].w), parts[p].w = take_pair(r[1].z, r[1].w);
    }
#pragma unroll
    for (u32 u = 0; u < 4; u++) {
      if (u >= units) continue;
      // Tensor cores cut off what they add to a larger number: fp32 results are summed by the others.
      Turned own;
      float(&d)[2][4] = PARTS == 1 ? sum[u] : own[0];
      if (PARTS > 1) {
#pragma unroll
        for (int i = 0; i < 8; i++) d[i / 4][i % 4] = 0.0f;
      }
#pragma unroll
      for (int p = PARTS - 1; p >= 0; p--) {
        const uint4 w = load_unit<AXIS>(from + p * planes.size + u * unit_step);
#pragma unroll
        for (int q = 2 - p; q >= 0; q--) {
          if (AXIS == 0) {
            mma<false>(d[0], parts[q], w.x, w.y);
            mma<false>(d[1], parts[q], w.z, w.w);
          } else {
            mma<false>(d[0], w, parts[q].x, parts[q].z);
            mma<false>(d[1], w, parts[q].y, parts[q].w);
          }
        }
      }
      if (PARTS > 1) {
#pragma unroll
        for (int i = 0; i < 8; i++) sum[u][i / 4][i % 4] += d[i / 4][i % 4];
      }
    }
    from += k_step;
  }
}

// `count` neighbours of a row of W, from a position and an n, one by one.
__device__ __noinline__ void write_scattered(const Rotation& job, const u32* order, float4 turned, u32 count, u32 position, u32 n, bool last) {
  const Ending ending(job);
  for (u32 i = 0; i < count; i++) {
    const u32 at = position + (job.axis == 0 ? 0 : i), place = order ? order[at] : at;
    const u32 row = job.axis == 0 ? place : n, column = job.axis == 0 ? n + i : place;
    if (last) ending.write_one(job, turned.x, row, column);
    else job.scratch[u64(row) * job.columns + column] = turned.x;
    turned.x = turned.y, turned.y = turned.z, turned.z = turned.w;
  }
}

// DTYPE: of W, for the first stage; NO_DTYPE: the stage reads scratch memory.
template <u32 DTYPE>
__device__ __forceinline__ void rotate_large(const Rotation* rotations, const Tile* tiles) {
  __shared__ Work work;
  work.load(rotations, tiles);
  const Rotation& job = work.job;
  const Tile tile = work.tile;
  Part part = global(job.parts)[tile.part];
  part.blocks = global(part.blocks), part.order = global(part.order);
  const Ending ending(job);
  const bool last = part.stage + 1 == job.stages;
  const float strength = job.interpolate ? job.strength : 1.0f;
  const u32 size = part.size, axis = job.axis, g = threadIdx.x / 4 % 8, t = threadIdx.x % 4;
  const bool eights = DTYPE != NO_DTYPE && job.vectors && (axis == 0 || (size % 8 == 0 && !part.order));
  const float* const matrices = part.blocks + u64(tile.first - part.first) * size;
  const Planes planes(tile, size, axis);
  const u32 rows = planes.padded / 16, items = tile.count / size * rows;
  for (u32 n = 0; n < tile.width; n += tile.step) {
    const u32 from = tile.from + n, width = min(tile.step, tile.width - n), units = (width + 15) / 16;
    if (n > 0) __syncthreads();
    if constexpr (DTYPE != NO_DTYPE) {
      if (eights) load_eights<DTYPE>(planes, ending, tile, axis, part.order, from, width);
    }
    if (!eights) load_planes<DTYPE>(planes, job, tile, part.order, from, width);
    __syncthreads();
    for (u32 item = threadIdx.x / 32; item < items; item += blockDim.x / 32) {
      const u32 block = item / rows, row = item % rows * 16;
      const float* const matrix = matrices + u64(block) * size * size;
      Turned sum;
#pragma unroll
      for (int i = 0; i < 32; i++) sum[i / 8][i / 4 % 2][i % 4] = 0.0f;
      if (axis == 0) product<PARTS<DTYPE>, 0>(sum, planes, matrix, block, row, units, strength);
      else product<PARTS<DTYPE>, 1>(sum, planes, matrix, block, row, units, strength);
#pragma unroll(SIZE<DTYPE> == 2 ? 4 : 1)
      for (u32 u = 0; u < 4; u++) {
        if (u >= units) break;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
          const float turned[4] = {sum[0][0][half * 2], sum[0][0][half * 2 + 1], sum[0][1][half * 2], sum[0][1][half * 2 + 1]};
          // In W's directions, from the product's first number.
          const u32 down = g + half * 8, right = t * 4;
          const u32 k = row + (axis == 0 ? down : right), at = u * 16 + (axis == 0 ? right : down), position = tile.first + block * size + k;
          if (k >= size || at >= width) continue;
          const u32 count = min(4u, axis == 0 ? width - at : size - k);
          if (!eights || !last) {
            write_scattered(job, part.order, make_float4(turned[0], turned[1], turned[2], turned[3]), count, position, from + at, last);
          } else if constexpr (DTYPE != NO_DTYPE) {
            const u32 place = part.order ? part.order[position] : position;
            const u32 to = axis == 0 ? place : from + at, column = axis == 0 ? from + at : place;
            if constexpr (DTYPE == BF16) {
              const u32 line = block * planes.padded + (axis == 0 ? slot(k) : k);
              ending.write<DTYPE, 4>(axis == 0 ? planes.four(line, at) : planes.four(at, line), turned, to, column);
            } else {
              ending.write<DTYPE, 4>(ending.old<DTYPE, 4>(to, column), turned, to, column);
            }
          }
        }
        // The next one moves up: in a loop the code for one serves all.
#pragma unroll
        for (int i = 0; i < 24; i++) sum[i / 8][i / 4 % 2][i % 4] = sum[i / 8 + 1][i / 4 % 2][i % 4];
      }
    }
  }
}

#define ROTATE_LARGE(name, dtype)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(LARGE_THREADS, 2) rotate_large_##name(const Rotation* rotations, const Tile* tiles) { \
    rotate_large<dtype>(rotations, tiles);                                                                                           \
  }

ROTATE_LARGE(f32, F32)
ROTATE_LARGE(f16, F16)
ROTATE_LARGE(bf16, BF16)
ROTATE_LARGE(e4m3, E4M3)
ROTATE_LARGE(e5m2, E5M2)

extern "C" __global__ void __launch_bounds__(LARGE_THREADS, 2) rotate_scratch(const Rotation* rotations, const Tile* tiles) {
  rotate_large<NO_DTYPE>(rotations, tiles);
}
