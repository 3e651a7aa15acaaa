// Tiles of a weight and the sum of terms on them.
//
// A block of four warps takes tiles of 4 * BLOCKS * 16 rows and 64 columns, a warp BLOCKS blocks of 16 rows and two groups of 32 columns. In each block
// and group lane (g, t) holds rows g and g + 8 and the eight columns from t * 8: as they lie in memory, 16 bytes of a 16-bit weight, and as products
// of fragments leave them (pack.cu). These eights are numbered block * 4 + group * 2 + half.
#pragma once
#include "common.cuh"

#ifndef NWARPS
#define NWARPS 4
#endif
constexpr u32 THREADS = 32 * NWARPS;
constexpr u32 COLUMNS = 64;

// [group][product][d]: element 2 * product + d % 2 of the eight in half d / 2.
typedef float Sum[2][4][4];

template <u32 BLOCKS>
struct Place {
  u32 lane, row, column;  // the lane's first row and column in the weight
  u32 row_block, group;   // the warp's first, in units of 16 rows and 32 columns

  __device__ __forceinline__ explicit Place(u32 row_tile) {
    lane = threadIdx.x & 31;
    row_block = (row_tile * (THREADS / 32) + threadIdx.x / 32) * BLOCKS;
    row = row_block * 16 + lane / 4;
  }
  __device__ __forceinline__ void move_to(u32 column_tile) {
    group = column_tile * (COLUMNS / 32);
    column = group * 32 + lane % 4 * 8;
  }
  static constexpr u32 EIGHTS = 4 * BLOCKS;
  __device__ __forceinline__ u32 row_of(u32 eight) const { return row + eight / 4 * 16 + eight % 2 * 8; }
  __device__ __forceinline__ u32 column_of(u32 eight) const { return column + eight / 2 % 2 * 32; }
};

// The same tile of 64 x 64 for what needs no products: a warp has 16 rows, eight lanes a row of all 64 columns.
struct Lines {
  static constexpr u32 EIGHTS = 4;
  u32 row, column;

  __device__ __forceinline__ explicit Lines(u32 row_tile) : row((row_tile * (THREADS / 32) + threadIdx.x / 32) * 16 + threadIdx.x % 32 / 8) {}
  __device__ __forceinline__ void move_to(u32 column_tile) { column = column_tile * COLUMNS + threadIdx.x % 8 * 8; }
  __device__ __forceinline__ u32 row_of(u32 eight) const { return row + eight * 4; }
  __device__ __forceinline__ u32 column_of(u32) const { return column; }
};

template <u32 DTYPE>
constexpr int SIZE = DTYPE == F32 ? 4 : DTYPE == F16 || DTYPE == BF16 ? 2 : 1;

// Eight stored elements that lie together, at a multiple of their size.
template <u32 DTYPE>
struct alignas(SIZE<DTYPE> == 1 ? 8 : 16) Stored {
  u32 raw[2 * SIZE<DTYPE>];

  __device__ __forceinline__ u32 code(int i) const {
    if constexpr (SIZE<DTYPE> == 4) return raw[i];
    else if constexpr (SIZE<DTYPE> == 2) return raw[i / 2] >> 16 * (i % 2) & 0xffff;
    else return raw[i / 4] >> 8 * (i % 4) & 0xff;
  }

  __device__ __forceinline__ float value(int i) const {
    if constexpr (DTYPE == BF16) return bits_to_float(i % 2 ? raw[i / 2] & 0xffff0000 : raw[i / 2] << 16);
    else return decode(DTYPE, code(i));
  }

  __device__ __forceinline__ void values(float (&to)[8]) const {
    if constexpr (DTYPE == E4M3) {
#pragma unroll
      for (int i = 0; i < 4; i++) read_e4m3_pair(raw[i / 2] >> 16 * (i % 2), to[2 * i], to[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) to[i] = value(i);
    }
  }

  __device__ __forceinline__ void set(const u32 (&codes)[8]) {
#pragma unroll
    for (int i = 0; i < 2 * SIZE<DTYPE>; i++) {
      if constexpr (SIZE<DTYPE> == 4) raw[i] = codes[i];
      else if constexpr (SIZE<DTYPE> == 2) raw[i] = codes[2 * i] | codes[2 * i + 1] << 16;
      else raw[i] = codes[4 * i] | codes[4 * i + 1] << 8 | codes[4 * i + 2] << 16 | codes[4 * i + 3] << 24;
    }
  }

  __device__ __forceinline__ void store(void* to) const {
    if constexpr (SIZE<DTYPE> == 1) {
      *static_cast<uint2*>(to) = make_uint2(raw[0], raw[1]);
    } else {
#pragma unroll
      for (int i = 0; i < SIZE<DTYPE> / 2; i++) {
        static_cast<uint4*>(to)[i] = make_uint4(raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]);
      }
    }
  }
};

// ---- the weight, on its way through shared memory

template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
#else
  if constexpr (BYTES == 16) *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
  else *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
#endif
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last `LEFT` groups of copies are there.
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Enqueues the lane's part of a tile of the weight, whose columns lie side by side in multiples of eight and whose rows begin at 16 bytes (8 of 8-bit
// ones). Every lane reads only what it copied itself. What lies outside the weight stays what it was.
template <u32 DTYPE, class Place>
__device__ __forceinline__ void copy_tile(Stored<DTYPE> (*eights)[THREADS], const Target& target, const Place& place) {
  const u8* base = static_cast<const u8*>(target.base) + (place.row * target.base_row + place.column) * SIZE<DTYPE>;
  const u64 step = target.base_row * SIZE<DTYPE>;
#pragma unroll
  for (u32 n = 0; n < Place::EIGHTS; n++) {
    const u32 down = place.row_of(n) - place.row, right = place.column_of(n) - place.column;
    if (place.row + down >= target.rows || place.column + right >= target.columns) continue;
    const u8* from = base + down * step + right * SIZE<DTYPE>;
    u8* to = reinterpret_cast<u8*>(&eights[n][threadIdx.x]);
    if constexpr (SIZE<DTYPE> == 1) copy_async<8>(to, from);
    else
#pragma unroll
      for (int i = 0; i < SIZE<DTYPE> / 2; i++) copy_async<16>(to + 16 * i, from + 16 * i);
  }
}

__device__ __forceinline__ u32 parts_of(u32 format) { return format == FORMAT_SPLIT ? 3 : 1; }

__device__ __forceinline__ u32 row_blocks(const Term& term) { return (term.row % 16 + term.rows + 15) / 16; }

// What a strip is about, at hand: read from shared memory again and again rather than kept in registers.
struct Work {
  static constexpr u32 TERMS = 12;
  Target target;
  Term kept[TERMS];
  const Term* terms;  // the target's first; in global memory where there are more

  __device__ __forceinline__ void load(const Target* targets, const Term* all, u32 index) {
    const auto copy = [](void* to, const void* from, u32 bytes) {
      for (u32 i = threadIdx.x; i < bytes / 4; i += blockDim.x) static_cast<u32*>(to)[i] = static_cast<const u32*>(from)[i];
    };
    const Target& from = targets[index];
    const u32 first = from.first, count = from.count;
    copy(&target, &from, sizeof(Target));
    if (count <= TERMS) copy(kept, all + first, count * sizeof(Term));
    if (threadIdx.x == 0) terms = count <= TERMS ? kept : all + first;
    __syncthreads();
  }
};

// ---- products

__device__ __forceinline__ void clear(Sum& sum) {
#pragma unroll
  for (int i = 0; i < 32; i++) sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
}

// products[block] += up @ down over one rank block. `up` are the warp's fragments, blocks `up_step` apart, `down` those of two groups, parts `step` apart.
template <bool HALF, int PARTS, u32 BLOCKS>
__device__ __forceinline__ void add_product(Sum (&products)[BLOCKS], const uint4* up, u32 up_step, const uint4* const (&down)[2], u32 step) {
  uint4 left[BLOCKS][PARTS];
#pragma unroll
  for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
    for (int p = 0; p < PARTS; p++) left[n][p] = up[n * up_step + p * 32];
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // Small products first. What is left out is below 2^-24 of the whole.
#pragma unroll
      for (int q = PARTS - 1; q >= 0; q--) {
        const uint4 right = down[i][q * step + half * 32];
#pragma unroll
        for (int p = PARTS - 1 - q; p >= 0; p--) {
#pragma unroll
          for (int n = 0; n < BLOCKS; n++) {
            mma<HALF>(products[n][i][2 * half], left[n][p], right.x, right.y);
            mma<HALF>(products[n][i][2 * half + 1], left[n][p], right.z, right.w);
          }
        }
      }
    }
  }
}

// Which groups of the term's down factor a tile needs; fragments are aligned with the weight, so a region may begin within its first group. A tile with
// only one takes it twice; `any` is false without.
struct Groups {
  u32 group[2];
  bool any;

  __device__ __forceinline__ Groups(const Term& term, u32 column_tile) {
    const u32 count = (term.column % 32 + term.columns + 31) / 32;
    const u32 own[2] = {column_tile * 2 - term.column / 32, column_tile * 2 + 1 - term.column / 32};
    any = own[0] < count || own[1] < count;
    group[0] = own[0] < count ? own[0] : own[1];
    group[1] = own[1] < count ? own[1] : own[0];
  }
};

// A pair of factors as fragments.
struct Pair {
  const uint4 *up, *down;
  u32 format, ranks;

  __device__ __forceinline__ Pair(const Term& term, bool second) {
    up = static_cast<const uint4*>(second ? term.a2 : term.a);
    down = static_cast<const uint4*>(second ? term.b2 : term.b);
    format = second ? term.format2 : term.format;
    ranks = second ? term.ranks2 : term.ranks;
  }
  // Of a block of 16 rows or half a group of 32 columns.
  __device__ __forceinline__ u32 fragments() const { return ranks * parts_of(format); }
};

__device__ __forceinline__ u32 pairs_of(const Term& term) { return term.kind == HADAMARD ? 2 : 1; }

// The up factors of a block's rows, kept in shared memory for the length of a strip as far as there is room, which counts fragments of a warp; the
// others are read where they are.
template <u32 BLOCKS>
struct Ups {
  uint4* kept;  // [pair][block of 16 rows][rank block][part][lane]
  u32 room;
  u32 used;

  __device__ __forceinline__ Ups(void* shared, u32 fragments_per_warp) : kept(static_cast<uint4*>(shared)), room(fragments_per_warp), used(0) {}

  // Takes room for the pair; NULL: there is none.
  __device__ __forceinline__ uint4* take(const Pair& pair) {
    const u32 need = BLOCKS * pair.fragments();
    if (used + need > room) return nullptr;
    used += need;
    return kept + (used - need) * THREADS;
  }

  // The fragments of the warp's first block of rows, which is the factor's `row_block`th.
  __device__ __forceinline__ const uint4* place(const Pair& pair, u32 row_block) {
    const uint4* there = take(pair);
    const u32 block = there ? threadIdx.x / 32 * BLOCKS : row_block;
    return (there ? there : pair.up) + u64(block) * pair.fragments() * 32 + (threadIdx.x & 31);
  }
};

// Without a ring: factors are read where they are.
struct Direct {
  // products += up @ down. `up_step`: between blocks of rows.
  template <bool HALF, int PARTS, u32 BLOCKS>
  __device__ __forceinline__ void add_pair(Sum (&products)[BLOCKS], const uint4* up, u32 up_step, const Pair& pair, const Groups& at, bool any) {
    if (!any) return;
    const uint4* from = pair.down + (threadIdx.x & 31);
    const u32 ranks = pair.ranks;
#pragma unroll 1
    for (u32 k = 0; k < ranks; k++) {
      const uint4* const groups[2] = {from + (u64(at.group[0]) * ranks + k) * PARTS * 64, from + (u64(at.group[1]) * ranks + k) * PARTS * 64};
      add_product<HALF, PARTS>(products, up + k * PARTS * 32, up_step, groups, 64);
    }
  }
};

// Whether element (row, column) of the weight lies in the term's region.
__device__ __forceinline__ bool inside(const Term& term, u32 row, u32 column) {
  return row - term.row < term.rows && column - term.column < term.columns;
}

__device__ __forceinline__ float gain_at(const Term& term, u32 row, u32 column) {
  return term.gain ? __ldg(term.gain + (term.gain_axis == 0 ? row - term.row : column - term.column)) : 1.0f;
}

// total += coefficient * gain * product, inside the region: outside it a product is zero, but for what is not finite in the factors.
__device__ __forceinline__ void add_scaled(Sum& total, const Sum& product, const Target& target, const Term& term, const Place<1>& place) {
  const bool upper = place.row - term.row < term.rows, lower = place.row + 8 - term.row < term.rows;
  float rows[2] = {term.coefficient, term.coefficient};
  if (term.gain && term.gain_axis == 0) {
    rows[0] *= upper ? __ldg(term.gain + place.row - term.row) : 0.0f;
    rows[1] *= lower ? __ldg(term.gain + place.row + 8 - term.row) : 0.0f;
  }
  if (term.rows == target.rows && term.columns == target.columns && !(term.gain && term.gain_axis == 1)) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      float& sum = total[i / 16][i / 4 % 4][i % 4];
      sum = fmaf(rows[i / 2 % 2], product[i / 16][i / 4 % 4][i % 4], sum);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const u32 column = place.column + i / 8 * 32 + i % 8 - term.column;
    if (column >= term.columns) continue;
    const float gain = term.gain && term.gain_axis == 1 ? __ldg(term.gain + column) : 1.0f;
    float* sums = total[i / 8][i / 2 % 4];
    const float* products = product[i / 8][i / 2 % 4];
    if (upper) sums[i % 2] = fmaf(rows[0] * gain, products[i % 2], sums[i % 2]);
    if (lower) sums[2 + i % 2] = fmaf(rows[1] * gain, products[2 + i % 2], sums[2 + i % 2]);
  }
}

// total += the target's products on the warp's part of it.
template <class Reader>
__device__ __forceinline__ void sum_products(Sum& total, Reader& reader, Ups<1> ups, const Target& target, const Term* terms,
                                             const Place<1>& place, u32 column_tile) {
#pragma unroll 1
  for (u32 i = 0; i < target.products; i++) {
    const Term& term = terms[i];
    const u32 row_block = place.row_block - term.row / 16, pairs = pairs_of(term);
    const Groups groups(term, column_tile);
    const bool any = groups.any && row_block < row_blocks(term);
    Sum product[1], first;
#pragma unroll 1
    for (u32 n = 0; n < pairs; n++) {
      const Pair pair(term, n);
      const uint4* up = ups.place(pair, row_block);
      clear(product[0]);
      if (groups.any) {
        if (pair.format == FORMAT_SPLIT) reader.template add_pair<false, 3>(product, up, 0, pair, groups, any);
        else if (pair.format == FORMAT_F16) reader.template add_pair<true, 1>(product, up, 0, pair, groups, any);
        else reader.template add_pair<false, 1>(product, up, 0, pair, groups, any);
      }
      if (n + 1 < pairs) {
#pragma unroll
        for (int j = 0; j < 32; j++) first[j / 16][j / 4 % 4][j % 4] = product[0][j / 16][j / 4 % 4][j % 4];
      } else if (pairs > 1) {
#pragma unroll
        for (int j = 0; j < 32; j++) product[0][j / 16][j / 4 % 4][j % 4] *= first[j / 16][j / 4 % 4][j % 4];
      }
    }
    if (any) add_scaled(total, product[0], target, term, place);
  }
}

// ---- what needs no product

// COUNT eights of a plain term on their way: all loads are issued before the first is needed. What lies outside the weight reads its last elements.
template <int COUNT>
struct Plain {
  uint4 low[COUNT], high[COUNT];  // fp32 ones need both
  float factor[COUNT];

  template <class Place>
  __device__ __forceinline__ void load(int first, const Target& target, const Term& term, const Place& place) {
    const u32 dtype = term.kind == KRON ? term.format2 : term.kind == DENSE ? term.format : u32(F32);
    const u8* from = static_cast<const u8*>(term.kind == KRON ? term.b : term.a);
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
      const u32 row = min(place.row_of(first + n), target.rows - 1), column = min(place.column_of(first + n), target.columns - 8);
      factor[n] = 1.0f;
      u64 at = u64(row) * term.columns + column;
      if (term.kind == KRON) {
        const u32 block = column / term.inner_columns;
        factor[n] = read_as(term.format, term.a, u64(row / term.inner_rows) * term.outer_columns + block);
        at = u64(row % term.inner_rows) * term.inner_columns + (column - block * term.inner_columns);
      } else if (term.kind == SCALE_COLUMNS) {
        at = column;
      } else if (term.kind == SCALE_ROWS) {
        factor[n] = __ldg(reinterpret_cast<const float*>(from) + row);
        continue;
      }
      const uint4* p = reinterpret_cast<const uint4*>(from + at * (dtype == F32 ? 4 : 2));
      low[n] = __ldg(p);
      if (dtype == F32) high[n] = __ldg(p + 1);
    }
  }

  // total += the term. `eights` is the lane's part of the weight.
  template <u32 DTYPE>
  __device__ __forceinline__ void add(Sum& total, int first, const Stored<DTYPE> (*eights)[THREADS], const Target& target, const Term& term) const {
    const bool scales = term.kind == SCALE_ROWS || term.kind == SCALE_COLUMNS;
    const u32 dtype = term.kind == KRON ? term.format2 : term.kind == DENSE ? term.format : u32(F32);
    const float coefficient = scales ? term.coefficient * target.scale : term.coefficient;
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
      float values[8];
      if (dtype == F32) {
        const float4 a = reinterpret_cast<const float4&>(low[n]), b = reinterpret_cast<const float4&>(high[n]);
        const float all[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = all[i];
      } else if (dtype == BF16) {
        reinterpret_cast<const Stored<BF16>&>(low[n]).values(values);
      } else {
        reinterpret_cast<const Stored<F16>&>(low[n]).values(values);
      }
      if (scales) {
        float w[8];
        eights[first + n][threadIdx.x].values(w);
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = term.kind == SCALE_ROWS ? w[i] : w[i] * values[i];
      }
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& sum = total[(first + n) / 2][i / 2][(first + n) % 2 * 2 + i % 2];
        sum = fmaf(coefficient * factor[n], values[i], sum);
      }
    }
  }
};

// One element of a term that needs no product; w is the weight's.
__device__ __forceinline__ float single(const Term& term, u32 row, u32 column, float w) {
  const u32 r = row - term.row, c = column - term.column;
  switch (term.kind) {
    case SCALE_ROWS: return static_cast<const float*>(term.a)[r] * w;
    case SCALE_COLUMNS: return static_cast<const float*>(term.a)[c] * w;
    case KRON:
      return read_as(term.format, term.a, u64(r / term.inner_rows) * term.outer_columns + c / term.inner_columns) *
             read_as(term.format2, term.b, u64(r % term.inner_rows) * term.inner_columns + c % term.inner_columns);
    default: return read_as(term.format, term.a, u64(r) * term.columns + c);
  }
}

// The sums of a block's lanes in shared memory, for what indexes them late: element i of eight n.
struct Parked {
  float (*sums)[THREADS];  // [32]

  __device__ __forceinline__ float& at(u32 n, u32 i) { return sums[n * 8 + i][threadIdx.x]; }

  __device__ __forceinline__ void park(const Sum& total) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
#pragma unroll
      for (int i = 0; i < 8; i++) at(n, i) = total[n / 2][i / 2][n % 2 * 2 + i % 2];
    }
  }
};

// sums += the terms that need no product. `value(n, i)` is the weight's element.
template <class Value>
__device__ __forceinline__ void add_single(Parked sums, const Target& target, const Term* terms, const Place<1>& place,
                                           Value value) {
  for (u32 k = target.products; k < target.count; k++) {
    const Term& term = terms[k];
    if (term.kind == REPLACE) continue;
#pragma unroll 1
    for (u32 e = 0; e < 32; e++) {
      const u32 n = e / 8, row = place.row_of(n), column = place.column_of(n) + e % 8;
      if (!inside(term, row, column) || row >= target.rows || column >= target.columns) continue;
      const float factor = term.coefficient * gain_at(term, row, column);
      sums.at(n, e % 8) = fmaf(factor, single(term, row, column, value(n, e % 8)), sums.at(n, e % 8));
    }
  }
}
