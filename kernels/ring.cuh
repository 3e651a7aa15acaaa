// Factors on their way to the warps of a block: down factors are copied ahead into a ring of slots in shared memory, up factors once a strip. The warps
// never wait for each other but through the ring: a slot is filled anew once all have read it, and they take turns in doing that.
//
// What fills a slot, a unit: up to FRAGMENTS fragments of a pair's down factor for each of the tile's two groups. On sm_90 and later one lane asks the
// copy engine for two runs; on sm_80 the lanes of a warp copy 16 bytes each. sm_75 has no copies that run ahead: there factors are read where they are.
#pragma once
#include "tile.cuh"

// LYCORE_NO_BULK tests on a newer card how sm_80 copies, LYCORE_EMULATE_MMA what sm_75 does.
#if __CUDA_ARCH__ >= 800 && !defined(LYCORE_EMULATE_MMA)
#define LYCORE_RING 1
#endif
#if __CUDA_ARCH__ >= 900 && !defined(LYCORE_NO_BULK)
#define LYCORE_BULK 1
#else
#define LYCORE_BULK 0
#endif

#ifdef LYCORE_RING
// Counts arrivals, and the bytes that the copy engine has still to bring. Its phases alternate between parity 0 and 1.
struct Barrier {
  u64 state;

  __device__ __forceinline__ u32 address() const { return static_cast<u32>(__cvta_generic_to_shared(this)); }

  __device__ __forceinline__ void init(u32 arrivals) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory"); }

  __device__ __forceinline__ void arrive() {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(address()) : "memory");
  }

  // Until the phase of this parity is over.
  __device__ __forceinline__ void wait(u32 parity) const {
    u32 over;
    do {
#if __CUDA_ARCH__ >= 900
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(over) : "r"(address()), "r"(parity) : "memory");
#else
      asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(over) : "r"(address()), "r"(parity) : "memory");
#endif
    } while (!over);
  }

  // What a warp copies: `fetch` any number of runs, then tell that these were all. On sm_90 by one lane.
  static constexpr u32 ARRIVALS = LYCORE_BULK ? 1 : 32;

  __device__ __forceinline__ void fetch(uint4* to, const uint4* from, u32 count) {
#if LYCORE_BULK
    const u32 at = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared.b64 [%0], %1;" ::"r"(address()), "r"(count * 16) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at), "l"(from), "r"(count * 16), "r"(address()) : "memory");
#else
    for (u32 i = threadIdx.x % 32; i < count; i += 32) copy_async<16>(to + i, from + i);
#endif
  }

  __device__ __forceinline__ void fetched() {
#if LYCORE_BULK
    arrive();
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address()) : "memory");
#endif
  }
};

// FRAGMENTS of a group are in a slot at most; ACROSS tiles stand side by side, DOWN warps take each. CALLED: filling a slot is a call, where a kernel reads
// units of many kinds and would not fit in the instruction cache with all that inlined.
template <u32 FRAGMENTS, u32 ACROSS, u32 DOWN, bool CALLED>
struct Ring {
  static constexpr u32 SLOTS = 4, WARPS = DOWN * ACROSS;
  static constexpr u32 GROUP = FRAGMENTS * 64, SLOT = 2 * ACROSS * GROUP;  // uint4s

  // In shared memory.
  struct State {
    Barrier full[SLOTS], empty[SLOTS], ups;
    Barrier turn;  // one fill after the other
    // The unit that is copied next.
    u32 tile, product, pair, rank;

    // By one thread, before a __syncthreads.
    __device__ __forceinline__ void init(const Strip& strip) {
      for (u32 i = 0; i < SLOTS; i++) full[i].init(Barrier::ARRIVALS), empty[i].init(WARPS);
      ups.init(Barrier::ARRIVALS);
      turn.init(1);
      tile = strip.column_tile, product = pair = rank = 0;
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
  };

  uint4* slots;
  Product* products;  // in shared memory, as many as the target has
  State& state;
  u32 count, last;  // products; the tile after the strip's
  u32 unit = 0;

  // Whether a product has a part in any of the tiles side by side.
  __device__ __forceinline__ bool touches(const Product& product, u32 tile) const { return touches(product, tile, last); }

  static __device__ __forceinline__ bool touches(const Product& product, u32 tile, u32 last) {
    bool any = product.touches(tile);
#pragma unroll
    for (u32 i = 1; i < ACROSS; i++) any |= tile + i < last && product.touches(tile + i);
    return any;
  }

  // By a warp: copies the next unit into a slot that is free.
  __device__ __forceinline__ void fill(u32 slot) const {
    if constexpr (CALLED) call_fill(slots, products, state, count, last, slot);
    else fill(slots, products, state, count, last, slot);
  }

  static __device__ __noinline__ void call_fill(uint4* slots, const Product* products, State& state, u32 count, u32 last, u32 slot) {
    fill(slots, products, state, count, last, slot);
  }

  static __device__ __forceinline__ void fill(uint4* slots, const Product* products, State& state, u32 count, u32 last, u32 slot) {
    if (LYCORE_BULK && threadIdx.x % 32 != 0) return;
    u32 tile = state.tile, i = state.product;
    for (; tile < last; tile += ACROSS, i = 0) {
      while (i < count && !touches(products[i], tile, last)) i++;
      if (i < count) break;
    }
    if (tile >= last) return;
    const Product& product = products[i];
    const u32 n = state.pair, rank = state.rank;
    const Product::Pair& pair = product.pairs[n];
    const u32 parts = down_parts(pair.format), until = min(rank + FRAGMENTS / parts, pair.ranks);
    Barrier& full = state.full[slot];
    const uint4* from = pair.down + u64(tile * 2 * pair.ranks + rank) * parts * 64;
    uint4* to = slots + slot * SLOT;
    const u32 run = (until - rank) * parts * 64;
#pragma unroll
    for (u32 g = 0; g < 2 * ACROSS; g++) {
      if (tile + g / 2 < last && product.has_group(tile * 2 + g)) full.fetch(to + g * GROUP, from + g * pair.downs * 64, run);
    }
    full.fetched();
    const bool done = until == pair.ranks, more = done && n + 1 < product.count;
    // On sm_80 all lanes have read what one changes.
    if (!LYCORE_BULK) __syncwarp();
    if (threadIdx.x % 32 == 0) {
      state.rank = done ? 0 : until;
      state.pair = done ? more : n;
      state.product = i + (done && !more);
      state.tile = tile;
    }
    if (!LYCORE_BULK) __syncwarp();
  }

  // The next unit, once it is there.
  __device__ __forceinline__ const uint4* next() {
    state.full[unit % SLOTS].wait(unit / SLOTS % 2);
    return slots + unit % SLOTS * SLOT + (ACROSS > 1 ? threadIdx.x / (32 * DOWN) * 2 * GROUP : 0);
  }

  // After reading it. compute-sanitizer's racecheck calls what lanes 1 to 31 read a hazard with the next fill: it does not know that __syncwarp puts that
  // before their first lane's arrival, and is content when every lane arrives itself.
  __device__ __forceinline__ void release() {
    // What is filled is the slot of a unit before, which by now all warps but the slowest are done with.
    constexpr u32 LATER = SLOTS / 2;
    if (unit >= LATER && unit % WARPS == threadIdx.x / 32) {
      const u32 before = unit - LATER, slot = before % SLOTS;
      state.empty[slot].wait(before / SLOTS % 2);
      state.turn.wait((before + 1) % 2);
      // No lane still waits for what the first is about to end.
      __syncwarp();
      fill(slot);
      if (threadIdx.x % 32 == 0) state.turn.arrive();
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) state.empty[unit % SLOTS].arrive();
    unit++;
  }

  __device__ __forceinline__ const Product& get(u32 i) const { return products[i]; }

  // products += up @ down, by all warps, if `mine`. `up_step`: between blocks of rows.
  template <bool HALF, int UPS, int DOWNS, u32 BLOCKS>
  __device__ __forceinline__ void add_pair(Sum (&products)[BLOCKS], const uint4* up, u32 up_step, const Product&, const Product::Pair& pair, u32, bool mine) {
    constexpr u32 STEP = FRAGMENTS / DOWNS;
    const u32 ranks = pair.ranks;
#pragma unroll 1
    for (u32 k = 0; k < ranks; k += STEP) {
      const uint4* down = next() + (threadIdx.x & 31);
      if (mine) {
#pragma unroll
        for (u32 i = 0; i < STEP; i++) {
          if (k + i >= ranks) break;
          const uint4* const groups[2] = {down + i * DOWNS * 64, down + GROUP + i * DOWNS * 64};
          add_product<HALF, UPS, DOWNS>(products, up, up_step, groups, 64);
          up += UPS * 32;
        }
      }
      release();
    }
  }
};
#endif

extern __shared__ uint4 shared[];

// A block's factors. In dynamic shared memory the tiles of the weight come first, `before` bytes, then the ring, then the up factors of the block's rows
// as far as there is room, which counts fragments of four warps (what does not fit is read where it is), then the table of products.
template <u32 FRAGMENTS, u32 BLOCKS, u32 ACROSS, u32 DOWN, bool CALLED>
struct Factors {
#ifdef LYCORE_RING
  using Reader = Ring<FRAGMENTS, ACROSS, DOWN, CALLED>;
  Reader reader;

  static __device__ __forceinline__ typename Reader::State& state() {
    __shared__ typename Reader::State all;
    return all;
  }

  // By one thread, before a __syncthreads.
  static __device__ __forceinline__ void init(const Strip& strip) { state().init(strip); }

  // By all threads; ends with a barrier.
  __device__ __forceinline__ Factors(u32 before, u32 room, const Target& target, const Term* terms, const Strip& strip)
      : reader{shared + before / 16, nullptr, state(), target.products, strip.column_tile + strip.count} {
    uint4* const ups = reader.slots + Reader::SLOTS * Reader::SLOT;
    reader.products = reinterpret_cast<Product*>(ups + room * THREADS);
    for (u32 i = threadIdx.x; i < target.products; i += blockDim.x) reader.products[i].set(terms[i]);
    __syncthreads();
    const u32 warp = threadIdx.x / 32;
    if (warp == 1) {
      for (u32 i = 0; i < Reader::SLOTS; i++) reader.fill(i);
    }
    if (warp == 0 && (!LYCORE_BULK || threadIdx.x == 0)) {
      constexpr u32 TILE = DOWN * BLOCKS;
      const u32 block = strip.row_tile * TILE;
      u32 used = 0;
      for (u32 i = 0; i < target.products; i++) {
        Product& product = reader.products[i];
        const u32 first = max(block, product.first_block), last = min(block + TILE, product.first_block + product.blocks);
        for (u32 n = 0; n < product.count; n++) {
          Product::Pair& pair = product.pairs[n];
          const u32 need = TILE / 4 * pair.ups, each = pair.ups * 32;
          if (used + need > room) continue;
          uint4* to = ups + used * THREADS;
          used += need;
          if (first < last) state().ups.fetch(to + (first - block) * each, pair.up + u64(first) * each, (last - first) * each);
          if (!LYCORE_BULK) __syncwarp();
          if (threadIdx.x == 0) pair.up = to - u64(block) * each;
        }
      }
      state().ups.fetched();
    }
    __syncthreads();
  }

  // Until the up factors are there.
  __device__ __forceinline__ void wait() { state().ups.wait(0); }

  // Shared memory behind all of it.
  __device__ __forceinline__ void* end() const { return reader.products + reader.count; }
#else
  Direct reader;
  void* behind;

  static __device__ __forceinline__ void init(const Strip&) {}
  __device__ __forceinline__ Factors(u32 before, u32, const Target&, const Term* terms, const Strip&) : reader(terms), behind(shared + before / 16) {}
  __device__ __forceinline__ void wait() {}
  __device__ __forceinline__ void* end() const { return behind; }
#endif
};
