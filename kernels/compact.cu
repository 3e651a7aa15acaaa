// Merging weights of 16 bits in place, without a copy: W' = round(W + d), and aside what that lost of W. Where d is what it was, bit for bit, since it is
// the same sum of the same terms in the same order, W is what round(W' - d) says but for a few units in the last place: three bits an element. Where more is
// lost (d much larger than W) W itself is kept, an escape.
//
//   compact_{bf16,f16}       products of any kind and region, and plain terms that do not read W
//   compact_{bf16,f16}_one   one product of 16-bit factors on the whole weight
//
// A change of strengths is one pass: W comes back with the old coefficients (a term's `carry`) and is merged with the new ones. Grid: one block of 128
// threads per strip of 64 x 64 tiles, as in merge.cu's merge_DTYPE_full.
// Bytes: each element of W read and written; 3/8 of one read and written; of factors as there.
//
// In a Target, `base` is the weight, `out` its units, `axis` the Mode.
#include "ring.cuh"

// FRESH: the weight is pristine. RESTORE: it shall be again.
enum Mode : u32 { FRESH = 0, CHANGE = 1, RESTORE = 2 };

// What a warp keeps aside of its 16 rows and 64 columns: a quarter of them. Three bits say how many numbers W is beyond round(W' - d), plus 3; 7 is an
// escape. A lane has 16 pairs of neighbours, pair n * 4 + k of eight n (tile.cuh), one half of its words for each side: pair 5 * w + f at bit 3 * f of word w,
// pair 15 at the highest bits of all three. Escapes stand in the order of lanes and of `escapes`.
struct Unit {
  static constexpr u32 ESCAPES = 62;
  u32 words[3][32];
  u32 tail[32];  // the escapes, then the header
};
static_assert(sizeof(Unit) == 512, "src/merge/cuda/compact.rs counts on it");

// A unit's header: the number of its slot in the pool plus 1, if it has one, and
constexpr u32 POOLED = 1u << 31;   // all of it is there instead: [eight][lane][8]
constexpr u32 PENDING = 1u << 30;  // it needed a slot and there was none: weight and unit are as they were
constexpr u32 SLOT = PENDING - 1;

// Slots for units with too many escapes.
struct Pool {
  u16* slots;   // of 1024
  u32* wanted;  // how many were asked for
  u32 size;     // how many there are
  u32 units;    // which ones to do: 0 all, 1 the pending, 2 the others
};

// 16-bit numbers in their order, as unsigned ones; two in a register.
__device__ __forceinline__ u32 signs(u32 pair) {
  u32 filled;
  asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(filled) : "r"(pair));
  return filled;
}
__device__ __forceinline__ u32 ordinals(u32 pair) { return pair ^ (signs(pair) | 0x80008000); }
__device__ __forceinline__ u32 numbers(u32 ordinals) { return ordinals ^ (~signs(ordinals) | 0x80008000); }

template <bool HALF>
__device__ __forceinline__ void unpack(u32 pair, float& first, float& second) {
  if (HALF) first = half_to_float(u16(pair)), second = half_to_float(u16(pair >> 16));
  else first = bits_to_float(pair << 16), second = bits_to_float(pair & 0xffff0000);
}

template <bool HALF>
__device__ __forceinline__ u32 pack(float first, float second) {
  return HALF ? pack_half(first, second) : pack_bf16(first, second);
}

// round(W' - d), d = coefficient * sum
template <bool HALF>
__device__ __forceinline__ u32 estimate(u32 merged, const float* sum, float coefficient) {
  float a, b;
  unpack<HALF>(merged, a, b);
  return pack<HALF>(fmaf(-coefficient, sum[0], a), fmaf(-coefficient, sum[1], b));
}

constexpr u32 BOTH = 0x00010001;

// Which of a lane's numbers are escapes: bit 3 * f + w, 15 for the last pair, and 16 more for the second of the pair.
__device__ __forceinline__ u32 escapes(const u32 (&words)[3]) {
  constexpr u32 FIELDS = 0x1249 * BOTH;
  u32 mask = words[0] & words[1] & words[2] & 0x80008000;
#pragma unroll
  for (int w = 0; w < 3; w++) mask |= (words[w] & words[w] >> 1 & words[w] >> 2 & FIELDS) << w;
  return mask;
}

// The pair's numbers in its words.
__device__ __forceinline__ u32 beyond_of(const u32 (&words)[3], u32 pair) {
  if (pair < 15) return words[pair / 5] >> pair % 5 * 3 & 7 * BOTH;
  return (words[0] >> 15 & BOTH) | (words[1] >> 14 & 2 * BOTH) | (words[2] >> 13 & 4 * BOTH);
}

__device__ __forceinline__ void keep(u32 (&words)[3], u32 pair, u32 beyond) {
  if (pair < 15) words[pair / 5] += beyond << pair % 5 * 3;
  else
#pragma unroll
    for (int w = 0; w < 3; w++) words[w] |= (beyond >> w & BOTH) << 15;
}

// The element of a bit of `escapes`.
struct Element {
  u32 n, i;

  __device__ __forceinline__ explicit Element(u32 bit) {
    const u32 field = bit % 16, pair = field == 15 ? 15 : field % 3 * 5 + field / 3;
    n = pair / 4, i = pair % 4 * 2 + bit / 16;
  }
  __device__ __forceinline__ u16& of(Stored<LATE16> (*eights)[THREADS]) const { return reinterpret_cast<u16*>(&eights[n][threadIdx.x])[i]; }
};

// The sum over the lanes before this one, and over all.
__device__ __forceinline__ u32 scan(u32 count, u32& all) {
  const u32 lane = threadIdx.x & 31;
  u32 sum = count;
#pragma unroll
  for (u32 step = 1; step < 32; step *= 2) {
    const u32 other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  all = __shfl_sync(~0u, sum, 31);
  return sum - count;
}

// A warp's unit: a lane's words, and the tail in shared memory.
struct Kept {
  Unit* unit;
  u32 words[3];
  u32 tail, header;

  __device__ __forceinline__ void load(Unit* from, u32 mode) {
    const u32 lane = threadIdx.x & 31;
    unit = from;
    tail = from->tail[lane];
#pragma unroll
    for (int w = 0; w < 3; w++) words[w] = mode == FRESH ? 0 : from->words[w][lane];
  }

  // By all lanes: what was loaded is needed from here on.
  __device__ __forceinline__ void share(u32 (&tails)[32]) {
    header = __shfl_sync(~0u, tail, 31);
    __syncwarp();
    tails[threadIdx.x & 31] = tail;
    __syncwarp();
  }
};

// W in shared memory in place of W', from what was added to it: coefficient * sums.
template <bool HALF>
__device__ __forceinline__ void recover(Stored<LATE16> (*eights)[THREADS], const Sum& sums, float coefficient, const Kept& kept, const u32 (&tails)[32], const Pool& pool) {
  u32 escaped = escapes(kept.words);
  // An escape's own bits say "0 beyond".
  u32 words[3];
#pragma unroll
  for (int w = 0; w < 3; w++) words[w] = kept.words[w] & ~((escaped >> w & 0x1249 * BOTH) << 2);
  words[2] &= ~(escaped & 0x80008000);
#pragma unroll
  for (u32 n = 0; n < 4; n++) {
    Stored<LATE16> eight = eights[n][threadIdx.x];
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      const u32 guess = ordinals(estimate<HALF>(eight.raw[k], &sums[n / 2][k][n % 2 * 2], coefficient));
      eight.raw[k] = numbers(guess + beyond_of(words, n * 4 + k) - 3 * BOTH);
    }
    eights[n][threadIdx.x] = eight;
  }
  if (!__any_sync(~0u, escaped)) return;
  u32 all, next = scan(__popc(escaped), all);
  const u16* const pooled = pool.slots + u64((kept.header & SLOT) - 1) * 1024 + (threadIdx.x & 31) * 8;
  for (; escaped; escaped &= escaped - 1, next++) {
    const Element element(__ffs(escaped) - 1);
    const u16 code = kept.header & POOLED ? pooled[element.n * 256 + element.i] : reinterpret_cast<const u16*>(tails)[next];
    element.of(eights) = code;
  }
}

// Merges W, which lies in shared memory: adds coefficient * sums, and keeps aside what that loses. Whether there was room.
template <bool HALF>
__device__ __forceinline__ bool merge(Stored<LATE16> (&merged)[4], Stored<LATE16> (*eights)[THREADS], const Sum& sums, float coefficient, const Kept& kept,
                                      u32 (&tails)[32], const Pool& pool, const Target& target, const Place<1>& place) {
  u32 words[3] = {};
#pragma unroll
  for (u32 n = 0; n < 4; n++) {
    const Stored<LATE16> eight = eights[n][threadIdx.x];
    const bool in = place.row_of(n) < target.rows && place.column_of(n) < target.columns;
    bool usual = true;
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      const float* sum = &sums[n / 2][k][n % 2 * 2];
      float a, b;
      unpack<HALF>(eight.raw[k], a, b);
      merged[n].raw[k] = pack<HALF>(fmaf(coefficient, sum[0], a), fmaf(coefficient, sum[1], b));
      usual &= sum[0] * sum[1] != 0.0f;
    }
    if (!usual) {
      // Where nothing is added every bit stays, -0 and NaN included.
#pragma unroll
      for (u32 k = 0; k < 4; k++) {
        const float* sum = &sums[n / 2][k][n % 2 * 2];
        if (sum[0] == 0.0f) merged[n].raw[k] = (merged[n].raw[k] & 0xffff0000) | (eight.raw[k] & 0xffff);
        if (sum[1] == 0.0f) merged[n].raw[k] = (merged[n].raw[k] & 0xffff) | (eight.raw[k] & 0xffff0000);
      }
    }
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      const u32 right = ordinals(eight.raw[k]), guess = ordinals(estimate<HALF>(merged[n].raw[k], &sums[n / 2][k][n % 2 * 2], coefficient));
      const u32 low = min((right & 0xffff) - (guess & 0xffff) + 3, 7u), high = min((right >> 16) - (guess >> 16) + 3, 7u);
      keep(words, n * 4 + k, in ? low | high << 16 : 0);
    }
  }
  const u32 lane = threadIdx.x & 31;
  u32 mask = escapes(words), all = 0, next = 0, header = kept.header & SLOT;
  // All lanes have read the old tail.
  __syncwarp();
  if (__any_sync(~0u, mask)) next = scan(__popc(mask), all);
  if (all > Unit::ESCAPES) {
    if (header == 0) {
      if (lane == 0) header = atomicAdd(pool.wanted, 1) + 1;
      header = __shfl_sync(~0u, header, 0);
      if (header > pool.size) {
        if (lane == 0) kept.unit->tail[31] = kept.header | PENDING;
        return false;
      }
    }
    u16* const to = pool.slots + u64(header - 1) * 1024 + lane * 8;
#pragma unroll
    for (u32 n = 0; n < 4; n++) *reinterpret_cast<Stored<LATE16>*>(to + n * 256) = eights[n][threadIdx.x];
    header |= POOLED;
  } else {
    for (; mask; mask &= mask - 1) reinterpret_cast<u16*>(tails)[next++] = Element(__ffs(mask) - 1).of(eights);
    __syncwarp();
  }
#pragma unroll
  for (int w = 0; w < 3; w++) kept.unit->words[w][lane] = words[w];
  kept.unit->tail[lane] = lane == 31 ? header : tails[lane];
  return true;
}

// The general reader of terms: what was added and what will be, at their strengths.
struct Sums {
  using Factors = ::Factors<3, 1, 1, 4, true>;
  static constexpr u32 TILES = 2;  // on their way
  static constexpr u32 ASIDE = sizeof(Sum) * THREADS;
  Sum before, after;

  __device__ __forceinline__ const Sum& old() const { return before; }
  __device__ __forceinline__ const Sum& changed() const { return after; }
  static __device__ __forceinline__ float coefficient(float) { return 1.0f; }

  __device__ __forceinline__ void add_all(Factors& factors, void* shared, const Target& target, const Term* terms, const Place<1>& place) {
    clear(before);
    clear(after);
    const Aside<THREADS> aside = {static_cast<float4(*)[THREADS]>(shared)};
    sum_products(factors.reader, aside, target, terms, place, [&](const Sum& product, const Term& term) {
      add_scaled(before, product, term.carry, target, term, place);
      add_scaled(after, product, term.coefficient, target, term, place);
    });
    const Stored<LATE16> (*none)[THREADS] = nullptr;
#pragma unroll 1
    for (u32 i = target.products; i < target.count; i++) {
#pragma unroll
      for (int n = 0; n < 4; n++) {
        Plain<1> plain;
        plain.load(n, target, terms[i], place);
        plain.add<LATE16>(before, n, terms[i].carry, none, target, terms[i]);
        plain.add<LATE16>(after, n, terms[i].coefficient, none, target, terms[i]);
        asm volatile("" ::: "memory");
      }
    }
  }
};

// One product of 16-bit factors on the whole weight: the sum is the same before and after, and only its coefficient changes.
struct OneProduct {
  using Factors = ::Factors<2, 1, 1, 4, false>;
  static constexpr u32 TILES = 1;  // so that six blocks fit on a multiprocessor
  static constexpr u32 ASIDE = 0;
  Sum sum[1];

  __device__ __forceinline__ const Sum& old() const { return sum[0]; }
  __device__ __forceinline__ const Sum& changed() const { return sum[0]; }
  static __device__ __forceinline__ float coefficient(float own) { return own; }

  __device__ __forceinline__ void add_all(Factors& factors, void*, const Target&, const Term*, const Place<1>& place) {
    clear(sum[0]);
    const Product& product = factors.reader.get(0);
    const Product::Pair& pair = product.pairs[0];
    const bool mine = product.has_block(place.row_block);
    const uint4* up = up_of(pair, place.row_block);
    if (pair.format == FORMAT_F16) factors.reader.template add_pair<true, 1, 1>(sum, up, 0, product, pair, place.group, mine);
    else factors.reader.template add_pair<false, 1, 1>(sum, up, 0, product, pair, place.group, mine);
  }
};

template <bool HALF, class Sums>
__device__ __forceinline__ void compact(const Target* targets, const Term* all, const Strip* strips, u32 room, const Pool& pool) {
  using Copied = Tiles<LATE16, Place<1>, Sums::TILES>;
  using Factors = typename Sums::Factors;
  __shared__ Work work;
  __shared__ u32 all_tails[THREADS / 32][32];
  u32 (&tails)[32] = all_tails[threadIdx.x / 32];
  const Strip strip = strips[blockIdx.x];
  if (threadIdx.x == 0) Factors::init(strip);
  work.load(targets, all, strip.target);
  const Target& target = work.target;
  const Term* const terms = work.terms;
  Copied tiles(shared, target, strip);
  Factors factors(Copied::BYTES + Sums::ASIDE, room, target, terms, strip);
  Place<1> place(strip);
  const u32 across = (target.columns + COLUMNS - 1) / COLUMNS, mode = target.axis;
  Unit* const units = static_cast<Unit*>(target.out) + u64(place.row_block) * across;
  const bool there = place.row_block * 16 < target.rows;
  factors.wait();
#pragma unroll 1
  for (u32 tile = strip.column_tile; tile < strip.column_tile + strip.count; tile++) {
    place.move_to(tile);
    Kept kept = {};
    if (there) kept.load(units + tile, mode);
    Sums sums;
    sums.add_all(factors, shared + Copied::BYTES / 16, target, terms, place);
    // Where a lane put what it copied itself.
    Stored<LATE16> (*eights)[THREADS] = const_cast<Stored<LATE16>(*)[THREADS]>(tiles.wait());
    if (there) kept.share(tails);
    const bool pending = kept.header & PENDING;
    if (there && pool.units != (pending ? 2 : 1)) {
      if (mode != FRESH) recover<HALF>(eights, sums.old(), Sums::coefficient(terms[0].carry), kept, tails, pool);
      Stored<LATE16> merged[4];
      bool done = true;
      if (mode == RESTORE) {
#pragma unroll
        for (u32 n = 0; n < 4; n++) merged[n] = eights[n][threadIdx.x];
        if (place.lane == 31) kept.unit->tail[31] = kept.header & SLOT;
      } else {
        done = merge<HALF>(merged, eights, sums.changed(), Sums::coefficient(terms[0].coefficient), kept, tails, pool, target, place);
      }
      if (done) {
        for_eights<2>(place, target.base, target.base_row, target.rows, min(target.columns, tiles.until()), [&](u32 n, u8* to) { merged[n].store(to); });
      }
    }
    tiles.copy_next();
  }
}

#define COMPACT(name, blocks, half, sums)                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, blocks) compact_##name(const Target* targets, const Term* terms,      \
                                                                               const Strip* strips, u32 room, Pool pool) {    \
    compact<half, sums>(targets, terms, strips, room, pool);                                                                    \
  }

COMPACT(bf16, 3, false, Sums)
COMPACT(f16, 3, true, Sums)
COMPACT(bf16_one, 6, false, OneProduct)
COMPACT(f16_one, 6, true, OneProduct)
