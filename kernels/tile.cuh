// Tiles of a weight and the sum of terms on them.
//
// DOWN warps take a tile of DOWN * BLOCKS * 16 rows and 64 columns, a warp BLOCKS blocks of 16 rows and two groups of 32 columns. In each block and group
// lane (g, t) holds rows g and g + 8 and the eight columns from t * 8: as they lie in memory, 16 bytes of a 16-bit weight, and as products of fragments
// leave them (pack.cu). These eights are numbered block * 4 + group * 2 + half.
#pragma once
#include "common.cuh"

constexpr u32 THREADS = 128;
constexpr u32 COLUMNS = 64;

// [group][product][d]: element 2 * product + d % 2 of the eight in half d / 2.
typedef float Sum[2][4][4];

// Where a lane's eights are. ACROSS: so many tiles side by side, DOWN warps each.
template <u32 BLOCKS, u32 ACROSS = 1, u32 DOWN = 4>
struct Place {
  static constexpr u32 EIGHTS = 4 * BLOCKS, ALL_THREADS = 32 * DOWN * ACROSS;
  static constexpr bool EVEN = true;
  u32 lane, row, column;  // the lane's first row and column in the weight
  u32 row_block, group;   // the warp's first, in units of 16 rows and 32 columns

  __device__ __forceinline__ explicit Place(u32 row_tile) {
    lane = threadIdx.x & 31;
    row_block = (row_tile * DOWN + threadIdx.x / 32 % DOWN) * BLOCKS;
    row = row_block * 16 + lane / 4;
  }
  __device__ __forceinline__ explicit Place(const Strip& strip) : Place(strip.row_tile) {}
  __device__ __forceinline__ void move_to(u32 column_tile) {
    group = (column_tile + (ACROSS > 1 ? threadIdx.x / (32 * DOWN) : 0)) * (COLUMNS / 32);
    column = group * 32 + lane % 4 * 8;
  }
  __device__ __forceinline__ u32 row_of(u32 eight) const { return row + eight / 4 * 16 + eight % 2 * 8; }
  __device__ __forceinline__ u32 column_of(u32 eight) const { return column + eight / 2 % 2 * 32; }
  __device__ __forceinline__ u64 offset_of(u32, u64 pitch) const { return row * pitch + column; }
};

// A strip's 64 rows row by row, for what needs no products: neighbouring lanes have neighbouring eights, so that memory is read in long runs. One step
// is as much as a tile.
struct Lines {
  static constexpr u32 EIGHTS = 4, ALL_THREADS = THREADS;
  static constexpr bool EVEN = false;
  u32 first_row, first_column, first_tile, width, inverse;
  u32 rows[EIGHTS], columns[EIGHTS];

  // A strip has at most 16 tiles: 2^13 eights, of which a row has at most 2^7, so that a division is this product.
  __device__ __forceinline__ explicit Lines(const Strip& strip)
      : first_row(strip.row_tile * 64), first_column(strip.column_tile * COLUMNS), first_tile(strip.column_tile), width(strip.count * 8), inverse((1u << 21) / width + 1) {}
  __device__ __forceinline__ void move_to(u32 column_tile) {
#pragma unroll
    for (u32 n = 0; n < EIGHTS; n++) {
      const u32 at = ((column_tile - first_tile) * EIGHTS + n) * THREADS + threadIdx.x, line = at * inverse >> 21;
      rows[n] = first_row + line;
      columns[n] = first_column + (at - line * width) * 8;
    }
  }
  __device__ __forceinline__ u32 row_of(u32 eight) const { return rows[eight]; }
  __device__ __forceinline__ u32 column_of(u32 eight) const { return columns[eight]; }
  __device__ __forceinline__ u64 offset_of(u32 eight, u64 pitch) const { return rows[eight] * pitch + columns[eight]; }
};

template <u32 DTYPE>
constexpr int SIZE = DTYPE == F32 ? 4 : DTYPE == F16 || DTYPE == BF16 || DTYPE == LATE16 ? 2 : 1;

template <u32 DTYPE>
__device__ __forceinline__ u32 dtype_of(const Target& target) { return DTYPE == LATE16 || DTYPE == LATE8 ? target.dtype : DTYPE; }

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

  // All eight; `dtype` is what it is where that is not known early.
  __device__ __forceinline__ void values(float (&to)[8], u32 dtype = DTYPE) const {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      if constexpr (SIZE<DTYPE> == 4) {
        to[i] = bits_to_float(raw[i]), to[i + 1] = bits_to_float(raw[i + 1]);
      } else if constexpr (SIZE<DTYPE> == 2) {
        const u32 pair = raw[i / 2];
        if (dtype == BF16) to[i] = bits_to_float(pair << 16), to[i + 1] = bits_to_float(pair & 0xffff0000);
        else to[i] = half_to_float(u16(pair)), to[i + 1] = half_to_float(u16(pair >> 16));
      } else {
        const u32 pair = raw[i / 4] >> 8 * (i % 4);
        if (dtype == E4M3) read_e4m3_pair(pair, to[i], to[i + 1]);
        else to[i] = Eight<2>::read(pair & 0xff), to[i + 1] = Eight<2>::read(pair >> 8 & 0xff);
      }
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

  // What is written is not read again soon.
  __device__ __forceinline__ void store(void* to) const {
    if constexpr (SIZE<DTYPE> == 1) {
      __stcs(static_cast<uint2*>(to), make_uint2(raw[0], raw[1]));
    } else {
#pragma unroll
      for (int i = 0; i < SIZE<DTYPE> / 2; i++) {
        __stcs(static_cast<uint4*>(to) + i, make_uint4(raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]));
      }
    }
  }
};

// ---- the weight, on its way through shared memory

// What lies beside it will be wanted next: 256 bytes go to L2 at once.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global.L2::256B [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
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

// Calls `visit(n, address)` for each of the lane's eights that lies in the weight and before column `until`. Rows are `pitch` elements apart.
template <int BYTES, class Place, class Visit>
__device__ __forceinline__ void for_eights(const Place& place, const void* matrix, u64 pitch, u32 rows, u32 until, Visit visit) {
  u8* at = const_cast<u8*>(static_cast<const u8*>(matrix));
  if constexpr (Place::EVEN) {
    at += place.offset_of(0, pitch) * BYTES;
    const u64 step = pitch * (8 * BYTES);
    const bool left = place.column < until, right = place.column + 32 < until;
#pragma unroll
    for (u32 r = 0; r < Place::EIGHTS / 2; r++) {
      const u32 n = r / 2 * 4 + r % 2;
      const bool in = place.row + 8 * r < rows;
      if (in && left) visit(n, at);
      if (in && right) visit(n + 2, at + 32 * BYTES);
      at += step;
    }
  } else {
#pragma unroll
    for (u32 n = 0; n < Place::EIGHTS; n++) {
      if (place.row_of(n) < rows && place.column_of(n) < until) visit(n, at + place.offset_of(n, pitch) * BYTES);
    }
  }
}

// Enqueues the lane's part of a tile of the weight, whose columns lie side by side in multiples of eight and whose rows begin at 16 bytes (8 of 8-bit
// ones), up to column `until`. Every lane reads only what it copied itself. What lies outside the weight stays what it was.
template <u32 DTYPE, class Place, u32 ALL>
__device__ __forceinline__ void copy_tile(Stored<DTYPE> (*eights)[ALL], const Target& target, const Place& place, u32 until = ~0u) {
  for_eights<SIZE<DTYPE>>(place, target.base, target.base_row, target.rows, min(target.columns, until), [&](u32 n, const u8* from) {
    u8* to = reinterpret_cast<u8*>(&eights[n][threadIdx.x]);
    if constexpr (SIZE<DTYPE> == 1) copy_async<8>(to, from);
    else
#pragma unroll
      for (int i = 0; i < SIZE<DTYPE> / 2; i++) copy_async<16>(to + 16 * i, from + 16 * i);
  });
}

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

// bf16 or fp16 numbers of one number of a pair's factors.
__device__ __forceinline__ u32 up_parts(u32 format) { return format >= FORMAT_SPLIT ? 3 : 1; }
__device__ __forceinline__ u32 down_parts(u32 format) { return format == FORMAT_SPLIT ? 3 : 1; }

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

// products[block] += up @ down over one rank block, in fp32: tensor cores cut off what they add to a larger number, which many steps would add up to a
// bias, so that the products of parts are rounded into the sum once. `up` are the warp's fragments, blocks `up_step` apart, `down` those of two groups, parts `step` apart.
template <bool HALF, int UPS, int DOWNS, u32 BLOCKS>
__device__ __forceinline__ void add_product(Sum (&products)[BLOCKS], const uint4* up, u32 up_step, const uint4* const (&down)[2], u32 step) {
  uint4 left[BLOCKS][UPS];
#pragma unroll
  for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
    for (int p = 0; p < UPS; p++) left[n][p] = up[n * up_step + p * 32];
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float own[BLOCKS][2][4] = {};
      // Small products first. What is left out is below 2^-24 of the whole.
#pragma unroll
      for (int q = DOWNS - 1; q >= 0; q--) {
        const uint4 right = down[i][q * step + half * 32];
#pragma unroll
        for (int p = UPS - 1 - q; p >= 0; p--) {
#pragma unroll
          for (int n = 0; n < BLOCKS; n++) {
            float(&low)[4] = UPS == 1 ? products[n][i][2 * half] : own[n][0];
            float(&high)[4] = UPS == 1 ? products[n][i][2 * half + 1] : own[n][1];
            mma<HALF>(low, left[n][p], right.x, right.y);
            mma<HALF>(high, left[n][p], right.z, right.w);
          }
        }
      }
      if constexpr (UPS > 1) {
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
          for (int e = 0; e < 8; e++) products[n][i][2 * half + e / 4][e % 4] += own[n][e / 4][e % 4];
        }
      }
    }
  }
}

// A term that is a product, as its fragments are looked up tile by tile. Those are aligned with the weight: blocks of 16 rows and groups of 32 columns.
struct Product {
  struct Pair {
    const uint4 *up, *down;  // of the weight's first block and group, wherever the factor begins
    u32 format, ranks;
    u32 ups, downs;  // fragments of a block, and of half a group
  } pairs[2];
  u32 first_block, blocks, first_group, groups;
  float coefficient, carry;
  u32 count;  // of pairs
  u32 gained;

  __device__ __forceinline__ void set(const Term& term) {
    first_block = term.row / 16;
    blocks = row_blocks(term);
    first_group = term.column / 32;
    groups = (term.column % 32 + term.columns + 31) / 32;
    coefficient = term.coefficient;
    carry = term.carry;
    count = term.kind == HADAMARD ? 2 : 1;
    gained = term.gain != nullptr;
#pragma unroll
    for (u32 n = 0; n < 2; n++) {
      Pair& pair = pairs[n];
      pair.format = n ? term.format2 : term.format;
      pair.ranks = n ? term.ranks2 : term.ranks;
      pair.ups = pair.ranks * up_parts(pair.format);
      pair.downs = pair.ranks * down_parts(pair.format);
      pair.up = static_cast<const uint4*>(n ? term.a2 : term.a) - u64(first_block) * pair.ups * 32;
      pair.down = static_cast<const uint4*>(n ? term.b2 : term.b) - u64(first_group) * pair.downs * 64;
    }
  }

  __device__ __forceinline__ bool has_group(u32 group) const { return group - first_group < groups; }
  // Either group of a tile.
  __device__ __forceinline__ bool touches(u32 column_tile) const { return column_tile * 2 + 1 - first_group < groups + 1; }
  __device__ __forceinline__ bool has_block(u32 block) const { return block - first_block < blocks; }
};

// The up fragments of a block of rows, of the calling lane.
__device__ __forceinline__ const uint4* up_of(const Product::Pair& pair, u32 row_block) {
  return pair.up + u64(row_block) * pair.ups * 32 + (threadIdx.x & 31);
}

// Products without a ring: factors are read where they are.
struct Direct {
  const Term* terms;
  Product product;

  __device__ __forceinline__ explicit Direct(const Term* terms) : terms(terms) {}

  __device__ __forceinline__ const Product& get(u32 i) {
    product.set(terms[i]);
    return product;
  }

  // Nothing is copied for several tiles at once.
  __device__ __forceinline__ bool touches(const Product&, u32) const { return true; }

  // products += up @ down, by a warp, if `mine`. `up_step`: between blocks of rows.
  template <bool HALF, int UPS, int DOWNS, u32 BLOCKS>
  __device__ __forceinline__ void add_pair(Sum (&products)[BLOCKS], const uint4* up, u32 up_step, const Product& product, const Product::Pair& pair, u32 group, bool mine) {
    if (!mine) return;
    const uint4* from = pair.down + (threadIdx.x & 31);
    // A tile with only one group takes it twice.
    const u32 own[2] = {product.has_group(group) ? group : group + 1, product.has_group(group + 1) ? group + 1 : group};
    const u32 ranks = pair.ranks;
#pragma unroll 1
    for (u32 k = 0; k < ranks; k++) {
      const uint4* const groups[2] = {from + (u64(own[0]) * ranks + k) * DOWNS * 64, from + (u64(own[1]) * ranks + k) * DOWNS * 64};
      add_product<HALF, UPS, DOWNS>(products, up + k * UPS * 32, up_step, groups, 64);
    }
  }
};

// products += a pair of any format.
template <class Reader, u32 BLOCKS>
__device__ __forceinline__ void add_any_pair(Reader& reader, Sum (&products)[BLOCKS], const uint4* up, u32 up_step, const Product& product, const Product::Pair& pair, u32 group, bool mine) {
  if (pair.format == FORMAT_SPLIT) reader.template add_pair<false, 3, 3>(products, up, up_step, product, pair, group, mine);
  else if (pair.format == FORMAT_UP_SPLIT) reader.template add_pair<false, 3, 1>(products, up, up_step, product, pair, group, mine);
  else if (pair.format == FORMAT_F16) reader.template add_pair<true, 1, 1>(products, up, up_step, product, pair, group, mine);
  else reader.template add_pair<false, 1, 1>(products, up, up_step, product, pair, group, mine);
}

// Whether element (row, column) of the weight lies in the term's region.
__device__ __forceinline__ bool inside(const Term& term, u32 row, u32 column) {
  return row - term.row < term.rows && column - term.column < term.columns;
}

__device__ __forceinline__ float gain_at(const Term& term, u32 row, u32 column) {
  return term.gain ? __ldg(term.gain + (term.gain_axis == 0 ? row - term.row : column - term.column)) : 1.0f;
}

// total += coefficient * gain * product, inside the region: outside it a product is zero, but for what is not finite in the factors.
__device__ __forceinline__ void add_scaled(Sum& total, const Sum& product, float coefficient, const Target& target, const Term& term, const Place<1>& place) {
  const bool upper = place.row - term.row < term.rows, lower = place.row + 8 - term.row < term.rows;
  float rows[2] = {coefficient, coefficient};
  if (term.gain && term.gain_axis == 0) {
    rows[0] *= upper ? __ldg(term.gain + place.row - term.row) : 0.0f;
    rows[1] *= lower ? __ldg(term.gain + place.row + 8 - term.row) : 0.0f;
  }
  // What lies outside the weight may be anything.
  if (term.rows == target.rows && term.columns == target.columns) {
    if (term.gain && term.gain_axis == 1) {
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const float gain = coefficient * __ldg(term.gain + min(place.column + i / 8 * 32 + i % 8, target.columns - 1));
        float* sums = total[i / 8][i / 2 % 4];
        const float* products = product[i / 8][i / 2 % 4];
        sums[i % 2] = fmaf(gain, products[i % 2], sums[i % 2]);
        sums[2 + i % 2] = fmaf(gain, products[2 + i % 2], sums[2 + i % 2]);
      }
      return;
    }
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

// Sums of a block's lanes aside, 16 bytes each at a time.
template <u32 ALL>
struct Aside {
  float4 (*fours)[ALL];  // [8]

  __device__ __forceinline__ void put(const Sum& sum) const {
#pragma unroll
    for (int j = 0; j < 8; j++) fours[j][threadIdx.x] = make_float4(sum[j / 4][j % 4][0], sum[j / 4][j % 4][1], sum[j / 4][j % 4][2], sum[j / 4][j % 4][3]);
  }
  __device__ __forceinline__ void multiply(Sum& sum) const {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float4 four = fours[j][threadIdx.x];
      float* to = sum[j / 4][j % 4];
      to[0] *= four.x, to[1] *= four.y, to[2] *= four.z, to[3] *= four.w;
    }
  }
  __device__ __forceinline__ void add(Sum& sum) const {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float4 four = fours[j][threadIdx.x];
      float* to = sum[j / 4][j % 4];
      to[0] += four.x, to[1] += four.y, to[2] += four.z, to[3] += four.w;
    }
  }
};

// `add(product, term)` for each of the target's products on the warp's part of it.
template <class Reader, class Add>
__device__ __forceinline__ void sum_products(Reader& reader, Aside<THREADS> aside, const Target& target, const Term* terms, const Place<1>& place, Add add) {
#pragma unroll 1
  for (u32 i = 0; i < target.products; i++) {
    const Product& product = reader.get(i);
    if (!product.touches(place.group / 2)) continue;
    const bool mine = product.has_block(place.row_block);
    Sum sum[1];
#pragma unroll 1
    for (u32 n = 0; n < product.count; n++) {
      const Product::Pair& pair = product.pairs[n];
      const uint4* up = up_of(pair, place.row_block);
      if (n > 0) aside.put(sum[0]);
      clear(sum[0]);
      add_any_pair(reader, sum, up, 0, product, pair, place.group, mine);
      if (n > 0) aside.multiply(sum[0]);
    }
    if (mine) add(sum[0], terms[i]);
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

  // total += coefficient * the term. `eights` is the lane's part of the weight.
  template <u32 DTYPE, u32 ALL>
  __device__ __forceinline__ void add(Sum& total, int first, float strength, const Stored<DTYPE> (*eights)[ALL], const Target& target, const Term& term) const {
    const bool scales = term.kind == SCALE_ROWS || term.kind == SCALE_COLUMNS;
    const u32 dtype = term.kind == KRON ? term.format2 : term.kind == DENSE ? term.format : u32(F32);
    const float coefficient = scales ? strength * target.scale : strength;
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
        eights[first + n][threadIdx.x].values(w, dtype_of<DTYPE>(target));
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
