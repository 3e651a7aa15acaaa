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

template <u32 FRAGMENTS>
struct Ring {
#ifndef NSLOTS
#define NSLOTS 4
#endif
  static constexpr u32 SLOTS = NSLOTS, WARPS = THREADS / 32;
  static constexpr u32 GROUP = FRAGMENTS * 64, SLOT = 2 * GROUP;  // uint4s

  // In shared memory.
  struct State {
    Barrier full[SLOTS], empty[SLOTS], ups;
    // The unit that is copied next.
    u32 tile, term, second, rank;

    // By one thread, before a __syncthreads.
    __device__ __forceinline__ void init(const Strip& strip) {
      for (u32 i = 0; i < SLOTS; i++) full[i].init(Barrier::ARRIVALS), empty[i].init(WARPS);
      ups.init(Barrier::ARRIVALS);
      tile = strip.column_tile, term = second = rank = 0;
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
  };

  uint4* slots;
  State& state;
  const Target& target;
  const Term* terms;
  u32 last;  // tile
  u32 unit = 0;

  __device__ __forceinline__ Ring(void* shared, State& state, const Target& target, const Term* terms, const Strip& strip)
      : slots(static_cast<uint4*>(shared)), state(state), target(target), terms(terms), last(strip.column_tile + strip.count) {}

  // By a warp: copies the next unit into a slot that is free.
  __device__ __forceinline__ void fill(u32 slot) {
    if (LYCORE_BULK && threadIdx.x % 32 != 0) return;
    u32 tile = state.tile, i = state.term;
    while (tile < last) {
      if (i >= target.products) {
        i = 0;
        tile++;
        continue;
      }
      const Term& term = terms[i];
      const Groups groups(term, tile);
      if (!groups.any) {
        i++;
        continue;
      }
      const u32 second = state.second, rank = state.rank;
      const Pair pair(term, second);
      const u32 parts = parts_of(pair.format), until = min(rank + FRAGMENTS / parts, pair.ranks);
      Barrier& full = state.full[slot];
#pragma unroll
      for (u32 g = 0; g < 2; g++) {
        full.fetch(slots + slot * SLOT + g * GROUP, pair.down + (u64(groups.group[g]) * pair.ranks + rank) * parts * 64, (until - rank) * parts * 64);
      }
      full.fetched();
      const bool done = until == pair.ranks, more = done && !second && term.kind == HADAMARD;
      // On sm_80 all lanes have read what one changes.
      if (!LYCORE_BULK) __syncwarp();
      if (threadIdx.x % 32 == 0) {
        state.rank = done ? 0 : until;
        state.second = done ? more : second;
        state.term = i + (done && !more);
        state.tile = tile;
      }
      if (!LYCORE_BULK) __syncwarp();
      return;
    }
  }

  // Two warps begin.
  template <u32 BLOCKS>
  __device__ __forceinline__ void begin(Ups<BLOCKS> ups, const Strip& strip) {
    const u32 warp = threadIdx.x / 32;
    if (warp == 1) {
      for (u32 i = 0; i < SLOTS; i++) fill(i);
    }
    if (warp != 0 || (LYCORE_BULK && threadIdx.x != 0)) return;
    constexpr u32 TILE = WARPS * BLOCKS;
    const u32 block = strip.row_tile * TILE;
    for (u32 i = 0; i < target.products; i++) {
      const Term& term = terms[i];
      const u32 start = term.row / 16, first = max(block, start), last = min(block + TILE, start + row_blocks(term));
      for (u32 n = 0; n < pairs_of(term); n++) {
        const Pair pair(term, n);
        const u32 each = pair.fragments() * 32;
        uint4* to = ups.take(pair);
        if (to && first < last) state.ups.fetch(to + (first - block) * each, pair.up + u64(first - start) * each, (last - first) * each);
      }
    }
    state.ups.fetched();
  }

  // The unit that comes next, once it is there.
  __device__ __forceinline__ const uint4* next() {
    state.full[unit % SLOTS].wait(unit / SLOTS % 2);
    return slots + unit % SLOTS * SLOT;
  }

  // After reading it.
  __device__ __forceinline__ void release() {
    // The slot of the unit before: all warps but the slowest are done with it by now.
    if (unit > 0 && unit % WARPS == threadIdx.x / 32) {
      const u32 slot = (unit - 1) % SLOTS;
      state.empty[slot].wait((unit - 1) / SLOTS % 2);
      fill(slot);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) state.empty[unit % SLOTS].arrive();
    unit++;
  }

  // products += up @ down. `up_step`: between blocks of rows.
  template <bool HALF, int PARTS, u32 BLOCKS>
  __device__ __forceinline__ void add_pair(Sum (&products)[BLOCKS], const uint4* up, u32 up_step, const Pair& pair, const Groups&, bool any) {
    constexpr u32 STEP = FRAGMENTS / PARTS;
    const u32 ranks = pair.ranks;
#pragma unroll 1
    for (u32 k = 0; k < ranks; k += STEP) {
      const uint4* down = next() + (threadIdx.x & 31);
      if (any) {
#pragma unroll
        for (u32 i = 0; i < STEP; i++) {
          if (k + i >= ranks) break;
          const uint4* const groups[2] = {down + i * PARTS * 64, down + GROUP + i * PARTS * 64};
          add_product<HALF, PARTS>(products, up + (k + i) * PARTS * 32, up_step, groups, 64);
        }
      }
      release();
    }
  }
};
#endif

extern __shared__ uint4 shared[];

// A block's factors. In dynamic shared memory the tiles of the weight come first, `before` bytes, then the ring, then the up factors.
template <u32 FRAGMENTS, u32 BLOCKS>
struct Factors {
  Ups<BLOCKS> ups;
#ifdef LYCORE_RING
  using Reader = Ring<FRAGMENTS>;
  Reader reader;

  static __device__ __forceinline__ typename Reader::State& state() {
    __shared__ typename Reader::State all;
    return all;
  }

  // By one thread, before a __syncthreads.
  static __device__ __forceinline__ void init(const Strip& strip) { state().init(strip); }

  __device__ __forceinline__ Factors(u32 before, u32 room, const Target& target, const Term* terms, const Strip& strip)
      : ups(shared + before / 16 + Reader::SLOTS * Reader::SLOT, room), reader(shared + before / 16, state(), target, terms, strip) {
    reader.begin(ups, strip);
  }

  // Until the up factors are there.
  __device__ __forceinline__ void wait() { state().ups.wait(0); }
#else
  Direct reader;

  static __device__ __forceinline__ void init(const Strip&) {}
  __device__ __forceinline__ Factors(u32, u32, const Target&, const Term*, const Strip&) : ups(nullptr, 0) {}
  __device__ __forceinline__ void wait() {}
#endif
};
