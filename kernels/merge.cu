// W' = round(W + sum of terms), every tile of every weight in one launch.
//
// Grid: one block of 128 threads per strip of tiles. W is copied ahead through shared memory, read once and written once; factors come as fragments
// from L2, most of them once per block; the sums stay in registers, in fp32.
// Bytes: each element of W read and written; of factors rank * (rows / 64 + columns) numbers a strip.
//
//   merge_DTYPE        all terms are low-rank products of 16-bit factors on whole blocks; tiles of 128 x 64
//   merge_DTYPE_plain  all terms are plain; 64 x 64
//   merge_DTYPE_full   products of any kind and plain terms; 64 x 64
//   merge_any          any terms on any weight: strides, odd sizes, odd addresses, one element at a time; 64 x 64
#include "tile.cuh"

// What W becomes moves in first: taking W out before gives, at strength 1, the value itself. Which elements did is told.
__device__ __forceinline__ u32 replace(float (&w)[8], const Target& target, const Term* terms, u32 row, u32 column) {
  float pristine[8];
  u32 replaced = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) pristine[i] = w[i];
  for (u32 n = target.products; n < target.count; n++) {
    const Term& term = terms[n];
    if (term.kind != REPLACE) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (!inside(term, row, column + i)) continue;
      replaced |= 1u << i;
      const float value = single(term, row, column + i, 0.0f);
      // An infinite W is taken out as well.
      w[i] = term.coefficient == 1.0f && w[i] == pristine[i] ? value : (w[i] - term.coefficient * pristine[i]) + term.coefficient * value;
    }
  }
  return replaced;
}

// The new codes of eight elements. Where nothing is added every bit stays, -0 and NaN included.
template <bool REPLACES>
__device__ __forceinline__ void finish(u32 dtype, u32 (&codes)[8], const float (&delta)[8], const Target& target, const Term* terms,
                                       u32 row, u32 column) {
  float w[8];
#pragma unroll
  for (int i = 0; i < 8; i++) w[i] = decode(dtype, codes[i]) * target.scale;
  const u32 replaced = REPLACES ? replace(w, target, terms, row, column) : 0;
  const u64 element = u64(row) * target.columns + column;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float sum = delta[i] == 0.0f ? w[i] : w[i] + delta[i];
    u32 random = 0;
    if (dtype >= E4M3) {
      if (target.scale != 1.0f) sum = sum / target.scale;
      if (target.stochastic) random = noise((element + i) / 2, target.seed) >> (element + i) % 2 * 16 & 0xffff;
    }
    if (delta[i] != 0.0f || replaced >> i & 1) codes[i] = encode(dtype, sum, target.stochastic, random);
  }
}

// Rounds and writes one eight; `sum` points at its first element in a `Sum`.
template <u32 DTYPE>
__device__ __forceinline__ void write_eight(const Stored<DTYPE>& old, const Sum& total, float coefficient, int group, int half, const Target& target,
                                            u32 row, u32 column) {
  if (row >= target.rows || column >= target.columns) return;
  Stored<DTYPE> result;
  if constexpr (SIZE<DTYPE> == 2) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float low = total[group][j][half * 2] * coefficient, high = total[group][j][half * 2 + 1] * coefficient;
      const float a = old.value(2 * j) + low, b = old.value(2 * j + 1) + high;
      const u32 sum = DTYPE == BF16 ? pack_bf16(a, b) : pack_half(a, b);
      const u32 keep = (low == 0.0f ? 0xffffu : 0u) | (high == 0.0f ? 0xffff0000u : 0u);
      result.raw[j] = (old.raw[j] & keep) | (sum & ~keep);
    }
  } else {
    u32 codes[8];
    float delta[8];
#pragma unroll
    for (int i = 0; i < 8; i++) codes[i] = old.code(i), delta[i] = total[group][i / 2][half * 2 + i % 2] * coefficient;
    finish<false>(DTYPE, codes, delta, target, nullptr, row, column);
    result.set(codes);
  }
  result.store(static_cast<u8*>(target.out) + (row * target.out_row + column) * SIZE<DTYPE>);
}

extern __shared__ uint4 shared[];

// How far ahead tiles and factors are copied. src/merge/cuda/launch.rs counts the bytes too.
template <u32 DTYPE>
constexpr int STAGES = 3;

// The up factors are kept behind the ring.
template <u32 DTYPE, u32 BLOCKS>
__device__ __forceinline__ Ups<BLOCKS> ups_of(u32 room) {
  return Ups<BLOCKS>(shared + STAGES<DTYPE> * (4 * BLOCKS * THREADS * SIZE<DTYPE> / 2 + 3 * THREADS), room);
}

template <u32 DTYPE>
__device__ __forceinline__ void merge_products(const Target* targets, const Term* all, const Strip* strips, u32 room) {
  constexpr u32 BLOCKS = SIZE<DTYPE> == 4 ? 1 : 2;
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  const Term* const terms = work.terms;
  const Ups<BLOCKS> first_up = ups_of<DTYPE, BLOCKS>(room);
  Reader<DTYPE, BLOCKS, STAGES<DTYPE>> reader(target, terms, strip, shared);
  Place<BLOCKS> place(strip.row_tile);
  copy_ups(first_up, target, terms, place);
  reader.begin();
  for (u32 tile = 0; tile < strip.count; tile++) {
    place.move_to(strip.column_tile + tile);
    Sum total[BLOCKS];
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) clear(total[n]);
    Ups<BLOCKS> ups = first_up;
    float coefficient = 1.0f;
    for (u32 k = 0; k < target.products; k++) {
      const Term& term = terms[k];
      // The sum so far in units of this term's coefficient: one set of registers serves all terms. They come in the order of their coefficients,
      // so that a carry is at most 1.
      if (k > 0) {
#pragma unroll
        for (int i = 0; i < 32 * BLOCKS; i++) total[i / 32][i / 16 % 2][i / 4 % 4][i % 4] *= term.carry;
      }
      coefficient = term.coefficient;
      const u32 row_block = place.row_block - term.row / 16;
      const Groups groups(term, strip.column_tile + tile);
      const bool any = groups.any && row_block < row_blocks(term);
      const uint4* up = ups.place(term.a, term.ranks, row_block);
      if (term.format == FORMAT_F16) reader.template add_pair<true, 1>(total, up, term.b, term.ranks, groups, any);
      else reader.template add_pair<false, 1>(total, up, term.b, term.ranks, groups, any);
    }
    const Stored<DTYPE> (*eights)[THREADS] = reader.ring.tiles[tile % STAGES<DTYPE>];
#pragma unroll
    for (int n = 0; n < 4 * BLOCKS; n++) {
      write_eight<DTYPE>(eights[n][threadIdx.x], total[n / 4], coefficient, n / 2 % 2, n % 2, target, place.row_of(n), place.column_of(n));
    }
  }
}

// PRODUCTS: there may be products; registers are left for half a tile's plain eights.
template <u32 DTYPE, bool PRODUCTS>
__device__ __forceinline__ void merge_full(const Target* targets, const Term* all, const Strip* strips, u32 room) {
  constexpr int AT_ONCE = PRODUCTS ? 2 : 4;
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  const Term* const terms = work.terms;
  const Ups<1> ups = ups_of<DTYPE, 1>(room);
  Reader<DTYPE, 1, STAGES<DTYPE>> reader(target, terms, strip, shared);
  Place<1> place(strip.row_tile);
  if (PRODUCTS) copy_ups(ups, target, terms, place);
  reader.begin();
  for (u32 tile = 0; tile < strip.count; tile++) {
    place.move_to(strip.column_tile + tile);
    Sum total;
    clear(total);
    if (PRODUCTS) sum_products(total, reader, ups, target, terms, place, strip.column_tile + tile);
    const Stored<DTYPE> (*eights)[THREADS] = reader.ring.tiles[tile % STAGES<DTYPE>];
    bool waited = PRODUCTS;
    for (u32 i = target.products; i < target.count; i++) {
#pragma unroll
      for (int n = 0; n < 4; n += AT_ONCE) {
        Plain<AT_ONCE> plain;
        plain.load(n, target, terms[i], place);
        if (!waited) reader.next();
        waited = true;
        plain.template add<DTYPE>(total, n, eights, target, terms[i]);
        asm volatile("" ::: "memory");
      }
    }
    // Without terms the weight is copied.
    if (!waited) reader.next();
#pragma unroll
    for (int n = 0; n < 4; n++) {
      write_eight<DTYPE>(eights[n][threadIdx.x], total, 1.0f, n / 2, n % 2, target, place.row_of(n), place.column_of(n));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) merge_any(const Target* targets, const Term* all, const Strip* strips) {
  __shared__ float sums[32][THREADS];
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  const Term* const terms = work.terms;
  Place<1> place(strip.row_tile);
  const auto code = [&](u32 row, u32 column) {
    const u64 offset = target.base_columns ? target.base_columns[column] : column;
    return code_of(target.dtype, target.base, row * target.base_row + offset);
  };
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile++) {
    place.move_to(tile);
    Parked parked = {sums};
    {
      Sum total;
      clear(total);
      Direct direct;
      sum_products(total, direct, Ups<1>(nullptr, 0), target, terms, place, tile);
      parked.park(total);
    }
    add_single(parked, target, terms, place, [&](u32 n, u32 i) {
      return decode(target.dtype, code(place.row_of(n), place.column_of(n) + i)) * target.scale;
    });
#pragma unroll 1
    for (u32 n = 0; n < 4; n++) {
      const u32 row = place.row_of(n), column = place.column_of(n);
      if (row >= target.rows || column >= target.columns) continue;
      u32 codes[8];
      float delta[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const bool in = column + i < target.columns;
        codes[i] = in ? code(row, column + i) : 0;
        delta[i] = in ? parked.at(n, i) : 0.0f;
      }
      finish<true>(target.dtype, codes, delta, target, terms, row, column);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (column + i >= target.columns) break;
        const u64 at = row * target.out_row + (target.out_columns ? target.out_columns[column + i] : column + i);
        if (target.dtype == F32) static_cast<u32*>(target.out)[at] = codes[i];
        else if (target.dtype < E4M3) static_cast<u16*>(target.out)[at] = u16(codes[i]);
        else static_cast<u8*>(target.out)[at] = u8(codes[i]);
      }
    }
  }
}

#define MERGE_AS(name, blocks, body)                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, blocks) merge_##name(const Target* targets, const Term* terms, \
                                                                             const Strip* strips, u32 room) {     \
    body(targets, terms, strips, room);                                                                           \
  }
// The number is how many blocks' registers a multiprocessor shall have room for.
#define MERGE(name, dtype)                              \
  MERGE_AS(name, 3, merge_products<dtype>)                 \
  MERGE_AS(name##_plain, 4, (merge_full<dtype, false>))    \
  MERGE_AS(name##_full, 3, (merge_full<dtype, true>))

MERGE(f32, F32)
MERGE(f16, F16)
MERGE(bf16, BF16)
MERGE(e4m3, E4M3)
MERGE(e5m2, E5M2)
