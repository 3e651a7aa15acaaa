// Norms for DoRA: V = W + sum of the inner terms, f = magnitude / |V| per row (axis 0) or per input channel (axis 1).
//
//   squares_DTYPE        products of any kind and plain terms, on what merge_DTYPE_full takes
//   squares_DTYPE_plain  no products
//   squares_any          any terms but SCALE and REPLACE, on any weight
//   gains                f of every row or column, from the sums
//
// squares: one block of 128 threads per strip of 64 x 64 tiles, a lane's elements as in tile.cuh. W passes through shared memory once, copied ahead; a
// lane reads only what it copied itself, so on axis 0 no warp waits for another. Factors are read from L2 and L1.
// target.out points at the sums, in fp32, one per tile and line: [column tile][row] on axis 0, [row tile][column] on axis 1. Each is written once:
// no atomics, the same bits from run to run.
// Bytes: each element of W read; of factors rank * (rows / 64 + columns) numbers a row of tiles; 4 written per 64 elements.
//
// Squares are summed in fp32: weights that are below 1e-19 or above 1e18 throughout are beyond it.
//
// gains: blocks of 256 threads, grid (any, norms). A block takes 32 magnitudes, a lane one of them, each of eight warps every eighth tile.
#include "tile.cuh"

// A lane's sums in a group of columns, as products leave them: [product][d], element 2 * product + d % 2 of the upper (d < 2) or lower row.
typedef float Group[4][4];

// What a lane knows of a group: rows and columns of its first element, whether they are in the weight.
struct Spot {
  u32 row, column;
  bool upper, lower;

  __device__ __forceinline__ Spot(const Target& target, u32 row, u32 column) : row(row), column(column) {
    upper = row < target.rows;
    lower = row + 8 < target.rows;
  }
};

// block += up @ down of one rank block and half a group: products 2 * half and 2 * half + 1. Small products first; what is left out is below 2^-24
// of the whole.
template <bool HALF, int UPS, int DOWNS>
__device__ __forceinline__ void add_block(float (&block)[2][4], const uint4 (&left)[UPS], const uint4 (&right)[DOWNS]) {
#pragma unroll
  for (int order = UPS - 1; order >= 0; order--) {
#pragma unroll
    for (int p = 0; p <= order; p++) {
      if (order - p >= DOWNS) continue;
      mma<HALF>(block[0], left[p], right[order - p].x, right[order - p].y);
      mma<HALF>(block[1], left[p], right[order - p].z, right[order - p].w);
    }
  }
}

// Tensor cores round towards zero, which would make every norm too small, the more so the more often a sum passes through them: every block once, and
// it is rounded to nearest into the sum.
__device__ __forceinline__ void add_rounded(Group& sum, int half, float coefficient, const float (&block)[2][4]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float& to = sum[2 * half + i / 4][i % 4];
    to = fmaf(coefficient, block[i / 4][i % 4], to);
  }
}

// total += coefficient * up @ down, in two groups, the second `other` uint4s behind the first. As many loads as there are registers for are issued
// before the first is needed.
template <bool HALF, int UPS, int DOWNS>
__device__ __forceinline__ void add_whole(Group (&total)[2], const uint4* up, const uint4* down, u32 other, u32 ranks, float coefficient) {
  constexpr u32 STEP = UPS == 1 ? 2 : 1;
#pragma unroll 1
  for (u32 left_over = ranks; left_over;) {
    uint4 left[STEP][UPS], right[STEP][4][DOWNS];  // [group * 2 + half]
    // After an odd number the last again, at 0: a branch would keep its loads back.
    const u32 next = left_over > 1 ? 1 : 0;
#pragma unroll
    for (u32 k = 0; k < STEP; k++) {
#pragma unroll
      for (int p = 0; p < UPS; p++) {
        left[k][p] = __ldg(up + (k * next * UPS + p) * 32);
        if (p >= DOWNS) continue;
#pragma unroll
        for (int i = 0; i < 4; i++) right[k][i][p] = __ldg(down + i / 2 * other + (k * next * DOWNS + p) * 64 + i % 2 * 32);
      }
    }
#pragma unroll
    for (u32 k = 0; k < STEP; k++) {
      const float factor = k && !next ? 0.0f : coefficient;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float block[2][4] = {};
        add_block<HALF, UPS, DOWNS>(block, left[k], right[k][i]);
        add_rounded(total[i / 2], i % 2, factor, block);
      }
    }
    up += STEP * UPS * 32;
    down += STEP * DOWNS * 64;
    left_over -= min(STEP, left_over);
  }
}

// sum += up @ down, in one group.
template <bool HALF, int UPS, int DOWNS>
__device__ __forceinline__ void add_pair(Group& sum, const uint4* up, const uint4* down, u32 ranks) {
#pragma unroll 1
  for (u32 k = 0; k < ranks; k++) {
    uint4 left[UPS], right[2][DOWNS];
#pragma unroll
    for (int p = 0; p < UPS; p++) {
      left[p] = __ldg(up + (k * UPS + p) * 32);
      if (p >= DOWNS) continue;
      right[0][p] = __ldg(down + (k * DOWNS + p) * 64);
      right[1][p] = __ldg(down + (k * DOWNS + p) * 64 + 32);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float block[2][4] = {};
      add_block<HALF, UPS, DOWNS>(block, left, right[half]);
      add_rounded(sum, half, 1.0f, block);
    }
  }
}

// Where a lane's fragments of a factor begin: of 16 rows, of 32 columns.
__device__ __forceinline__ const uint4* up_of(const void* up, u32 format, u32 ranks, u32 block) {
  return static_cast<const uint4*>(up) + u64(block) * ranks * up_parts(format) * 32 + (threadIdx.x & 31);
}

__device__ __forceinline__ const uint4* down_of(const void* down, u32 format, u32 ranks, u32 group) {
  return static_cast<const uint4*>(down) + u64(group) * ranks * down_parts(format) * 64 + (threadIdx.x & 31);
}

// total += a product of any kind and region, in one group. `row_block` and `group` are the warp's in the weight, in units of 16 rows and 32
// columns.
__device__ __forceinline__ void add_product(Group& total, float (*parked)[THREADS], const Term& term, const Spot& spot, u32 row_block,
                                            u32 group) {
  const u32 own_block = row_block - term.row / 16, own_group = group - term.column / 32;
  if (own_block >= row_blocks(term) || own_group >= (term.column % 32 + term.columns + 31) / 32) return;
  Group product;
#pragma unroll 1
  for (u32 second = 0;; second = 1) {
#pragma unroll
    for (int i = 0; i < 16; i++) product[i / 4][i % 4] = 0.0f;
    const u32 format = second ? term.format2 : term.format, ranks = second ? term.ranks2 : term.ranks;
    const uint4* up = up_of(second ? term.a2 : term.a, format, ranks, own_block);
    const uint4* down = down_of(second ? term.b2 : term.b, format, ranks, own_group);
    if (format == FORMAT_SPLIT) add_pair<false, 3, 3>(product, up, down, ranks);
    else if (format == FORMAT_UP_SPLIT) add_pair<false, 3, 1>(product, up, down, ranks);
    else if (format == FORMAT_F16) add_pair<true, 1, 1>(product, up, down, ranks);
    else add_pair<false, 1, 1>(product, up, down, ranks);
    if (term.kind != HADAMARD || second) break;
    // The first pair's, in shared memory: registers.
#pragma unroll
    for (int i = 0; i < 16; i++) parked[i][threadIdx.x] = product[i / 4][i % 4];
  }
  // Outside the region a product is zero, but for what is not finite in the factors.
  const bool upper = spot.row - term.row < term.rows, lower = spot.row + 8 - term.row < term.rows;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const bool in = (i / 2 % 2 ? lower : upper) && spot.column + i / 4 * 2 + i % 2 - term.column < term.columns;
    const float factor = term.coefficient * (term.kind == HADAMARD ? parked[i][threadIdx.x] : 1.0f);
    if (in) total[i / 4][i % 4] = fmaf(factor, product[i / 4][i % 4], total[i / 4][i % 4]);
  }
}

// total += the target's products, in a tile's two groups.
__device__ __forceinline__ void add_products(Group (&total)[2], float (*parked)[THREADS], const Target& target, const Term* terms,
                                             const Place<1>& place) {
#pragma unroll 1
  for (u32 n = 0; n < target.products; n++) {
    const Term& term = terms[n];
    if (term.kind == LOW_RANK && term.rows == target.rows && term.columns == target.columns) {
      if (place.row_block * 16 >= target.rows) continue;
      // A last tile may have only one group: taken twice, and nobody looks at the other.
      const u32 other = (place.group + 1) * 32 < target.columns ? term.ranks * down_parts(term.format) * 64 : 0;
      const uint4* up = up_of(term.a, term.format, term.ranks, place.row_block);
      const uint4* down = down_of(term.b, term.format, term.ranks, place.group);
      if (term.format == FORMAT_SPLIT) add_whole<false, 3, 3>(total, up, down, other, term.ranks, term.coefficient);
      else if (term.format == FORMAT_UP_SPLIT) add_whole<false, 3, 1>(total, up, down, other, term.ranks, term.coefficient);
      else if (term.format == FORMAT_F16) add_whole<true, 1, 1>(total, up, down, other, term.ranks, term.coefficient);
      else add_whole<false, 1, 1>(total, up, down, other, term.ranks, term.coefficient);
      continue;
    }
    // The groups take turns as the first: one piece of code, and registers are not indexed late.
#pragma unroll 1
    for (u32 group = 0; group < 2; group++) {
      add_product(total[0], parked, term, Spot(target, place.row, place.column + group * 32), place.row_block, place.group + group);
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const float sum = total[0][i / 4][i % 4];
        total[0][i / 4][i % 4] = total[1][i / 4][i % 4];
        total[1][i / 4][i % 4] = sum;
      }
    }
  }
}

// total += a plain KRON or DENSE. What lies outside the weight reads its last elements.
__device__ __forceinline__ void add_plain(Group& total, const Target& target, const Term& term, const Spot& spot) {
  const u32 dtype = term.kind == KRON ? term.format2 : term.format;
  const void* from = term.kind == KRON ? term.b : term.a;
  const u32 column = min(spot.column, target.columns - 8);
  uint4 low[2], high[2];
  float factor[2];
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const u32 row = min(spot.row + n * 8, target.rows - 1);
    u64 at = u64(row) * term.columns + column;
    factor[n] = term.coefficient;
    if (term.kind == KRON) {
      const u32 block = column / term.inner_columns;
      factor[n] *= read_as(term.format, term.a, u64(row / term.inner_rows) * term.outer_columns + block);
      at = u64(row % term.inner_rows) * term.inner_columns + (column - block * term.inner_columns);
    }
    const uint4* p = reinterpret_cast<const uint4*>(static_cast<const u8*>(from) + at * (dtype == F32 ? 4 : 2));
    low[n] = __ldg(p);
    high[n] = dtype == F32 ? __ldg(p + 1) : low[n];
  }
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const u32 words[8] = {low[n].x, low[n].y, low[n].z, low[n].w, high[n].x, high[n].y, high[n].z, high[n].w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const u32 code = dtype == F32 ? words[i] : words[i / 2] >> 16 * (i % 2) & 0xffff;
      const float value = dtype == F16 ? half_to_float(u16(code)) : bits_to_float(dtype == F32 ? code : code << 16);
      float& sum = total[i / 2][n * 2 + i % 2];
      sum = fmaf(factor[n], value, sum);
    }
  }
}

// Where the squares go.
struct Sums {
  float upper = 0.0f, lower = 0.0f;         // of the lane's rows in a tile
  float (*columns)[THREADS / 32][COLUMNS];  // [2]: so that one barrier a tile is enough
  const Target& target;

  __device__ __forceinline__ Sums(float (*columns)[THREADS / 32][COLUMNS], const Target& target) : columns(columns), target(target) {}

  // The group's V, zero outside of it.
  __device__ __forceinline__ void add(const Group& v, u32 column_tile, u32 group) {
    const u32 lane = threadIdx.x & 31;
    if (target.axis == 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float a = v[i / 2][i % 2], b = v[i / 2][2 + i % 2];
        upper = fmaf(a, a, upper);
        lower = fmaf(b, b, lower);
      }
      return;
    }
    float sums[8];
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = fmaf(v[i / 2][i % 2], v[i / 2][i % 2], v[i / 2][2 + i % 2] * v[i / 2][2 + i % 2]);
    // Over the eight lanes with the same columns: each step gives half of the sums away, until lane g of them is left with column g.
#pragma unroll
    for (int half = 4; half >= 1; half /= 2) {
      const bool second = lane & 4 * half;
#pragma unroll
      for (int i = 0; i < half; i++) {
        const float given = second ? sums[i] : sums[half + i];
        sums[i] = (second ? sums[half + i] : sums[i]) + __shfl_xor_sync(~0u, given, 4 * half);
      }
    }
    columns[column_tile % 2][threadIdx.x / 32][group * 32 + lane % 4 * 8 + lane / 4] = sums[0];
  }

  __device__ __forceinline__ void write(u32 row_tile, u32 column_tile) {
    float* out = static_cast<float*>(target.out);
    const u32 lane = threadIdx.x & 31;
    if (target.axis == 0) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        upper += __shfl_xor_sync(~0u, upper, step);
        lower += __shfl_xor_sync(~0u, lower, step);
      }
      const u32 row = (row_tile * (THREADS / 32) + threadIdx.x / 32) * 16 + lane % 4 * 8 + lane / 4;
      if (lane % 4 < 2 && row < target.rows) out[u64(column_tile) * target.rows + row] = lane % 4 ? lower : upper;
      upper = lower = 0.0f;
      return;
    }
    __syncthreads();
    const u32 column = column_tile * COLUMNS + threadIdx.x;
    if (threadIdx.x < COLUMNS && column < target.columns) {
      const float (&own)[THREADS / 32][COLUMNS] = columns[column_tile % 2];
      out[u64(row_tile) * target.columns + column] = (own[0][threadIdx.x] + own[1][threadIdx.x]) + (own[2][threadIdx.x] + own[3][threadIdx.x]);
    }
  }
};

// Tiles on the way and the one in use: four blocks with products, eight without, have enough of W in flight.
template <u32 DTYPE, bool PRODUCTS>
constexpr int STAGES = SIZE<DTYPE> == 1 ? 4 : SIZE<DTYPE> == 2 && PRODUCTS ? 3 : 2;

template <u32 DTYPE, bool PRODUCTS>
__device__ __forceinline__ void squares(const Target* targets, const Term* all, const Strip* strips) {
  constexpr int COUNT = STAGES<DTYPE, PRODUCTS>, AHEAD = COUNT - 1;
  __shared__ Stored<DTYPE> tiles[COUNT][4][THREADS];
  __shared__ float columns[2][THREADS / 32][COLUMNS];
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  const Term* const terms = work.terms;
  Place<1> place(strip.row_tile);
  Sums sums(columns, target);
  const auto copy = [&](u32 tile) {
    if (tile < strip.count) {
      place.move_to(strip.column_tile + tile);
      copy_tile<DTYPE>(tiles[tile % COUNT], target, place);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < AHEAD; i++) copy(i);
#pragma unroll 1
  for (u32 tile = 0; tile < strip.count; tile++) {
    copy(tile + AHEAD);
    place.move_to(strip.column_tile + tile);
    Group products[2] = {};
    if constexpr (PRODUCTS) {
      __shared__ float parked[16][THREADS];
      add_products(products, parked, target, terms, place);
    }
    const Stored<DTYPE> (*eights)[THREADS] = tiles[tile % COUNT];
#pragma unroll(PRODUCTS ? 2 : 1)
    for (u32 group = 0; group < 2; group++) {
      const Spot spot(target, place.row, place.column + group * 32);
      Group v;
#pragma unroll
      for (int i = 0; i < 16; i++) v[i / 4][i % 4] = PRODUCTS ? products[group][i / 4][i % 4] : 0.0f;
      for (u32 n = target.products; n < target.count; n++) add_plain(v, target, terms[n], spot);
      if (group == 0) wait_for_copies<AHEAD>();
      const bool in = spot.column < target.columns;
#pragma unroll
      for (int i = 0; i < 16; i++) {
        float& sum = v[i / 2 % 4][i / 8 * 2 + i % 2];
        sum = fmaf(eights[group * 2 + i / 8][threadIdx.x].value(i % 8), target.scale, sum);
        // What was not copied is whatever was there.
        if (!in || !(i / 8 ? spot.lower : spot.upper)) sum = 0.0f;
      }
      sums.add(v, strip.column_tile + tile, group);
    }
    sums.write(strip.row_tile, strip.column_tile + tile);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) squares_any(const Target* targets, const Term* all, const Strip* strips) {
  __shared__ float parked[16][THREADS];  // for what indexes a group late
  __shared__ float columns[2][THREADS / 32][COLUMNS];
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  const Term* const terms = work.terms;
  Place<1> place(strip.row_tile);
  Sums sums(columns, target);
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile++) {
    place.move_to(tile);
#pragma unroll 1
    for (u32 group = 0; group < 2; group++) {
      const Spot spot(target, place.row, place.column + group * 32);
      Group v = {};
#pragma unroll 1
      for (u32 n = 0; n < target.products; n++) add_product(v, parked, terms[n], spot, place.row_block, place.group + group);
#pragma unroll
      for (int i = 0; i < 16; i++) parked[i][threadIdx.x] = v[i / 4][i % 4];
#pragma unroll 1
      for (u32 i = 0; i < 16; i++) {
        const u32 row = spot.row + i / 2 % 2 * 8, column = spot.column + i / 4 * 2 + i % 2;
        float sum = 0.0f;
        if (row < target.rows && column < target.columns) {
          sum = parked[i][threadIdx.x];
          for (u32 n = target.products; n < target.count; n++) {
            if (inside(terms[n], row, column)) sum = fmaf(terms[n].coefficient, single(terms[n], row, column, 0.0f), sum);
          }
          const u64 at = row * target.base_row + (target.base_columns ? target.base_columns[column] : column);
          sum = fmaf(read_as(target.dtype, target.base, at), target.scale, sum);
        }
        parked[i][threadIdx.x] = sum;
      }
#pragma unroll
      for (int i = 0; i < 16; i++) v[i / 4][i % 4] = parked[i][threadIdx.x];
      sums.add(v, tile, group);
    }
    sums.write(strip.row_tile, tile);
  }
}

struct Norm {
  const float* partial;    // [parts][stride]
  const float* magnitude;  // [count]
  float* gain;             // f, [count * taps]
  float* less;             // f - 1
  u32 count, parts;
  u32 stride;  // rows or columns of the weight
  u32 taps;    // columns of a magnitude; 1 on axis 0
};

extern "C" __global__ void __launch_bounds__(256) gains(const Norm* norms) {
  constexpr u32 WARPS = 8;
  __shared__ double sums[WARPS][32];
  const Norm norm = norms[blockIdx.y];
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (u32 first = blockIdx.x * 32; first < norm.count; first += gridDim.x * 32) {
    const u32 i = first + lane;
    double sum = 0.0;
    if (i < norm.count) {
      const float* from = norm.partial + u64(i) * norm.taps;
      for (u32 tap = 0; tap < norm.taps; tap++) {
#pragma unroll 4
        for (u32 part = warp; part < norm.parts; part += WARPS) sum += __ldg(from + u64(part) * norm.stride + tap);
      }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && i < norm.count) {
      for (u32 other = 1; other < WARPS; other++) sum += sums[other][lane];
      const double f = sum > 0.0 ? norm.magnitude[i] / sqrt(sum) : 0.0;
      for (u32 tap = 0; tap < norm.taps; tap++) {
        norm.gain[u64(i) * norm.taps + tap] = float(f);
        norm.less[u64(i) * norm.taps + tap] = float(f - 1.0);
      }
    }
    __syncthreads();
  }
}

#define SQUARES_AS(name, blocks, body)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS, blocks) squares_##name(const Target* targets, const Term* terms, const Strip* strips) { \
    body(targets, terms, strips);                                                                                                             \
  }
// The number is how many blocks' registers a multiprocessor shall have room for.
#define SQUARES(name, dtype)                       \
  SQUARES_AS(name, 4, (squares<dtype, true>))      \
  SQUARES_AS(name##_plain, 8, (squares<dtype, false>))

SQUARES(f32, F32)
SQUARES(f16, F16)
SQUARES(bf16, BF16)
SQUARES(e4m3, E4M3)
SQUARES(e5m2, E5M2)
