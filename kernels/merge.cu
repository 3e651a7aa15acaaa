// W' = round(W + sum of terms), every tile of every weight in one launch.
//
// Grid: one block per strip of tiles. W is copied ahead through shared memory, read once and written once; factors come as fragments from L2, up factors
// once per block; the sums stay in registers, in fp32.
// Bytes: each element of W read and written; of factors rank * (rows + columns * rows / tile rows) numbers.
//
//   merge_{32,16,e4m3,e5m2}   all terms are low-rank products of 16-bit factors without gain, whose regions begin at multiples of 32 rows and 64 columns
//                             and end at such or with the weight; tiles of 128 x 64 (64 x 64 of fp32), two side by side but for 8 bits
//   merge_16_whole            products of any kind and format, with gains or without, and scales of W, in such regions; tiles of 128 x 64, two on their way
//   merge_{32,16,8}_full      products of any kind and region, and plain terms; 64 x 64
//   merge_{32,16,8}_plain     all terms are plain; strips of 64 rows and at most 16 tiles
//   merge_any                 any terms on any weight: strides, odd sizes, odd addresses, one element at a time; 64 x 64
//
// 16 is fp16 or bf16 and 8 is E4M3 or E5M2, as the target says.
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

// The highest bytes of four words.
__device__ __forceinline__ u32 high_bytes(u32 a, u32 b, u32 c, u32 d) { return __byte_perm(__byte_perm(a, b, 0x0073), __byte_perm(c, d, 0x0073), 0x5410); }

// Eight numbers as codes of 8 bits (`Eight::write` has the reasons). `noise`: `Noise::start` of the first pair. NaN is right only to nearest, infinity
// not at all.
__device__ __forceinline__ void encode_eight(u32 dtype, u32 (&raw)[2], const float (&x)[8], bool stochastic, u32 noise) {
  if (!stochastic) {
#pragma unroll
    for (int i = 0; i < 2; i++) raw[i] = pack_eights(dtype, x[4 * i], x[4 * i + 1]) | pack_eights(dtype, x[4 * i + 2], x[4 * i + 3]) << 16;
    return;
  }
  const float largest = bits_to_float(dtype == E4M3 ? Eight<3>::LARGEST : Eight<2>::LARGEST);
  const float factor = bits_to_float(dtype == E4M3 ? Eight<3>::FACTOR : Eight<2>::FACTOR);
  const u32 shift = 1 << (8 - (dtype == E4M3 ? Eight<3>::DROPPED : Eight<2>::DROPPED) + 16);  // moves the code to the highest byte
  u32 codes[8];
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const u32 halves = Noise::halves(noise + i / 2 * Noise::STRIDE);
    // 16 random bits below the code.
    const u32 random[2] = {__byte_perm(halves ^ halves >> 16, 0, 0x4104), __byte_perm(halves, 0, 0x4324)};
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const u32 size = __float_as_uint(__fmul_rz(fminf(fabsf(x[i + j]), largest), factor));
      codes[i + j] = (size * shift + random[j]) | (__float_as_uint(x[i + j]) & 0x80000000);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) raw[i] = high_bytes(codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3]);
}

// What the end of a tile needs of its target.
struct Rounding {
  u32 dtype, stochastic, seed;
  float scale, inverse;

  __device__ __forceinline__ Rounding(u32 dtype, const Target& target)
      : dtype(dtype), stochastic(target.stochastic), seed(target.seed), scale(target.scale), inverse(dtype < E4M3 ? 1.0f : 1.0f / target.scale) {}
};

// Eight new codes: W + coefficient * sums. `usual`: no sum is 0 or, of 8 bits, anything but finite.
template <u32 DTYPE>
__device__ __forceinline__ Stored<DTYPE> add_to_eight(const Stored<DTYPE>& old, const float (&sums)[8], float coefficient, const Rounding& rounding, bool usual, u64 element) {
  const u32 dtype = rounding.dtype;
  Stored<DTYPE> result;
  float sum[8];
  old.values(sum, dtype);
  if constexpr (SIZE<DTYPE> == 1) {
    const float scale = rounding.scale;
    if (scale != 1.0f) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float whole = sum[i] * scale + sums[i] * coefficient;
        // Division as it is rounded: what the product lacks is corrected.
        const float quotient = whole * rounding.inverse;
        sum[i] = fabsf(quotient) < 3.4e38f ? fmaf(fmaf(-quotient, scale, whole), rounding.inverse, quotient) : quotient;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += sums[i] * coefficient;
    }
    encode_eight(dtype, result.raw, sum, rounding.stochastic, Noise::start(element / 2, rounding.seed));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = fmaf(sums[i], coefficient, sum[i]);
#pragma unroll
    for (int j = 0; j < 2 * SIZE<DTYPE>; j++) {
      if constexpr (SIZE<DTYPE> == 4) result.raw[j] = __float_as_uint(sum[j]);
      else result.raw[j] = dtype == BF16 ? pack_bf16(sum[2 * j], sum[2 * j + 1]) : pack_half(sum[2 * j], sum[2 * j + 1]);
    }
  }
  if (!usual) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      constexpr int EACH = 4 / SIZE<DTYPE>;
      const u32 mask = (SIZE<DTYPE> == 4 ? ~0u : (1u << 8 * SIZE<DTYPE> % 32) - 1) << i % EACH * 8 * SIZE<DTYPE>;
      u32& word = result.raw[i / EACH];
      if (SIZE<DTYPE> == 1 && sum[i] != sum[i]) word = (word & ~mask) | (0x7f7f7f7f & mask);
      // Its code comes after that of the largest number.
      if (SIZE<DTYPE> == 1 && dtype == E5M2 && is_infinite(sum[i])) word = (word & ~(0x7f7f7f7f & mask)) | (0x7c7c7c7c & mask);
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
  const Rounding rounding(dtype_of<DTYPE>(target), target);
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
      for (int i = 0; i < 2; i++) special |= (eights[n][threadIdx.x].raw[i] & 0x7f7f7f7f) + (rounding.dtype == E4M3 ? 0x01010101 : 0x04040404);
    }
    usual &= probe == 0.0f && !(special & 0x80808080);
  }
  const u32 width = target.columns;
  const auto write = [&](bool usual) {
    for_eights<SIZE<DTYPE>>(place, target.out, target.out_row, target.rows, min(width, until), [&](u32 n, u8* to) {
      float sums[8];
#pragma unroll
      for (int i = 0; i < 8; i++) sums[i] = total[n / 4][n / 2 % 2][i / 2][n % 2 * 2 + i % 2];
      add_to_eight<DTYPE>(eights[n][threadIdx.x], sums, coefficient, rounding, usual, u64(place.row_of(n)) * width + place.column_of(n)).store(to);
    });
  };
  if (SIZE<DTYPE> == 1) write(usual);
  else if (usual) write(true);
  else write(false);
}

template <u32 DTYPE, u32 ACROSS>
__device__ __forceinline__ void merge_products(const Target* targets, const Term* all, const Strip* strips, u32 room) {
  constexpr u32 BLOCKS = SIZE<DTYPE> == 4 ? 1 : 2;
  using Place = ::Place<BLOCKS, ACROSS>;
  using Copied = Tiles<DTYPE, Place, 1, ACROSS>;
  using Factors = ::Factors<2, BLOCKS, ACROSS, 4, false>;
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
      const bool mine = product.has_block(place.row_block) && product.touches(place.group / 2);
      // A factor may end with the first block.
      const u32 step = product.has_block(place.row_block + 1) ? pair.ups * 32 : 0;
      const uint4* up = up_of(pair, place.row_block);
      if (pair.format == FORMAT_F16) factors.reader.template add_pair<true, 1, 1>(total, up, step, product, pair, place.group, mine);
      else factors.reader.template add_pair<false, 1, 1>(total, up, step, product, pair, place.group, mine);
    }
    write_tile<DTYPE>(tiles.wait(), total, coefficient, target, place, tiles.until());
    tiles.copy_next();
  }
}

// What a term of whole blocks has for every row or column, of a warp's part of a tile: loaded long before it is needed, in two registers. A lane keeps its
// two rows' numbers, or those of two of the tile's columns, which the others get from it.
struct Vector {
  float own[2];
  bool by_rows;

  template <class Place>
  __device__ __forceinline__ void load(const float* from, bool by_rows, const Term& term, const Place& place) {
    this->by_rows = by_rows;
    const u32 first = by_rows ? place.row - term.row : place.group * 32 + place.lane * 2 - term.column;
    const u32 step = by_rows ? 8 : 1, last = (by_rows ? term.rows : term.columns) - 1;
    // Beyond the weight, or the term, any number will do.
    own[0] = __ldg(from + min(first, last));
    own[1] = __ldg(from + min(first + step, last));
  }

  // Calls `visit(n, numbers)` for each of the lane's eights.
  template <class Visit>
  __device__ __forceinline__ void for_eights(Visit visit) const {
    float numbers[8];
    if (by_rows) {
#pragma unroll
      for (u32 n = 0; n < 4; n++) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) numbers[i] = own[n % 2];
        visit(n, numbers);
      }
    } else {
#pragma unroll
      for (u32 n = 0; n < 4; n += 2) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) numbers[i] = __shfl_sync(~0u, own[i % 2], n * 8 + (threadIdx.x & 3) * 4 + i / 2);
        visit(n, numbers);
        visit(n + 1, numbers);
      }
    }
  }
};

// product *= the gains of a term that the warp has a part of.
__device__ __forceinline__ void multiply_by(Sum& product, const Vector& gains) {
  gains.for_eights([&](u32 n, const float (&numbers)[8]) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) product[n / 2][i / 2][n % 2 * 2 + i % 2] *= numbers[i];
  });
}

// total += a SCALE_ROWS or SCALE_COLUMNS that the warp has a part of.
template <u32 DTYPE, u32 ALL>
__device__ __forceinline__ void add_scale(Sum& total, const Stored<DTYPE> (*eights)[ALL], const Vector& factors, float coefficient, u32 dtype) {
  factors.for_eights([&](u32 n, const float (&numbers)[8]) {
    float w[8];
    eights[n][threadIdx.x].values(w, dtype);
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
      float& sum = total[n / 2][i / 2][n % 2 * 2 + i % 2];
      sum = fmaf(coefficient * numbers[i], w[i], sum);
    }
  });
}

// A tile is one of eight warps' below each other: a down factor is brought from L2 for 128 rows at once, and a warp has room for the two sums whose
// product a HADAMARD is.
template <u32 DTYPE>
__device__ __forceinline__ void merge_whole(const Target* targets, const Term* all, const Strip* strips, u32 room) {
#ifdef LYCORE_RING
  constexpr u32 COUNT = 2;
#else
  constexpr u32 COUNT = 1;
#endif
  using Place = ::Place<1, 1, 8>;
  using Copied = Tiles<DTYPE, Place, COUNT>;
  using Factors = ::Factors<3, 1, 1, 8, true>;
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  if (threadIdx.x == 0) Factors::init(strip);
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  Copied tiles(shared, target, strip);
  Factors factors(Copied::BYTES, room, target, work.terms, strip);
  Place place(strip);
  factors.wait();
#pragma unroll 1
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile++) {
    place.move_to(tile);
    Sum total[1];
    clear(total[0]);
    float coefficient = 1.0f;
    // What is asked for now is there when the products are.
    const auto load_factors = [&](Vector& factors, u32 k) {
      const Term& term = work.terms[k];
      factors.load(static_cast<const float*>(term.a), term.kind == SCALE_ROWS, term, place);
    };
    Vector factors_of_w;
    if (target.count > target.products) load_factors(factors_of_w, target.products);
#pragma unroll 1
    for (u32 k = 0; k < target.products; k++) {
      const Product& product = factors.reader.get(k);
      // In units of this term's coefficient, as in merge_products.
      const float carry = product.carry;
      if (k > 0 && carry != 1.0f) {
#pragma unroll
        for (int i = 0; i < 32; i++) total[0][i / 16][i / 4 % 4][i % 4] *= carry;
      }
      coefficient = product.coefficient;
      if (!factors.reader.touches(product, tile)) continue;
      const bool mine = product.has_block(place.row_block) && product.touches(place.group / 2);
      // What is multiplied by more than its coefficient stands alone until then.
      const bool alone = k > 0 && (product.count > 1 || product.gained);
      const Aside<Place::ALL_THREADS> aside = {static_cast<float4(*)[Place::ALL_THREADS]>(factors.end())};
      if (alone) {
        aside.put(total[0]);
        clear(total[0]);
      }
      Vector gains;
      if (product.gained) gains.load(work.terms[k].gain, work.terms[k].gain_axis == 0, work.terms[k], place);
      add_any_pair(factors.reader, total, up_of(product.pairs[0], place.row_block), 0, product, product.pairs[0], place.group, mine);
      if (product.count > 1) {
        Sum second[1];
        clear(second[0]);
        add_any_pair(factors.reader, second, up_of(product.pairs[1], place.row_block), 0, product, product.pairs[1], place.group, mine);
#pragma unroll
        for (int i = 0; i < 32; i++) total[0][i / 16][i / 4 % 4][i % 4] *= second[0][i / 16][i / 4 % 4][i % 4];
      }
      if (product.gained && mine) multiply_by(total[0], gains);
      if (alone) aside.add(total[0]);
    }
    if (target.count > target.products) {
#pragma unroll
      for (int i = 0; i < 32; i++) total[0][i / 16][i / 4 % 4][i % 4] *= coefficient;
      coefficient = 1.0f;
#pragma unroll 1
      for (u32 k = target.products; k < target.count; k++) {
        const Term& term = work.terms[k];
        if (k > target.products) load_factors(factors_of_w, k);
        if (place.row_block * 16 - term.row >= term.rows || place.group * 32 - term.column >= term.columns) continue;
        add_scale<DTYPE>(total[0], tiles.wait(), factors_of_w, term.coefficient * target.scale, dtype_of<DTYPE>(target));
      }
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
      plain.template add<DTYPE>(total[0], n, terms[i].coefficient, eights, target, terms[i]);
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
  Tiles<DTYPE, Lines, 2> tiles(shared, target, strip);
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
  using Copied = Tiles<DTYPE, Place<1>, 1>;
  using Factors = ::Factors<3, 1, 1, 4, true>;
  __shared__ Work work;
  const Strip strip = strips[blockIdx.x];
  if (threadIdx.x == 0) Factors::init(strip);
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  Copied tiles(shared, target, strip);
  Aside<THREADS> aside = {reinterpret_cast<float4(*)[THREADS]>(shared + Copied::BYTES / 16)};
  Factors factors(Copied::BYTES + sizeof(Sum) * THREADS, room, target, work.terms, strip);
  Place<1> place(strip);
  factors.wait();
#pragma unroll 1
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile++) {
    place.move_to(tile);
    Sum total[1];
    clear(total[0]);
    sum_products(factors.reader, aside, target, work.terms, place, [&](const Sum& product, const Term& term) {
      add_scaled(total[0], product, term.coefficient, target, term, place);
    });
    finish_tile<2, DTYPE>(total, tiles, target, work.terms, place);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) merge_any(const Target* targets, const Term* all, const Strip* strips, u32) {
  __shared__ float sums[32][THREADS];
  __shared__ float4 aside[8][THREADS];
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
      sum_products(direct, Aside<THREADS>{aside}, target, terms, place,
                   [&](const Sum& product, const Term& term) { add_scaled(total, product, term.coefficient, target, term, place); });
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

#define MERGE_AS(name, threads, blocks, body)                                                                          \
  extern "C" __global__ void __launch_bounds__(threads, blocks) merge_##name(const Target* targets, const Term* terms, \
                                                                             const Strip* strips, u32 room) {          \
    body(targets, terms, strips, room);                                                                                \
  }
// Registers for 16 warps on a multiprocessor.
#define MERGE_PRODUCTS(name, dtype, across) MERGE_AS(name, across * THREADS, 4 / across, (merge_products<dtype, across>))
#define MERGE_OTHERS(name, dtype)                        \
  MERGE_AS(name##_plain, THREADS, 4, merge_plain<dtype>) \
  MERGE_AS(name##_full, THREADS, 4, merge_full<dtype>)

MERGE_PRODUCTS(32, F32, 2)
MERGE_PRODUCTS(16, LATE16, 2)
MERGE_PRODUCTS(e4m3, E4M3, 1)
MERGE_PRODUCTS(e5m2, E5M2, 1)
MERGE_AS(16_whole, 2 * THREADS, 2, merge_whole<LATE16>)
MERGE_OTHERS(32, F32)
MERGE_OTHERS(16, LATE16)
MERGE_OTHERS(8, LATE8)
