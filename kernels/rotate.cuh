// Rotations of rows or columns in blocks (OFT, BOFT): what the small ones (rotate.cu) and the large ones (rotate_large.cu) share.
//
//   W' = round(W + s * (rescale o T(W) - W))        T: the stages one after the other
//   W' = round(W + (rescale_s o T_s(W) - W))        `interpolate`: every stage is s * R + (1 - s) * I, the rescaling 1 + s * (rescale - 1)
//
// or, with `delta`, what would be added to W, in fp32. A stage turns x, the rows (axis 0) or columns (axis 1) at its positions, in consecutive
// groups: x[i] becomes the sum of block[i][j] * x[j]. Below, k counts along the turned axis and n along the other one.
//
// In place is right: what a block of threads writes it has read before, and nobody else reads it.
#pragma once
#include "common.cuh"

// Groups of one size at consecutive positions of a stage.
struct Part {
  const float* blocks;  // [count, size, size], at a multiple of 16 bytes
  const u32* order;     // the row or column at each position of the whole stage; NULL: its own
  u32 first;            // position
  u32 count, size;
  u32 stage;
};

// One rotation of a weight or of a region of one. Strides and offsets count elements.
struct Rotation {
  const void* base;         // the region's first element
  void* out;                // likewise, may be `base`; with `delta` [rows, columns] in fp32
  const u32* base_columns;  // offset of every column; NULL: side by side
  const u32* out_columns;
  u64 base_row, out_row;  // distance of rows, under 4 GiB
  const Part* parts;      // stage by stage
  const float* rescale;   // per row; NULL: 1
  float* scratch;         // of rotate_large with several stages: [rows, columns]
  u64 element;            // the region's first one in its weight, row-major: the place in the noise
  u32 pitch;              // columns of the whole weight
  u32 rows, columns;
  u32 count, stages;  // of parts; of stages
  float scale;        // the real weight is scale * stored; 8-bit weights only
  u32 seed;           // of stochastic rounding; 8-bit weights only
  u32 stochastic;
  u32 dtype;  // of base and, without `delta`, out
  float strength;
  u32 interpolate;
  u32 axis;  // 0: rows are turned; 1: columns
  u32 delta;
  u32 vectors;  // of rotate_large: every eight neighbours lie together, aligned to their bytes or to 16
};

// What a block of threads turns: `count` positions from `first`, which every stage maps to themselves, `width` n from `from`, `step` at a time.
struct Tile {
  u32 rotation;
  u32 first, count;
  u32 from, width;
  u32 step;      // rotate_rows: a multiple of 4; rotate_columns, rotate_any: 4, 8, 16 or a multiple of 32; rotate_large: 16, 32 or 64
  u32 resident;  // shared memory has room for the matrices of all stages; otherwise of one
  u32 part;      // of rotate_large
};

constexpr u32 THREADS = 128;
constexpr u32 MAX_PARTS = 16;  // of a rotation by small blocks
constexpr u32 NO_DTYPE = 5;

extern __shared__ float4 shared[];

template <u32 DTYPE>
constexpr int SIZE = DTYPE == F32 ? 4 : DTYPE == F16 || DTYPE == BF16 ? 2 : 1;

// ---- elements

// N codes that lie together, aligned to their bytes or to 16.
template <u32 DTYPE, int N>
struct Few {
  static constexpr int BYTES = N * SIZE<DTYPE>;
  u32 raw[BYTES < 4 ? 1 : BYTES / 4];

  __device__ __forceinline__ void load(const void* from) {
    if constexpr (BYTES == 1) raw[0] = *static_cast<const u8*>(from);
    else if constexpr (BYTES == 2) raw[0] = *static_cast<const u16*>(from);
    else if constexpr (BYTES == 4) raw[0] = *static_cast<const u32*>(from);
    else if constexpr (BYTES == 8) {
      const uint2 two = *static_cast<const uint2*>(from);
      raw[0] = two.x, raw[1] = two.y;
    } else {
#pragma unroll
      for (int i = 0; i < BYTES / 16; i++) {
        const uint4 four = static_cast<const uint4*>(from)[i];
        raw[4 * i] = four.x, raw[4 * i + 1] = four.y, raw[4 * i + 2] = four.z, raw[4 * i + 3] = four.w;
      }
    }
  }

  __device__ __forceinline__ void store(void* to) const {
    if constexpr (BYTES == 1) *static_cast<u8*>(to) = u8(raw[0]);
    else if constexpr (BYTES == 2) *static_cast<u16*>(to) = u16(raw[0]);
    else if constexpr (BYTES == 4) *static_cast<u32*>(to) = raw[0];
    else if constexpr (BYTES == 8) *static_cast<uint2*>(to) = make_uint2(raw[0], raw[1]);
    else {
#pragma unroll
      for (int i = 0; i < BYTES / 16; i++) {
        static_cast<uint4*>(to)[i] = make_uint4(raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]);
      }
    }
  }

  __device__ __forceinline__ u32 code(int i) const {
    if constexpr (SIZE<DTYPE> == 4) return raw[i];
    else if constexpr (SIZE<DTYPE> == 2) return raw[i / 2] >> 16 * (i % 2) & 0xffff;
    else return raw[i / 4] >> 8 * (i % 4) & 0xff;
  }

  __device__ __forceinline__ float value(int i) const {
    if constexpr (DTYPE == BF16) return bits_to_float(i % 2 ? raw[i / 2] & 0xffff0000 : raw[i / 2] << 16);
    else return decode(DTYPE, code(i));
  }

  // The long decoding of 8 bits stands there once.
  template <class Each>
  __device__ __forceinline__ void each(Each&& each) const {
    if constexpr (SIZE<DTYPE> == 1) {
      u32 word = raw[0];
#pragma unroll 1
      for (u32 i = 0; i < N; i++) {
        each(i, decode(DTYPE, word & 0xff));
        word = i == 3 ? raw[N / 8] : word >> 8;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) each(i, value(i));
    }
  }
};

// A pointer that comes through shared memory does not tell what it points to.
template <class T>
__device__ __forceinline__ T* global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// The end of a rotation: how turned values become the result. A copy in registers: a store might change what is in shared memory.
struct Ending {
  const u8* base;
  u8* out;
  u32 base_row, out_row;  // bytes
  const float* rescale;
  float rescale_strength, coefficient, scale;
  u32 delta;
  u32 stochastic, seed, pitch;
  u64 element;

  __device__ __forceinline__ explicit Ending(const Rotation& job) {
    const u32 size = job.dtype == F32 ? 4 : job.dtype < E4M3 ? 2 : 1;
    base = global(static_cast<const u8*>(job.base)), out = global(static_cast<u8*>(job.out));
    base_row = job.base_row * size, out_row = job.delta ? job.columns * 4 : job.out_row * size;
    rescale = global(job.rescale);
    rescale_strength = job.interpolate ? job.strength : 1.0f;
    scale = job.dtype >= E4M3 ? job.scale : 1.0f;
    coefficient = (job.interpolate && job.strength != 0.0f ? 1.0f : job.strength) * scale;
    delta = job.delta;
    stochastic = job.stochastic, seed = job.seed, pitch = job.pitch, element = job.element;
  }

  __device__ __forceinline__ const u8* from(u32 row) const { return base + u64(row) * base_row; }
  __device__ __forceinline__ u8* to(u32 row) const { return out + u64(row) * out_row; }

  __device__ __forceinline__ float factor(u32 row) const {
    if (!rescale) return 1.0f;
    return rescale_strength == 1.0f ? rescale[row] : fmaf(rescale_strength, rescale[row] - 1.0f, 1.0f);
  }

  // Strength 0 changes nothing, whatever W holds.
  __device__ __forceinline__ bool still() const { return coefficient == 0.0f; }

  __device__ __forceinline__ float added(float turned, float old, float factor) const { return coefficient * fmaf(factor, turned, -old); }

  // Where nothing is added every bit stays.
  __device__ __forceinline__ u32 code(u32 dtype, u32 old, float added, u32 row, u32 column) const {
    float sum = decode(dtype, old) * scale + added;
    u32 random = 0;
    if (dtype >= E4M3) {
      if (scale != 1.0f) sum = sum / scale;
      const u64 at = element + u64(row) * pitch + column;
      if (stochastic) random = Noise::bits(Noise::start(at / 2, seed)) >> at % 2 * 16 & 0xffff;
    }
    return added == 0.0f ? old : encode(dtype, sum, stochastic, random);
  }

  template <u32 DTYPE, int N>
  __device__ __forceinline__ Few<DTYPE, N> old(u32 row, u32 column) const {
    Few<DTYPE, N> few;
    few.load(from(row) + column * SIZE<DTYPE>);
    return few;
  }

  // N neighbours of a row; `few` is what they were.
  template <u32 DTYPE, int N>
  __device__ __forceinline__ void write(Few<DTYPE, N> few, const float (&turned)[N], u32 row, u32 column) const {
    const float by = factor(row);
    float sum[N];
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] = still() ? 0.0f : added(turned[i], few.value(i), by);
    if (delta) {
      Few<F32, N> result;
#pragma unroll
      for (int i = 0; i < N; i++) result.raw[i] = __float_as_uint(sum[i]);
      result.store(to(row) + column * 4);
      return;
    }
    if constexpr (SIZE<DTYPE> == 4) {
#pragma unroll
      for (int i = 0; i < N; i++) few.raw[i] = code(DTYPE, few.raw[i], sum[i], row, column + i);
    } else if constexpr (SIZE<DTYPE> == 2) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const float low = few.value(i) + sum[i], high = few.value(i + 1) + sum[i + 1];
        const u32 pair = DTYPE == BF16 ? pack_bf16(low, high) : pack_half(low, high);
        const u32 keep = (sum[i] == 0.0f ? 0xffffu : 0u) | (sum[i + 1] == 0.0f ? 0xffff0000u : 0u);
        few.raw[i / 2] = (few.raw[i / 2] & keep) | (pair & ~keep);
      }
    } else {
      // The next one moves down: the long code for one serves all.
      constexpr int WORD = N < 4 ? N : 4;
#pragma unroll
      for (int w = 0; w < N; w += WORD) {
        u32 word = few.raw[w / 4];
#pragma unroll 1
        for (int i = 0; i < WORD; i++) {
          const u32 next = code(DTYPE, word & 0xff, sum[w], row, column + w + i);
          word = word >> 8 | next << 8 * (WORD - 1);
#pragma unroll
          for (int j = w; j < w + WORD - 1; j++) sum[j] = sum[j + 1];
        }
        few.raw[w / 4] = word;
      }
    }
    few.store(to(row) + column * SIZE<DTYPE>);
  }

  // One element, wherever it is.
  __device__ __forceinline__ void write_one(const Rotation& job, float turned, u32 row, u32 column) const {
    const u32 old = code_of(job.dtype, from(row), job.base_columns ? job.base_columns[column] : column);
    const float sum = still() ? 0.0f : added(turned, decode(job.dtype, old), factor(row));
    if (delta) {
      reinterpret_cast<float*>(to(row))[column] = sum;
      return;
    }
    const u32 at = job.out_columns ? job.out_columns[column] : column;
    const u32 result = code(job.dtype, old, sum, row, column);
    if (job.dtype == F32) reinterpret_cast<u32*>(to(row))[at] = result;
    else if (job.dtype < E4M3) reinterpret_cast<u16*>(to(row))[at] = u16(result);
    else to(row)[at] = u8(result);
  }
};

// An element of a stage's matrix as the stage applies it.
__device__ __forceinline__ float blend(float value, bool diagonal, float strength) {
  if (strength == 1.0f) return value;
  return diagonal ? fmaf(strength, value - 1.0f, 1.0f) : strength * value;
}

// ---- a block of threads' work

// A block in shared memory: its matrix, zeros up to B x B (4, 8 or 16), then the k at its positions, counted from the tile's first; what is missing
// to B reads the first one's, for the zeros. The last four words keep records that a warp reads together in different banks.
__device__ __forceinline__ constexpr u32 record_words(u32 size) { return size * (size + 1) + 4; }
__device__ __forceinline__ u32 padded(u32 size) { return size <= 4 ? 4 : size <= 8 ? 8 : 16; }

// What of a part lies in the tile.
struct Piece {
  const float* blocks;
  const u32* order;  // from the piece's first position
  u32 position;      // in the tile
  u32 count, size;
  u32 word;  // where its records start
};

// A tile and its job, for all threads.
struct Work {
  Rotation job;
  Tile tile;
  Piece pieces[MAX_PARTS];
  u32 stages[MAX_PARTS];

  __device__ __forceinline__ void load(const Rotation* rotations, const Tile* tiles) {
    const Tile* const from = tiles + blockIdx.x;
    const u32* const source = reinterpret_cast<const u32*>(rotations + from->rotation);
    for (u32 i = threadIdx.x; i < sizeof(Rotation) / 4; i += blockDim.x) reinterpret_cast<u32*>(&job)[i] = source[i];
    if (threadIdx.x < sizeof(Tile) / 4) reinterpret_cast<u32*>(&tile)[threadIdx.x] = reinterpret_cast<const u32*>(from)[threadIdx.x];
    __syncthreads();
  }

  __device__ __forceinline__ void load_pieces() {
    if (threadIdx.x < job.count) {
      const Part part = global(job.parts)[threadIdx.x];
      const u32 low = max(part.first, tile.first), high = min(part.first + part.count * part.size, tile.first + tile.count);
      Piece piece = {};
      piece.size = part.size;
      if (low < high) {
        piece.blocks = part.blocks + u64(low - part.first) * part.size, piece.order = part.order ? part.order + low : nullptr;
        piece.position = low - tile.first, piece.count = (high - low) / part.size;
      }
      pieces[threadIdx.x] = piece, stages[threadIdx.x] = part.stage;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      u32 word = 0;
      for (u32 i = 0; i < job.count; i++) {
        if (i > 0 && !tile.resident && stages[i] != stages[i - 1]) word = 0;
        pieces[i].word = word;
        word += pieces[i].count * record_words(padded(pieces[i].size));
      }
    }
    __syncthreads();
  }
};
