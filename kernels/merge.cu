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

// Rounds and writes one eight: W + coefficient * sums. `usual`: no sum is 0 or, of 8 bits, anything but finite.
template <u32 DTYPE>
__device__ __forceinline__ Stored<DTYPE> add_to_eight(const Stored<DTYPE>& old, const float (&sums)[8], float coefficient, const Target& target, bool usual, u64 element) {
  Stored<DTYPE> result;
  float sum[8];
  old.values(sum);
  if constexpr (SIZE<DTYPE> == 1) {
    const float scale = target.scale;
    if (scale != 1.0f) {
      const float inverse = 1.0f / scale;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float whole = sum[i] * scale + sums[i] * coefficient;
        // Division as it is rounded: what the product lacks is corrected.
        const float quotient = whole * inverse;
        sum[i] = fabsf(quotient) < 3.4e38f ? fmaf(fmaf(-quotient, scale, whole), inverse, quotient) : quotient;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += sums[i] * coefficient;
    }
    encode_eight<DTYPE == E4M3 ? 3 : 2>(result.raw, sum, target, element);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = fmaf(sums[i], coefficient, sum[i]);
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
      // Where nothing is added every bit stays, -0 and NaN included.
      if (sums[i] * coefficient == 0.0f) word = (word & ~mask) | (old.raw[i / EACH] & mask);
    }
  }
  return result;
}

// Rounds and writes the lane's part of a tile.
template <u32 DTYPE, class Place, u32 BLOCKS, u32 ALL>
__device__ __forceinline__ void write_tile(const Stored<DTYPE> (*eights)[ALL], const Sum (&total)[BLOCKS], float coefficient, const Target& target,
                                           const Place& place, u32 until) {
  u8* out = static_cast<u8*>(target.out);
  const u32 rows = target.rows, columns = min(target.columns, until);
  const u64 pitch = target.out_row;
  const auto sum_of = [&](int n, int i) { return total[n / 4][n / 2 % 2][i / 2][n % 2 * 2 + i % 2]; };
  // Four at a time: a product that vanishes where no factor does costs time alone.
  bool usual = coefficient != 0.0f;
  float probe = 0.0f;
#pragma unroll
  for (int j = 0; j < 8 * BLOCKS; j++) {
    const float* four = total[j / 8][j / 4 % 2][j % 4];
    const float all = (four[0] * four[1]) * (four[2] * four[3]);
    usual &= fabsf(all) > 0.0f;
    // 0 until something is not finite.
    probe = fmaf(all, 0.0f, probe);
  }
  if constexpr (SIZE<DTYPE> == 1) {
    u32 special = 0;
#pragma unroll
    for (int n = 0; n < 4 * BLOCKS; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) special |= (eights[n][threadIdx.x].raw[i] & 0x7f7f7f7f) + (DTYPE == E4M3 ? 0x01010101 : 0x04040404);
    }
    usual &= probe == 0.0f && !(special & 0x80808080);
  }
  const auto write = [&](int n, bool usual) {
    float sums[8];
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = sum_of(n, i);
    const u32 row = place.row_of(n), column = place.column_of(n);
    const Stored<DTYPE> result = add_to_eight<DTYPE>(eights[n][threadIdx.x], sums, coefficient, target, usual, u64(row) * target.columns + column);
    if (row < rows && column < columns) result.store(out + place.offset_of(n, pitch) * SIZE<DTYPE>);
  };
  if constexpr (SIZE<DTYPE> == 1) {
#pragma unroll
    for (int n = 0; n < 4 * BLOCKS; n++) write(n, usual);
  } else if (usual) {
#pragma unroll
    for (int n = 0; n < 4 * BLOCKS; n++) write(n, true);
  } else {
#pragma unroll
    for (int n = 0; n < 4 * BLOCKS; n++) write(n, false);
  }
}

#ifndef TILES
#define TILES 1
#endif
#ifndef FTILES
#define FTILES 1
#endif
#ifndef PTILES
#define PTILES 2
#endif
#ifndef PFRAG
#define PFRAG 2
#endif
#ifndef NACROSS
#define NACROSS 2
#endif
// The tiles of the weight that a block's warps copy ahead, COUNT of them, each lane what it will use itself. ACROSS of them are one here.
template <u32 DTYPE, class Place, u32 COUNT, u32 ACROSS = 1>
struct Tiles {
  using Tile = Stored<DTYPE>[Place::EIGHTS][Place::ALL_THREADS];
  static constexpr u32 BYTES = COUNT * sizeof(Tile);
  Tile* tiles;
  Place place;
  const Target& target;
  u32 next, last;
  u32 slot = 0;  // of the oldest tile

  __device__ __forceinline__ Tiles(void* shared, const Target& target, const Strip& strip)
      : tiles(static_cast<Tile*>(shared)), place(strip), target(target), next(strip.column_tile), last(strip.column_tile + strip.count) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) copy_next();
  }

  // The column where the strip ends.
  __device__ __forceinline__ u32 until() const { return last * COLUMNS; }

  // Copies a tile into the oldest's place.
  __device__ __forceinline__ void copy_next() {
    if (next < last) {
      place.move_to(next);
      copy_tile<DTYPE>(tiles[slot], target, place, until());
    }
    next += ACROSS;
    slot = slot + 1 == COUNT ? 0 : slot + 1;
    commit_copies();
  }

  // The oldest tile, once it is there.
  __device__ __forceinline__ const Stored<DTYPE> (*wait())[Place::ALL_THREADS] {
    wait_for_copies<COUNT - 1>();
    return tiles[slot];
  }
};

template <u32 DTYPE, u32 ACROSS>
__device__ __forceinline__ void merge_products(const Target* targets, const Term* all, const Strip* strips, u32 room) {
  constexpr u32 BLOCKS = SIZE<DTYPE> == 4 ? 1 : 2;
  using Place = ::Place<BLOCKS, ACROSS>;
  using Copied = Tiles<DTYPE, Place, TILES, ACROSS>;
  using Factors = ::Factors<PFRAG, BLOCKS, ACROSS>;
  __shared__ Target target;
  const Strip strip = strips[blockIdx.x];
  if (threadIdx.x == 0) Factors::init(strip);
  if (threadIdx.x < sizeof(Target) / 4) reinterpret_cast<u32*>(&target)[threadIdx.x] = reinterpret_cast<const u32*>(targets + strip.target)[threadIdx.x];
  __syncthreads();
  Copied tiles(shared, target, strip);
  Factors factors(Copied::BYTES, room, target, all + target.first, strip);
  Place place(strip);
  factors.wait();
#pragma unroll 1
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile += ACROSS) {
    place.move_to(tile);
    Sum total[BLOCKS];
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) clear(total[n]);
    float coefficient = 1.0f;
    const u32 count = target.products;
#pragma unroll 1
    for (u32 k = 0; k < count; k++) {
      const Product& product = factors.reader.get(k);
      // The sum so far in units of this term's coefficient: one set of registers serves all terms. They come in the order of their coefficients,
      // so that a carry is at most 1.
      const float carry = product.carry;
      if (k > 0 && carry != 1.0f) {
#pragma unroll
        for (int i = 0; i < 32 * BLOCKS; i++) total[i / 32][i / 16 % 2][i / 4 % 4][i % 4] *= carry;
      }
      coefficient = product.coefficient;
      if (!factors.reader.touches(product, tile)) continue;
      const Product::Pair& pair = product.pairs[0];
      const bool mine = product.has_block(place.row_block) && (ACROSS == 1 || product.touches(place.group / 2));
      // A factor may end with the first block.
      const u32 step = product.has_block(place.row_block + 1) ? pair.fragments * 32 : 0;
      const uint4* up = up_of(pair, place.row_block);
      if (pair.format == FORMAT_F16) factors.reader.template add_pair<true, 1>(total, up, step, product, pair, place.group, mine);
      else factors.reader.template add_pair<false, 1>(total, up, step, product, pair, place.group, mine);
    }
    write_tile<DTYPE>(tiles.wait(), total, coefficient, target, place, tiles.until());
    tiles.copy_next();
  }
}

// The plain terms, and the end of a tile. AT_ONCE of its eights are on their way at a time.
template <int AT_ONCE, u32 DTYPE, class Tiles, class Place>
__device__ __forceinline__ void finish_tile(Sum (&total)[1], Tiles& tiles, const Target& target, const Term* terms, const Place& place) {
  const Stored<DTYPE> (*eights)[THREADS] = nullptr;
#pragma unroll 1
  for (u32 i = target.products; i < target.count; i++) {
#pragma unroll
    for (int n = 0; n < 4; n += AT_ONCE) {
      Plain<AT_ONCE> plain;
      plain.load(n, target, terms[i], place);
      eights = tiles.wait();
      plain.template add<DTYPE>(total[0], n, eights, target, terms[i]);
      asm volatile("" ::: "memory");
    }
  }
  eights = tiles.wait();
  write_tile<DTYPE>(eights, total, 1.0f, target, place, tiles.until());
  tiles.copy_next();
}

template <u32 DTYPE>
__device__ __forceinline__ void merge_plain(const Target* targets, const Term* all, const Strip* strips, u32) {
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  Tiles<DTYPE, Lines, PTILES> tiles(shared, target, strip);
  Lines place(strip);
#pragma unroll 1
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile++) {
    place.move_to(tile);
    Sum total[1];
    clear(total[0]);
    finish_tile<4, DTYPE>(total, tiles, target, work.terms, place);
  }
}

template <u32 DTYPE>
__device__ __forceinline__ void merge_full(const Target* targets, const Term* all, const Strip* strips, u32 room) {
  using Copied = Tiles<DTYPE, Place<1>, FTILES>;
  using Factors = ::Factors<3, 1, 1>;
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  if (threadIdx.x == 0) Factors::init(strip);
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  Copied tiles(shared, target, strip);
  Aside aside = {reinterpret_cast<float4(*)[THREADS]>(shared + Copied::BYTES / 16)};
  Factors factors(Copied::BYTES + sizeof(Sum) * THREADS, room, target, work.terms, strip);
  Place<1> place(strip);
  factors.wait();
#pragma unroll 1
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile++) {
    place.move_to(tile);
    Sum total[1];
    clear(total[0]);
    sum_products(total[0], factors.reader, aside, target, work.terms, place);
    finish_tile<2, DTYPE>(total, tiles, target, work.terms, place);
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
      Direct direct(terms);
      sum_products(total, direct, Aside{reinterpret_cast<float4(*)[THREADS]>(sums)}, target, terms, place);
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
#define FULLB 4
#endif
#define MERGE_AS(name, threads, blocks, body)                                                                          \
  extern "C" __global__ void __launch_bounds__(threads, blocks) merge_##name(const Target* targets, const Term* terms, \
                                                                             const Strip* strips, u32 room) {          \
    body(targets, terms, strips, room);                                                                                \
  }
// The number is how many blocks' registers a multiprocessor shall have room for.
#define MERGE(name, dtype)                                                                     \
  MERGE_AS(name, NACROSS * THREADS, PRODB / NACROSS, (merge_products<dtype, NACROSS>))         \
  MERGE_AS(name##_plain, THREADS, 4, merge_plain<dtype>)                                       \
  MERGE_AS(name##_full, THREADS, FULLB, merge_full<dtype>)

MERGE(f32, F32)
MERGE(f16, F16)
MERGE(bf16, BF16)
MERGE(e4m3, E4M3)
MERGE(e5m2, E5M2)
