// T = W @ a1 for each tap of a kernel, the part of GLoRA that reads the weight: W + T @ a2 is then a low-rank merge.
//
// W [rows, channels * taps], column = channel * taps + tap; a1 [channels, rank], packed by pack.cu's RIGHT layout. T goes out as UP fragments in
// FORMAT_SPLIT of the matrix [rows, taps * R], R the rank rounded up to 16: rank tap * R + k. Its partner is a2 in DOWN fragments with as many taps.
//
// Products on tensor cores, W as the left operand: one bf16 number where it is one (bf16, 8 bits), otherwise the exact sum of two (fp16) or three
// (fp32; what bf16 rounds to infinity becomes NaN); a1 is one or three. The ranks of these products, here channels, are in such an order that a lane's
// eight are neighbours in W: 16 bytes of a 16-bit weight.
//
// Grid: one block of 128 threads per tile: so many rows of one job, 32 ranks; tiles = {job, row tile * ceil(R / 32) + ranks / 32}.
//   plain                128 rows; a warp has 32 of them and copies its own part of W ahead through shared memory
//   not plain, taps 1    64 rows;  a warp has 16; W is gathered through shared memory, element by element
//   taps > 1             16 rows;  a warp has every fourth tap
// Bytes: each element of W read (once per 32 ranks), 6 written for each of T; a1 from L2, 2 or 6 bytes * channels * R a tile.
#include "tile.cuh"

struct Right {
  const void* base;          // the weight's region
  const u32* base_columns;   // offset of every column; NULL: side by side
  const void* a1;            // [rank block][block of 16 channels][part][lane]
  void* out;                 // [row block][tap][rank block][part][lane]
  u64 base_row;
  u32 rows, channels, taps;
  u32 ranks;   // blocks of 16, of one tap
  u32 dtype;   // of base
  u32 format;  // of a1: FORMAT_BF16 or FORMAT_SPLIT
  u32 shift;   // rows of T's first block before the first
  u32 plain;   // one tap; columns side by side, in multiples of eight; rows begin at 16 bytes (8 of 8-bit ones)
  float scale;  // the real weight is scale * stored
  u32 unused;
};

constexpr u32 RANK_BLOCKS = 2;  // of a tile
constexpr u32 TAPS = 3;         // of a warp, at once
constexpr u32 GROUP = 32;       // channels of a step: two products deep

// A rank block of 16 as two products of 8 ranks.
typedef float Part[2][4];

// How many bf16 numbers make up a stored one.
template <u32 DTYPE>
constexpr int LEFT = DTYPE == F32 ? 3 : DTYPE == F16 ? 2 : 1;

// Zeros where not `there`.
template <int BYTES>
__device__ __forceinline__ void copy_or_clear(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(to));
  const u32 size = there ? BYTES : 0;
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(size) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(BYTES), "r"(size) : "memory");
#else
  if constexpr (BYTES == 16) *static_cast<uint4*>(to) = there ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  else *static_cast<uint2*>(to) = there ? *static_cast<const uint2*>(from) : make_uint2(0, 0);
#endif
}

// What a lane holds of 16 rows and 32 channels: rows g and g + 8, eight channels from t * 8, as left operands of two products.
template <int PARTS>
struct Left {
  uint4 step[2][PARTS];

  // `at(row, i)` is a pair of neighbours, as floats.
  template <class At>
  __device__ __forceinline__ void set(At at) {
#pragma unroll
    for (int s = 0; s < 2; s++) {
      u32 words[4][PARTS];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float2 rest = at(i % 2, s * 2 + i / 2);
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
          const u32 word = words[i][p] = pack_bf16(rest.x, rest.y);
          rest.x -= bits_to_float(word << 16);
          rest.y -= bits_to_float(word & 0xffff0000);
        }
      }
#pragma unroll
      for (int p = 0; p < PARTS; p++) step[s][p] = make_uint4(words[0][p], words[1][p], words[2][p], words[3][p]);
    }
  }

  template <u32 DTYPE>
  __device__ __forceinline__ void set(const Stored<DTYPE>& upper, const Stored<DTYPE>& lower) {
    if constexpr (DTYPE == BF16) {
#pragma unroll
      for (int s = 0; s < 2; s++) step[s][0] = make_uint4(upper.raw[2 * s], lower.raw[2 * s], upper.raw[2 * s + 1], lower.raw[2 * s + 1]);
    } else {
      set([&](int row, int i) {
        const Stored<DTYPE>& eight = row ? lower : upper;
        return make_float2(eight.value(2 * i), eight.value(2 * i + 1));
      });
    }
  }
};

// The lane's fragments of a1 for a rank block and a group of channels.
template <int PARTS>
struct Fragments {
  uint4 step[2][PARTS];

  __device__ __forceinline__ void load(const Right& job, u32 block, u32 group) {
    const u64 blocks = (job.channels + GROUP - 1) / GROUP * 2;
    const uint4* from = static_cast<const uint4*>(job.a1) + (block * blocks + group * 2) * PARTS * 32 + (threadIdx.x & 31);
#pragma unroll
    for (int i = 0; i < 2 * PARTS; i++) step[i / PARTS][i % PARTS] = __ldg(from + i * 32);
  }
};

template <int L, int R>
__device__ __forceinline__ void add_product(Part& sum, const Left<L>& left, const Fragments<R>& right) {
  // Tensor cores round towards zero: hundreds of steps in one sum would add up to a bias. Each group is rounded to nearest into it instead.
  Part part = {};
  // Small products first. What is left out is below 2^-24 of the whole.
#pragma unroll
  for (int order = L + R - 2 < 2 ? L + R - 2 : 2; order >= 0; order--) {
#pragma unroll
    for (int i = 0; i < 2 * L; i++) {
      const int s = i % 2, p = i / 2, q = order - p;
      if (q < 0 || q >= R) continue;
      mma<false>(part[0], left.step[s][p], right.step[s][q].x, right.step[s][q].z);
      mma<false>(part[1], left.step[s][p], right.step[s][q].y, right.step[s][q].w);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i / 4][i % 4] += part[i / 4][i % 4];
}

// A warp's blocks of T, 16 rows and 16 ranks of one tap each, parked so that one piece of code writes them all.
struct Blocks {
  float (*sums)[THREADS];  // [blocks * 8]

  __device__ __forceinline__ void park(u32 block, const Part& sum) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) sums[block * 8 + i][threadIdx.x] = sum[i / 4][i % 4];
  }

  __device__ __forceinline__ void write(u32 block, const Right& job, u32 row_block, u32 tap, u32 rank_block) {
    if (row_block * 16 >= job.shift + job.rows || rank_block >= job.ranks) return;
    const u32 lane = threadIdx.x & 31, row = row_block * 16 + lane / 4 - job.shift;
    u32 words[3][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // As in pack.cu: rows g and g + 8 of the first eight ranks, then of the others.
      const bool there = row + i % 2 * 8 < job.rows;
      float low[3], high[3];
      split(there ? sums[block * 8 + 2 * i][threadIdx.x] * job.scale : 0.0f, low);
      split(there ? sums[block * 8 + 2 * i + 1][threadIdx.x] * job.scale : 0.0f, high);
#pragma unroll
      for (int p = 0; p < 3; p++) words[p][i] = pack_bf16(low[p], high[p]);
    }
    uint4* to = static_cast<uint4*>(job.out) + ((u64(row_block) * job.taps + tap) * job.ranks + rank_block) * 3 * 32 + lane;
#pragma unroll
    for (int p = 0; p < 3; p++) to[p * 32] = make_uint4(words[p][0], words[p][1], words[p][2], words[p][3]);
  }
};

constexpr u32 RING = 32768;  // bytes of shared memory

template <u32 DTYPE, int R>
__device__ __forceinline__ void right_plain(const Right& job, u8* shared, u32 row_tile, u32 first_rank) {
  // A stage has 128 bytes of a row: DRAM is slow at less.
  constexpr u32 BLOCKS = 2, GROUPS = 4 / SIZE<DTYPE>;
  using Tile = Stored<DTYPE>[GROUPS][2 * BLOCKS][THREADS];
  static_assert(2 * sizeof(Tile) == RING, "");
  Tile* tiles = reinterpret_cast<Tile*>(shared);
  const u32 lane = threadIdx.x & 31, row_block = (row_tile * (THREADS / 32) + threadIdx.x / 32) * BLOCKS;
  const u32 first_row = row_block * 16 + lane / 4 - job.shift, column = lane % 4 * 8;
  const u8* base = static_cast<const u8*>(job.base);
  const u32 groups = (job.channels + GROUP - 1) / GROUP;
  const auto copy = [&](u32 first) {
#pragma unroll
    for (u32 i = 0; i < GROUPS * 2 * BLOCKS; i++) {
      const u32 g = i % GROUPS, n = i / GROUPS, row = first_row + n * 8, at = (first + g) * GROUP + column;
      if (first + g >= groups) continue;
      const bool there = row < job.rows && at < job.channels;
      const u8* from = there ? base + (row * job.base_row + at) * SIZE<DTYPE> : base;
      u8* to = reinterpret_cast<u8*>(&tiles[first / GROUPS % 2][g][n][threadIdx.x]);
      if constexpr (SIZE<DTYPE> == 1) copy_or_clear<8>(to, from, there);
      else
#pragma unroll
        for (int k = 0; k < SIZE<DTYPE> / 2; k++) copy_or_clear<16>(to + 16 * k, from + 16 * k, there);
    }
    commit_copies();
  };
  Part sums[BLOCKS][RANK_BLOCKS] = {};
  copy(0);
#pragma unroll 1
  for (u32 group = 0; group < groups; group++) {
    if (group % GROUPS == 0) copy(group + GROUPS);
    Fragments<R> right[RANK_BLOCKS];
#pragma unroll
    for (u32 k = 0; k < RANK_BLOCKS; k++) {
      // Beyond the last rank block: the first again, for nothing.
      right[k].load(job, first_rank + k < job.ranks ? first_rank + k : first_rank, group);
    }
    wait_for_copies<1>();
    const Stored<DTYPE> (*eights)[THREADS] = tiles[group / GROUPS % 2][group % GROUPS];
#pragma unroll
    for (u32 n = 0; n < BLOCKS; n++) {
      Left<LEFT<DTYPE>> left;
      left.set(eights[2 * n][threadIdx.x], eights[2 * n + 1][threadIdx.x]);
#pragma unroll
      for (u32 k = 0; k < RANK_BLOCKS; k++) add_product(sums[n][k], left, right[k]);
    }
  }
  // Other lanes may still read what lies there.
  __syncthreads();
  Blocks parked = {reinterpret_cast<float (*)[THREADS]>(shared)};
#pragma unroll
  for (u32 i = 0; i < BLOCKS * RANK_BLOCKS; i++) parked.park(i, sums[i / RANK_BLOCKS][i % RANK_BLOCKS]);
#pragma unroll 1
  for (u32 i = 0; i < BLOCKS * RANK_BLOCKS; i++) parked.write(i, job, row_block + i / RANK_BLOCKS, 0, first_rank + i % RANK_BLOCKS);
}

// Gathers as many taps as the warps take at once (or as many blocks of 16 rows as there are warps), 32 channels at a time.
template <u32 DTYPE, int R>
__device__ __forceinline__ void right_any(const Right& job, u8* shared, u32 row_tile, u32 first_rank) {
  constexpr u32 WARPS = THREADS / 32, PITCH = GROUP + 4;  // so that the lanes' 16 bytes are in different banks
  float (*gathered)[16][PITCH] = reinterpret_cast<float (*)[16][PITCH]>(shared);  // [tap or block]
  static_assert(WARPS * TAPS * 16 * PITCH * 4 <= RING && TAPS * RANK_BLOCKS * 8 * THREADS * 4 <= RING, "");
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const bool one = job.taps == 1;
  const u32 row_block = one ? row_tile * WARPS : row_tile, own_block = row_block + (one ? warp : 0);
  const u32 groups = (job.channels + GROUP - 1) / GROUP;
  for (u32 first_tap = 0; first_tap < job.taps; first_tap += WARPS * TAPS) {
    const u32 taps = min(job.taps - first_tap, WARPS * TAPS), units = one ? WARPS : taps;
    Part sums[TAPS][RANK_BLOCKS] = {};
    for (u32 group = 0; group < groups; group++) {
      __syncthreads();
      // A thread takes columns, 16 rows of each; neighbours take neighbouring ones.
      for (u32 c = one ? lane : threadIdx.x; c < GROUP * taps; c += one ? 32 : THREADS) {
        const u32 channel = c / taps, tap = c % taps, first = own_block * 16 - job.shift;
        const u32 column = (group * GROUP + channel) * job.taps + first_tap + tap;
        const bool in = group * GROUP + channel < job.channels;
        const u64 at = !in ? 0 : job.base_columns ? job.base_columns[column] : column;
        u32 codes[16];
#pragma unroll
        for (u32 r = 0; r < 16; r++) codes[r] = in && first + r < job.rows ? code_of(DTYPE, job.base, (first + r) * job.base_row + at) : 0;
#pragma unroll
        for (u32 r = 0; r < 16; r++) gathered[one ? warp : tap][r][channel] = decode(DTYPE, codes[r]);
      }
      __syncthreads();
      Fragments<R> right[RANK_BLOCKS];
#pragma unroll
      for (u32 k = 0; k < RANK_BLOCKS; k++) right[k].load(job, first_rank + k < job.ranks ? first_rank + k : first_rank, group);
#pragma unroll
      for (u32 n = 0; n < TAPS; n++) {
        const u32 unit = warp + n * WARPS;
        if (unit >= units) break;
        Left<LEFT<DTYPE>> left;
        const float (*rows)[PITCH] = gathered[unit] + lane / 4;
        left.set([&](int row, int i) { return *reinterpret_cast<const float2*>(&rows[row * 8][lane % 4 * 8 + 2 * i]); });
#pragma unroll
        for (u32 k = 0; k < RANK_BLOCKS; k++) add_product(sums[n][k], left, right[k]);
      }
    }
    __syncthreads();
    Blocks parked = {reinterpret_cast<float (*)[THREADS]>(shared)};
#pragma unroll
    for (u32 i = 0; i < TAPS * RANK_BLOCKS; i++) parked.park(i, sums[i / RANK_BLOCKS][i % RANK_BLOCKS]);
#pragma unroll 1
    for (u32 i = 0; i < TAPS * RANK_BLOCKS; i++) {
      const u32 unit = warp + i / RANK_BLOCKS * WARPS;
      if (unit < units) parked.write(i, job, own_block, one ? 0 : first_tap + unit, first_rank + i % RANK_BLOCKS);
    }
  }
}

template <u32 DTYPE>
__device__ __forceinline__ void right_of(const Right& job, u8* shared, u32 row_tile, u32 first_rank) {
  if (job.format == FORMAT_SPLIT) {
    if (job.plain) right_plain<DTYPE, 3>(job, shared, row_tile, first_rank);
    else right_any<DTYPE, 3>(job, shared, row_tile, first_rank);
  } else {
    if (job.plain) right_plain<DTYPE, 1>(job, shared, row_tile, first_rank);
    else right_any<DTYPE, 1>(job, shared, row_tile, first_rank);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) right(const Right* jobs, const uint2* tiles) {
  __shared__ uint4 shared[RING / 16];
  __shared__ Right job;
  const uint2 tile = tiles[blockIdx.x];
  if (threadIdx.x < sizeof(Right) / 4) reinterpret_cast<u32*>(&job)[threadIdx.x] = reinterpret_cast<const u32*>(jobs + tile.x)[threadIdx.x];
  __syncthreads();
  const u32 chunks = (job.ranks + RANK_BLOCKS - 1) / RANK_BLOCKS;
  const u32 row_tile = tile.y / chunks, first_rank = tile.y % chunks * RANK_BLOCKS;
  u8* bytes = reinterpret_cast<u8*>(shared);
  switch (job.dtype) {
    case F32: return right_of<F32>(job, bytes, row_tile, first_rank);
    case F16: return right_of<F16>(job, bytes, row_tile, first_rank);
    case BF16: return right_of<BF16>(job, bytes, row_tile, first_rank);
    case E4M3: return right_of<E4M3>(job, bytes, row_tile, first_rank);
    default: return right_of<E5M2>(job, bytes, row_tile, first_rank);
  }
}
