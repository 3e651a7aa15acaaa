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
#include "ring.cuh"

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
__device__ __forceinline__ void finish(u32 dtype, u32 (&codes)[8], const float (&delta)[8], const Target& target, const Term* terms,
                                       u32 row, u32 column) {
  float w[8];
#pragma unroll
  for (int i = 0; i < 8; i++) w[i] = decode(dtype, codes[i]) * target.scale;
  const u32 replaced = replace(w, target, terms, row, column);
  const u64 element = u64(row) * target.columns + column;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float sum = delta[i] == 0.0f ? w[i] : w[i] + delta[i];
    u32 random = 0;
    if (dtype >= E4M3) {
      if (target.scale != 1.0f) sum = sum / target.scale;
      if (target.stochastic) random = Noise::bits(Noise::start((element + i) / 2, target.seed)) >> (element + i) % 2 * 16 & 0xffff;
    }
    if (delta[i] != 0.0f || replaced >> i & 1) codes[i] = encode(dtype, sum, target.stochastic, random);
  }
}

// The lowest bytes of four words.
__device__ __forceinline__ u32 low_bytes(u32 a, u32 b, u32 c, u32 d) { return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410); }

// Eight sums as codes of 8 bits; `element` is a multiple of eight.
template <int M>
__device__ __forceinline__ void encode_eight(u32 (&raw)[2], const float (&sum)[8], const Target& target, u64 element) {
  u32 codes[8];
  if (target.stochastic) {
    const u32 start = Noise::start(element / 2, target.seed);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const u32 random = Noise::bits(start + i / 2 * Noise::STRIDE);
      codes[i] = Eight<M>::magnitude(sum[i], true, random & 0xffff);
      codes[i + 1] = Eight<M>::magnitude(sum[i + 1], true, random >> 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) codes[i] = Eight<M>::magnitude(sum[i], false, 0);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 magnitudes = low_bytes(codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3]);
    const auto top = [&](int j) { return __float_as_uint(sum[4 * i + j]); };
    const u32 signs = __byte_perm(__byte_perm(top(0), top(1), 0x0073), __byte_perm(top(2), top(3), 0x0073), 0x5410);
    raw[i] = (magnitudes & 0x7f7f7f7f) | (signs & 0x80808080);
  }
}

// Rounds and writes one eight: W + coefficient * total.
template <u32 DTYPE>
__device__ __forceinline__ void write_eight(const Stored<DTYPE>& old, const Sum& total, float coefficient, int group, int half, const Target& target,
                                            u32 row, u32 column, u8* to) {
  if (row >= target.rows || column >= target.columns) return;
  const auto sum_of = [&](int i) { return total[group][i / 2][half * 2 + i % 2]; };
  Stored<DTYPE> result;
  float sum[8];
  old.values(sum);
  // Most eights have neither a 0 nor a NaN, which is what could come from bits that must stay.
  bool usual = true;
  if constexpr (SIZE<DTYPE> == 1) {
    const float scale = target.scale;
    float probe = 0.0f;  // NaN once a sum is not finite
    if (scale != 1.0f) {
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] *= scale;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float delta = sum_of(i) * coefficient;
      usual &= fabsf(delta) > 0.0f;
      sum[i] += delta;
      probe = fmaf(sum[i], 0.0f, probe);
    }
    if (scale != 1.0f) {
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] /= scale;
    }
    usual &= probe == 0.0f;
    encode_eight<DTYPE == E4M3 ? 3 : 2>(result.raw, sum, target, u64(row) * target.columns + column);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      sum[i] = fmaf(sum_of(i), coefficient, sum[i]);
      usual &= fabsf(sum[i]) > 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 2 * SIZE<DTYPE>; j++) {
      result.raw[j] = DTYPE == F32 ? __float_as_uint(sum[j]) : DTYPE == BF16 ? pack_bf16(sum[j % 4 * 2], sum[j % 4 * 2 + 1]) : pack_half(sum[j % 4 * 2], sum[j % 4 * 2 + 1]);
    }
  }
  if (!usual) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      constexpr int EACH = 4 / SIZE<DTYPE>;
      const u32 mask = (SIZE<DTYPE> == 4 ? ~0u : (1u << 8 * SIZE<DTYPE> % 32) - 1) << i % EACH * 8 * SIZE<DTYPE>;
      u32& word = result.raw[i / EACH];
      if (SIZE<DTYPE> == 1 && sum[i] != sum[i]) word = (word & ~mask) | (0x7f7f7f7f & mask);
      if (sum_of(i) * coefficient == 0.0f) word = (word & ~mask) | (old.raw[i / EACH] & mask);
    }
  }
  result.store(to);
}

// Rounds and writes the lane's part of a tile.
template <u32 DTYPE, class Place, u32 BLOCKS>
__device__ __forceinline__ void write_tile(const Stored<DTYPE> (*eights)[THREADS], const Sum (&total)[BLOCKS], float coefficient, const Target& target,
                                           const Place& place) {
  u8* out = static_cast<u8*>(target.out) + (place.row * target.out_row + place.column) * SIZE<DTYPE>;
  const u64 step = target.out_row * SIZE<DTYPE>;
#pragma unroll
  for (int n = 0; n < 4 * BLOCKS; n++) {
    const u32 row = place.row_of(n), column = place.column_of(n);
    u8* to = out + (row - place.row) * step + (column - place.column) * SIZE<DTYPE>;
    write_eight<DTYPE>(eights[n][threadIdx.x], total[n / 4], coefficient, n / 2 % 2, n % 2, target, row, column, to);
  }
}

#ifndef PFRAG
#define PFRAG 2
#endif
#ifndef TILES
#define TILES 2
#endif
// The tiles of the weight that a block's warps copy ahead, each lane what it will use itself. src/merge/cuda/launch.rs counts the bytes.
template <u32 DTYPE, class Place>
struct Tiles {
  static constexpr u32 COUNT = TILES;
  using Tile = Stored<DTYPE>[Place::EIGHTS][THREADS];
  Tile* tiles;
  Place place;
  const Target& target;
  u32 next, last;
  u32 slot = 0;  // of the oldest tile

  __device__ __forceinline__ Tiles(void* shared, const Target& target, const Strip& strip)
      : tiles(static_cast<Tile*>(shared)), place(strip.row_tile), target(target), next(strip.column_tile), last(strip.column_tile + strip.count) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) copy_next();
  }

  // Copies a tile into the oldest's place.
  __device__ __forceinline__ void copy_next() {
    if (next < last) {
      place.move_to(next);
      copy_tile<DTYPE>(tiles[slot], target, place);
    }
    next++;
    slot = slot + 1 == COUNT ? 0 : slot + 1;
    commit_copies();
  }

  // The oldest tile is there.
  __device__ __forceinline__ void wait() { wait_for_copies<COUNT - 1>(); }
};

template <u32 DTYPE>
__device__ __forceinline__ void merge_products(const Target* targets, const Term* all, const Strip* strips, u32 room) {
  constexpr u32 BLOCKS = SIZE<DTYPE> == 4 ? 1 : 2;
  using Place = ::Place<BLOCKS>;
  using Copied = Tiles<DTYPE, Place>;
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  if (threadIdx.x == 0) Factors<PFRAG, BLOCKS>::init(strip);
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  const Term* const terms = work.terms;
  Factors<PFRAG, BLOCKS> factors(sizeof(typename Copied::Tile) * Copied::COUNT, room, target, terms, strip);
  Copied tiles(shared, target, strip);
  Place place(strip.row_tile);
  factors.wait();
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile++) {
    place.move_to(tile);
    Sum total[BLOCKS];
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) clear(total[n]);
    Ups<BLOCKS> ups = factors.ups;
    float coefficient = 1.0f;
#pragma unroll 1
    for (u32 k = 0; k < target.products; k++) {
      const Term& term = terms[k];
      // The sum so far in units of this term's coefficient: one set of registers serves all terms. They come in the order of their coefficients,
      // so that a carry is at most 1.
      const float carry = term.carry;
      if (k > 0 && carry != 1.0f) {
#pragma unroll
        for (int i = 0; i < 32 * BLOCKS; i++) total[i / 32][i / 16 % 2][i / 4 % 4][i % 4] *= carry;
      }
      coefficient = term.coefficient;
      const Pair pair(term, false);
      const u32 row_block = place.row_block - term.row / 16;
      const uint4* up = ups.place(pair, row_block);
      const Groups groups(term, tile);
      if (!groups.any) continue;
      const bool any = row_block < row_blocks(term);
      // A factor may end with the first block.
      const u32 step = row_block + 1 < row_blocks(term) ? pair.fragments() * 32 : 0;
      if (term.format == FORMAT_F16) factors.reader.template add_pair<true, 1>(total, up, step, pair, groups, any);
      else factors.reader.template add_pair<false, 1>(total, up, step, pair, groups, any);
    }
    tiles.wait();
    write_tile<DTYPE>(tiles.tiles[tiles.slot], total, coefficient, target, place);
    tiles.copy_next();
  }
}

// The plain terms, and the end of a tile. AT_ONCE of its eights are on their way at a time.
template <int AT_ONCE, u32 DTYPE, class Place>
__device__ __forceinline__ void finish_tile(Sum (&total)[1], Tiles<DTYPE, Place>& tiles, const Target& target, const Term* terms, const Place& place) {
  const Stored<DTYPE> (*eights)[THREADS] = tiles.tiles[tiles.slot];
  bool waited = false;
#pragma unroll 1
  for (u32 i = target.products; i < target.count; i++) {
#pragma unroll
    for (int n = 0; n < 4; n += AT_ONCE) {
      Plain<AT_ONCE> plain;
      plain.load(n, target, terms[i], place);
      if (!waited) tiles.wait();
      waited = true;
      plain.template add<DTYPE>(total[0], n, eights, target, terms[i]);
      asm volatile("" ::: "memory");
    }
  }
  if (!waited) tiles.wait();
  write_tile<DTYPE>(eights, total, 1.0f, target, place);
  tiles.copy_next();
}

template <u32 DTYPE>
__device__ __forceinline__ void merge_plain(const Target* targets, const Term* all, const Strip* strips, u32) {
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  Tiles<DTYPE, Lines> tiles(shared, target, strip);
  Lines place(strip.row_tile);
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile++) {
    place.move_to(tile);
    Sum total[1];
    clear(total[0]);
    finish_tile<4>(total, tiles, target, work.terms, place);
  }
}

template <u32 DTYPE>
__device__ __forceinline__ void merge_full(const Target* targets, const Term* all, const Strip* strips, u32 room) {
  using Copied = Tiles<DTYPE, Place<1>>;
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  if (threadIdx.x == 0) Factors<3, 1>::init(strip);
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  Factors<3, 1> factors(sizeof(typename Copied::Tile) * Copied::COUNT, room, target, work.terms, strip);
  Copied tiles(shared, target, strip);
  Place<1> place(strip.row_tile);
  factors.wait();
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile++) {
    place.move_to(tile);
    Sum total[1];
    clear(total[0]);
    sum_products(total[0], factors.reader, factors.ups, target, work.terms, place, tile);
    finish_tile<2>(total, tiles, target, work.terms, place);
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
      finish(target.dtype, codes, delta, target, terms, row, column);
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

#ifndef PRODB
#define PRODB 4
#endif
#ifndef FULLB
#define FULLB 3
#endif
#define MERGE_AS(name, blocks, body)                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, blocks) merge_##name(const Target* targets, const Term* terms, \
                                                                             const Strip* strips, u32 room) {          \
    body(targets, terms, strips, room);                                                                                \
  }
// The number is how many blocks' registers a multiprocessor shall have room for.
#define MERGE(name, dtype)                         \
  MERGE_AS(name, PRODB, merge_products<dtype>)     \
  MERGE_AS(name##_plain, 4, merge_plain<dtype>)    \
  MERGE_AS(name##_full, FULLB, merge_full<dtype>)

MERGE(f32, F32)
MERGE(f16, F16)
MERGE(bf16, BF16)
MERGE(e4m3, E4M3)
MERGE(e5m2, E5M2)
