// Tiles of a weight and the sum of terms on them.
//
// A block of four warps takes tiles of 4 * BLOCKS * 16 rows and 64 columns, a warp BLOCKS blocks of 16 rows and two groups of 32 columns. In each block
// and group lane (g, t) holds rows g and g + 8 and the eight columns from t * 8: as they lie in memory, 16 bytes of a 16-bit weight, and as products
// of fragments leave them (pack.cu). These eights are numbered block * 4 + group * 2 + half.
#pragma once
#include "common.cuh"

constexpr u32 THREADS = 128;
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
  __device__ __forceinline__ u32 row_of(u32 eight) const { return row + eight / 4 * 16 + eight % 2 * 8; }
  __device__ __forceinline__ u32 column_of(u32 eight) const { return column + eight / 2 % 2 * 32; }
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
template <u32 DTYPE, u32 BLOCKS>
__device__ __forceinline__ void copy_tile(Stored<DTYPE> (*eights)[THREADS], const Target& target, const Place<BLOCKS>& place) {
  const u8* base = static_cast<const u8*>(target.base);
#pragma unroll
  for (int n = 0; n < 4 * BLOCKS; n++) {
    const u32 row = place.row_of(n), column = place.column_of(n);
    if (row >= target.rows || column >= target.columns) continue;
    const u8* from = base + (row * target.base_row + column) * SIZE<DTYPE>;
    u8* to = reinterpret_cast<u8*>(&eights[n][threadIdx.x]);
    if constexpr (SIZE<DTYPE> == 1) copy_async<8>(to, from);
    else
#pragma unroll
      for (int i = 0; i < SIZE<DTYPE> / 2; i++) copy_async<16>(to + 16 * i, from + 16 * i);
  }
}

// The up factors of a warp's rows, kept in shared memory for the length of a strip as far as there is room; the others are read where they are.
// A lane reads only what it copied itself.
template <u32 BLOCKS>
struct Ups {
  uint4* kept;   // the warp's, [fragment][lane]
  u32 room;      // in fragments
  u32 used;

  __device__ __forceinline__ Ups(void* shared, u32 fragments_per_warp) {
    kept = static_cast<uint4*>(shared) + threadIdx.x / 32 * fragments_per_warp * 32 + (threadIdx.x & 31);
    room = fragments_per_warp;
    used = 0;
  }

  // Where the fragments of `up` are, or shall be copied to: [block][rank][part][lane].
  __device__ __forceinline__ const uint4* place(const void* up, u32 fragments, u32 row_block) {
    const u32 need = BLOCKS * fragments;
    if (used + need > room) return static_cast<const uint4*>(up) + u64(row_block) * fragments * 32 + (threadIdx.x & 31);
    used += need;
    return kept + (used - need) * 32;
  }

  // `blocks` is how many the factor has.
  __device__ __forceinline__ void copy(const void* up, u32 fragments, u32 row_block, u32 blocks) {
    if (used + BLOCKS * fragments > room) return;
    const uint4* from = static_cast<const uint4*>(up) + u64(row_block) * fragments * 32 + (threadIdx.x & 31);
    const u32 count = (row_block >= blocks ? 0 : blocks - row_block < BLOCKS ? blocks - row_block : BLOCKS) * fragments;
    for (u32 i = 0; i < count; i++) copy_async<16>(kept + (used + i) * 32, from + i * 32);
    used += BLOCKS * fragments;
  }
};

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
      for (u32 i = threadIdx.x; i < bytes / 4; i += THREADS) static_cast<u32*>(to)[i] = static_cast<const u32*>(from)[i];
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
      uint4 right[PARTS];
#pragma unroll
      for (int p = 0; p < PARTS; p++) right[p] = down[i][p * step + half * 32];
      // Small products first. What is left out is below 2^-24 of the whole.
#pragma unroll
      for (int order = PARTS - 1; order >= 0; order--) {
#pragma unroll
        for (int p = 0; p <= order; p++) {
#pragma unroll
          for (int n = 0; n < BLOCKS; n++) {
            mma<HALF>(products[n][i][2 * half], left[n][p], right[order - p].x, right[order - p].y);
            mma<HALF>(products[n][i][2 * half + 1], left[n][p], right[order - p].z, right[order - p].w);
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

// What a strip's tiles need, copied ahead into a ring in shared memory, in the order of use: a stage holds one or two rank blocks of a down factor, for
// all warps, and with a tile's first one comes the tile itself. A tile without products has one stage all the same.
template <u32 DTYPE, u32 BLOCKS, int STAGES>
struct Ring {
  using Tiles = Stored<DTYPE>[4 * BLOCKS][THREADS];
  static constexpr u32 DOWN = 3 * THREADS;  // uint4s of a stage: three parts of a rank block, or two rank blocks

  const Target& target;
  const Term* terms;
  Strip strip;
  Place<BLOCKS> place;
  Tiles* tiles;
  uint4* downs;
  // What is copied next: tile, term, whether the second pair, the first rank block.
  u32 tile = 0, tile_stage = 0, term, rank = 0, stage = 0;
  bool second = false;

  __device__ __forceinline__ Ring(const Target& target, const Term* terms, const Strip& strip, void* shared)
      : target(target), terms(terms), strip(strip), place(strip.row_tile), tiles(static_cast<Tiles*>(shared)) {
    downs = reinterpret_cast<uint4*>(tiles + STAGES);
    term = 0;
  }

  __device__ __forceinline__ void copy_next() {
    if (tile < strip.count) {
      if (rank == 0 && !second && term == 0) {
        place.move_to(strip.column_tile + tile);
        copy_tile<DTYPE, BLOCKS>(tiles[tile_stage], target, place);
      }
      bool last = true;
      if (term < target.products) {
        const Term& t = terms[term];
        const u32 parts = parts_of(second ? t.format2 : t.format), ranks = second ? t.ranks2 : t.ranks;
        const Groups groups(t, strip.column_tile + tile);
        const uint4* from = static_cast<const uint4*>(second ? t.b2 : t.b) + threadIdx.x % 64;
        from += (groups.group[threadIdx.x / 64] * ranks + rank) * parts * u64(64);
        uint4* to = downs + stage * DOWN + threadIdx.x;
        const u32 until = min(rank + (parts == 1 ? 2 : 1), ranks), count = (until - rank) * parts;
        if (groups.any) {
#pragma unroll
          for (u32 i = 0; i < 3; i++) {
            if (i < count) copy_async<16>(to + i * THREADS, from + i * 64);
          }
        }
        rank = until;
        if (rank == ranks) {
          rank = 0;
          second = t.kind == HADAMARD && !second;
          if (!second) term++;
        }
        last = rank == 0 && !second && term == target.products;
      }
      if (last) {
        tile++;
        tile_stage = tile_stage + 1 == STAGES ? 0 : tile_stage + 1;
        term = 0;
      }
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    commit_copies();
  }
};

// The consumer's side: the stage in use.
template <u32 DTYPE, u32 BLOCKS, int STAGES>
struct Reader {
  Ring<DTYPE, BLOCKS, STAGES> ring;
  u32 stage = 0;

  __device__ __forceinline__ Reader(const Target& target, const Term* terms, const Strip& strip, void* shared) : ring(target, terms, strip, shared) {}

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) ring.copy_next();
  }

  // The next stage's down fragments, of the calling warp's lane.
  __device__ __forceinline__ const uint4* next() {
    wait_for_copies<STAGES - 2>();
    // All warps have this stage now, and are done with the one before it, which is filled anew.
    __syncthreads();
    ring.copy_next();
    const uint4* down = ring.downs + stage * ring.DOWN + (threadIdx.x & 31);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    return down;
  }

  // products += up @ down, over all stages of one pair.
  template <bool HALF, int PARTS>
  __device__ __forceinline__ void add_pair(Sum (&products)[BLOCKS], const uint4* up, const void*, u32 ranks, const Groups&, bool any) {
    constexpr u32 STEP = PARTS == 1 ? 2 : 1;
    for (u32 k = 0; k < ranks; k += STEP) {
      const uint4* first = next();
      if (!any) continue;
#pragma unroll
      for (u32 i = 0; i < STEP; i++) {
        if (k + i >= ranks) break;
        const uint4* const down[2] = {first + i * THREADS, first + i * THREADS + 64};
        add_product<HALF, PARTS>(products, up + (k + i) * PARTS * 32, ranks * PARTS * 32, down, THREADS);
      }
    }
  }
};

// Without a ring: factors are read where they are.
struct Direct {
  template <bool HALF, int PARTS>
  __device__ __forceinline__ void add_pair(Sum (&products)[1], const uint4* up, const void* down, u32 ranks, const Groups& at, bool any) {
    if (!any) return;
    const uint4* from = static_cast<const uint4*>(down) + (threadIdx.x & 31);
#pragma unroll 1
    for (u32 k = 0; k < ranks; k++) {
      const uint4* const groups[2] = {from + (u64(at.group[0]) * ranks + k) * PARTS * 64, from + (u64(at.group[1]) * ranks + k) * PARTS * 64};
      add_product<HALF, PARTS>(products, up + k * PARTS * 32, ranks * PARTS * 32, groups, 64);
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
  const float coefficient = term.coefficient;
  if (!term.gain && term.rows == target.rows && term.columns == target.columns) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      float& sum = total[i / 16][i / 4 % 4][i % 4];
      sum = fmaf(coefficient, product[i / 16][i / 4 % 4][i % 4], sum);
    }
    return;
  }
  const bool upper = place.row - term.row < term.rows, lower = place.row + 8 - term.row < term.rows;
  float rows[2] = {coefficient, coefficient};
  if (term.gain && term.gain_axis == 0) {
    rows[0] *= upper ? __ldg(term.gain + place.row - term.row) : 0.0f;
    rows[1] *= lower ? __ldg(term.gain + place.row + 8 - term.row) : 0.0f;
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

// Copies the up factors of the target's products, as far as there is room.
template <u32 BLOCKS>
__device__ __forceinline__ void copy_ups(Ups<BLOCKS> ups, const Target& target, const Term* terms, const Place<BLOCKS>& place) {
  for (u32 i = 0; i < target.products; i++) {
    const Term& term = terms[i];
    const u32 row_block = place.row_block - term.row / 16;
    ups.copy(term.a, term.ranks * parts_of(term.format), row_block, row_blocks(term));
    if (term.kind == HADAMARD) ups.copy(term.a2, term.ranks2 * parts_of(term.format2), row_block, row_blocks(term));
  }
}

// total += the target's products on the warp's part of it.
template <class Reader>
__device__ __forceinline__ void sum_products(Sum& total, Reader& reader, Ups<1> ups, const Target& target, const Term* terms,
                                             const Place<1>& place, u32 column_tile) {
  const auto product_of = [&](Sum(&product)[1], const uint4* up, const void* down, u32 format, u32 ranks, const Groups& groups, bool any) {
    clear(product[0]);
    if (format == FORMAT_SPLIT) reader.template add_pair<false, 3>(product, up, down, ranks, groups, any);
    else if (format == FORMAT_F16) reader.template add_pair<true, 1>(product, up, down, ranks, groups, any);
    else reader.template add_pair<false, 1>(product, up, down, ranks, groups, any);
  };
  for (u32 i = 0; i < target.products; i++) {
    const Term& term = terms[i];
    const u32 row_block = place.row_block - term.row / 16;
    const Groups groups(term, column_tile);
    const bool any = groups.any && row_block < row_blocks(term);
    Sum product[1];
    product_of(product, ups.place(term.a, term.ranks * parts_of(term.format), row_block), term.b, term.format, term.ranks, groups, any);
    if (term.kind == HADAMARD) {
      Sum other[1];
      product_of(other, ups.place(term.a2, term.ranks2 * parts_of(term.format2), row_block), term.b2, term.format2, term.ranks2, groups, any);
#pragma unroll
      for (int j = 0; j < 32; j++) product[0][j / 16][j / 4 % 4][j % 4] *= other[0][j / 16][j / 4 % 4][j % 4];
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

  __device__ __forceinline__ void load(int first, const Target& target, const Term& term, const Place<1>& place) {
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

  template <class Value>
  __device__ __forceinline__ void add_values(Sum& total, int first, float coefficient, Value value) const {
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& sum = total[(first + n) / 2][i / 2][(first + n) % 2 * 2 + i % 2];
        sum = fmaf(coefficient * factor[n], value(n, i), sum);
      }
    }
  }

  // total += the term. `eights` is the lane's part of the weight.
  template <u32 DTYPE>
  __device__ __forceinline__ void add(Sum& total, int first, const Stored<DTYPE> (*eights)[THREADS], const Target& target, const Term& term) const {
    const auto word = [&](int n, int i) {
      const uint4& four = i < 4 ? low[n] : high[n];
      return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
    };
    const u32 dtype = term.kind == KRON ? term.format2 : term.format;
    if (term.kind == SCALE_ROWS) {
      add_values(total, first, term.coefficient * target.scale, [&](int n, int i) { return eights[first + n][threadIdx.x].value(i); });
    } else if (term.kind == SCALE_COLUMNS) {
      add_values(total, first, term.coefficient * target.scale, [&](int n, int i) { return bits_to_float(word(n, i)) * eights[first + n][threadIdx.x].value(i); });
    } else if (dtype == F32) {
      add_values(total, first, term.coefficient, [&](int n, int i) { return bits_to_float(word(n, i)); });
    } else if (dtype == BF16) {
      add_values(total, first, term.coefficient, [&](int n, int i) { return bits_to_float(i % 2 ? word(n, i / 2) & 0xffff0000 : word(n, i / 2) << 16); });
    } else {
      add_values(total, first, term.coefficient, [&](int n, int i) { return half_to_float(u16(i % 2 ? word(n, i / 2) >> 16 : word(n, i / 2))); });
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
