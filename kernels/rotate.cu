// Rotations of rows or columns in blocks (OFT, BOFT), every tile of every weight in one launch.
//
//   W' = round(W + s * (rescale o T(W) - W))        T: the stages one after the other
//   W' = round(W + (rescale_s o T_s(W) - W))        `interpolate`: every stage is s * R + (1 - s) * I, the rescaling 1 + s * (rescale - 1)
//
// or, with `delta`, what would be added to W, in fp32. A stage turns x, the rows (axis 0) or columns (axis 1) at its positions, in consecutive groups:
// x[i] becomes the sum of block[i][j] * x[j]. Below, k counts along the turned axis and n along the other one.
//
//   rotate_rows_DTYPE   blocks of at most 16; axis 0; every four neighbours of a row lie together, aligned to their bytes; the first stage reads W itself
//                       and the last one writes the result, so that a single stage needs no tile in shared memory
//   rotate_columns      blocks of at most 16; axis 1; every eight neighbours lie together, aligned to their bytes or to 16; tiles start at multiples of 8
//   rotate_any          blocks of at most 16; anything: strides, odd sizes, odd addresses, one element at a time
//   rotate_large_DTYPE  the first stage with blocks of any size, on tensor cores; with more stages it leaves fp32 in scratch memory
//   rotate_scratch      a later stage of those, one launch each
//
// Small blocks: one block of 128 threads per tile. A thread takes all k of a block and a few neighbouring n into registers, so that what it writes is
// needed by nobody else, in shared memory and in place in W alike. The matrices stand in shared memory and are read by a warp in one piece.
// Bytes: each element of W read and written and, with several stages, read once more from L2 for its old bits; the matrices once per tile.
//
// Large blocks: tiles of whole blocks of one size and up to 64 n; W as bf16, in as many parts as its numbers need, waits in shared memory; a warp takes
// 16 rows of a matrix, which it splits into three bf16 as they come from L2, and all n. So the matrices are read once per tile: size / 16 bytes an
// element of W. An infinite element makes its group NaN.
//
// Products and sums are in fp32, of tensor cores all partial products down to 2^-24 of the largest.
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
  u32 step;      // a multiple of 4; of rotate_large 16, 32 or 64
  u32 resident;  // shared memory has room for the matrices of all stages; otherwise of one
  u32 part;      // of rotate_large
};

constexpr u32 THREADS = 128;
constexpr u32 LARGE_THREADS = 256;
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
    base = static_cast<const u8*>(job.base), out = static_cast<u8*>(job.out);
    base_row = job.base_row * size, out_row = job.delta ? job.columns * 4 : job.out_row * size;
    rescale = job.rescale;
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
      if (stochastic) random = noise(at / 2, seed) >> at % 2 * 16 & 0xffff;
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

// ---- small blocks

// A block in shared memory: its matrix, zeros up to B x B (4, 8 or 16), then the k at its positions, counted from the tile's first; what is missing to
// B reads the first one's, for the zeros. The last four words keep records that a warp reads together in different banks.
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
      const Part part = job.parts[threadIdx.x];
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

__device__ __forceinline__ void prepare(float* records, const Piece& piece, u32 tile_first, float strength) {
  const u32 size = padded(piece.size), shift = __popc(size - 1), words = record_words(size);
  records += piece.word;
  for (u32 i = threadIdx.x; i < piece.count << 2 * shift; i += THREADS) {
    const u32 block = i >> 2 * shift, row = i >> shift & (size - 1), column = i & (size - 1);
    const bool in = row < piece.size && column < piece.size;
    records[block * words + (i & (size * size - 1))] =
        in ? blend(piece.blocks[(block * piece.size + row) * piece.size + column], row == column, strength) : 0.0f;
  }
  for (u32 i = threadIdx.x; i < piece.count << shift; i += THREADS) {
    const u32 block = i >> shift, column = i & (size - 1), at = block * piece.size + (column < piece.size ? column : 0);
    const u32 place = piece.order ? piece.order[at] - tile_first : piece.position + at;
    records[block * words + size * size + column] = bits_to_float(place);
  }
}

// Walks over blocks and chunks of n without dividing in the loop.
struct Items {
  u32 chunks, block, chunk;

  __device__ __forceinline__ explicit Items(u32 chunks) : chunks(chunks) { block = threadIdx.x / chunks, chunk = threadIdx.x % chunks; }
  __device__ __forceinline__ void next() {
    chunk += THREADS;
    if (chunk >= 2 * chunks) block += chunk / chunks, chunk %= chunks;
    else if (chunk >= chunks) block++, chunk -= chunks;
  }
};

// Where (k, n) is in a tile whose k are `step` words apart. SHUFFLED: threads that write neighbouring k meet different banks.
template <bool SHUFFLED>
__device__ __forceinline__ u32 spot(u32 k, u32 n, u32 step) {
  if (!SHUFFLED) return k * step + n;
  return k * step + (n ^ (k / 8 % 8 * 4 & (step < 32 ? step - 1 : 31)));
}

// A row of a block's matrix times x.
template <int B, int C>
__device__ __forceinline__ void row_product(float (&sum)[C], const float* matrix, const float (&x)[B][C]) {
#pragma unroll
  for (int j = 0; j < B; j += 4) {
    const float4 r = *reinterpret_cast<const float4*>(matrix + j);
#pragma unroll
    for (int c = 0; c < C; c++) {
      sum[c] = j == 0 ? r.x * x[j][c] : fmaf(r.x, x[j][c], sum[c]);
      sum[c] = fmaf(r.y, x[j + 1][c], sum[c]), sum[c] = fmaf(r.z, x[j + 2][c], sum[c]), sum[c] = fmaf(r.w, x[j + 3][c], sum[c]);
    }
  }
}

// x from W itself, axis 0; what it was is left in `few`.
template <u32 DTYPE, int B, int C>
__device__ __forceinline__ void load_block(Few<DTYPE, C> (&few)[B], float (&x)[B][C], const Ending& ending, const u32* places, u32 first, u32 n) {
#pragma unroll
  for (int j = 0; j < B; j++) few[j] = ending.old<DTYPE, C>(first + places[j], n);
#pragma unroll
  for (int j = 0; j < B; j++) {
#pragma unroll
    for (int c = 0; c < C; c++) x[j][c] = few[j].value(c);
  }
}

// The only stage, from W to the result, which is written from what was read: for the dtypes that it is worth the code.
template <u32 DTYPE, int B, int C>
__device__ __forceinline__ void turn_only(const Ending& ending, const Piece& piece, const float* records, u32 first, u32 n, u32 width) {
  const u32 count = piece.count, size = piece.size;
  for (Items items(width / C); items.block < count; items.next()) {
    const float* const matrix = records + items.block * record_words(B);
    const u32* const places = reinterpret_cast<const u32*>(matrix + B * B);
    const u32 at = n + items.chunk * C;
    Few<DTYPE, C> few[B];
    float x[B][C];
    load_block<DTYPE, B, C>(few, x, ending, places, first, at);
#pragma unroll
    for (int i = 0; i < B; i++) {
      if (i >= size) break;
      float sum[C];
      row_product<B, C>(sum, matrix + i * B, x);
      ending.write<DTYPE, C>(few[i], sum, first + places[i], at);
    }
  }
}

// One of several stages. With a DTYPE (axis 0) the first one reads W and the last one writes the result.
template <u32 DTYPE, int B, int C>
__device__ __forceinline__ void turn(const Ending& ending, const Piece& piece, const float* records, float* data, u32 step, u32 tile_first, u32 n, u32 width,
                                     bool first, bool last) {
  constexpr bool DIRECT = DTYPE != NO_DTYPE;
  const u32 count = piece.count, size = piece.size;
  for (Items items((width + C - 1) / C); items.block < count; items.next()) {
    const float* const matrix = records + items.block * record_words(B);
    const u32* const places = reinterpret_cast<const u32*>(matrix + B * B);
    const u32 at = items.chunk * C;
    float x[B][C];
    if (DIRECT && first) {
      if constexpr (DIRECT) {
        Few<DTYPE, C> few[B];
        load_block<DTYPE, B, C>(few, x, ending, places, tile_first, n + at);
      }
    } else {
#pragma unroll
      for (int j = 0; j < B; j++) {
        Few<F32, C> few;
        few.load(data + spot<!DIRECT>(places[j], at, step));
#pragma unroll
        for (int c = 0; c < C; c++) x[j][c] = bits_to_float(few.raw[c]);
      }
    }
    if (!DIRECT || !last) {
#pragma unroll
      for (int i = 0; i < B; i++) {
        if (i >= size) break;
        float sum[C];
        row_product<B, C>(sum, matrix + i * B, x);
        Few<F32, C> few;
#pragma unroll
        for (int c = 0; c < C; c++) few.raw[c] = __float_as_uint(sum[c]);
        few.store(data + spot<!DIRECT>(places[i], at, step));
      }
      continue;
    }
    if constexpr (DIRECT) {
#pragma unroll(SIZE<DTYPE> == 1 || B == 16 ? 1 : 2)
      for (u32 i = 0; i < size; i++) {
        const u32 row = tile_first + places[i];
        const Few<DTYPE, C> few = ending.old<DTYPE, C>(row, n + at);
        float sum[C];
        row_product<B, C>(sum, matrix + i * B, x);
        ending.write<DTYPE, C>(few, sum, row, n + at);
      }
    }
  }
}

// All stages on `width` n from `n` of the weight. `again`: the matrices are there already.
template <u32 DTYPE>
__device__ __forceinline__ void turn_all(const Work& work, const Ending& ending, float* data, float* records, u32 n, u32 width, bool again) {
  const Tile tile = work.tile;
  const u32 stages = work.job.stages, parts = work.job.count;
  const float strength = work.job.interpolate ? work.job.strength : 1.0f;
  u32 part = 0;
  for (u32 stage = 0; stage < stages; stage++) {
    u32 end = part;
    for (; end < parts && work.stages[end] == stage; end++) {
      if (!again) prepare(records, work.pieces[end], tile.first, strength);
    }
    __syncthreads();
    for (; part < end; part++) {
      const Piece& piece = work.pieces[part];
      const float* const at = records + piece.word;
      const u32 size = padded(piece.size);
      const bool first = stage == 0, last = stage + 1 == stages;
      if constexpr (DTYPE == F16 || DTYPE == BF16) {
        if (stages == 1) {
          if (size == 4) turn_only<DTYPE, 4, 4>(ending, piece, at, tile.first, n, width);
          else if (size == 8) turn_only<DTYPE, 8, 4>(ending, piece, at, tile.first, n, width);
          else turn_only<DTYPE, 16, 2>(ending, piece, at, tile.first, n, width);
          continue;
        }
      }
      if (size == 4) turn<DTYPE, 4, 4>(ending, piece, at, data, tile.step, tile.first, n, width, first, last);
      else if (size == 8) turn<DTYPE, 8, 4>(ending, piece, at, data, tile.step, tile.first, n, width, first, last);
      else turn<DTYPE, 16, 2>(ending, piece, at, data, tile.step, tile.first, n, width, first, last);
    }
    if (!tile.resident) __syncthreads();
  }
}

template <u32 DTYPE>
__device__ __forceinline__ void rotate_rows(const Rotation* rotations, const Tile* tiles) {
  __shared__ Work work;
  work.load(rotations, tiles);
  work.load_pieces();
  const Tile tile = work.tile;
  const Ending ending(work.job);
  float* const data = reinterpret_cast<float*>(shared);
  float* const records = data + (work.job.stages > 1 ? tile.count * tile.step : 0);
  for (u32 n = 0; n < tile.width; n += tile.step) {
    turn_all<DTYPE>(work, ending, data, records, tile.from + n, min(tile.step, tile.width - n), n > 0 && tile.resident);
  }
}

// Eight k of a row at a time: eight threads take neighbouring ones, the others other rows.
template <u32 DTYPE>
__device__ __forceinline__ void load_columns(const Ending& ending, const Tile& tile, float* data, u32 n, u32 width) {
  constexpr u32 AHEAD = SIZE<DTYPE> == 1 ? 1 : 4, ROWS = THREADS / 8;
  for (u32 k = threadIdx.x % 8 * 8; k < tile.count; k += 64) {
    for (u32 row = threadIdx.x / 8; row < width; row += AHEAD * ROWS) {
      Few<DTYPE, 8> few[AHEAD];
#pragma unroll
      for (u32 a = 0; a < AHEAD; a++) {
        if (row + a * ROWS < width) few[a] = ending.old<DTYPE, 8>(n + row + a * ROWS, tile.first + k);
      }
#pragma unroll
      for (u32 a = 0; a < AHEAD; a++) {
        if (row + a * ROWS >= width) break;
        few[a].each([&](u32 e, float value) { data[spot<true>(k + e, row + a * ROWS, tile.step)] = value; });
      }
    }
  }
}

template <u32 DTYPE>
__device__ __forceinline__ void store_columns(const Ending& ending, const Tile& tile, const float* data, u32 n, u32 width) {
  for (u32 k = threadIdx.x % 8 * 8; k < tile.count; k += 64) {
#pragma unroll(SIZE<DTYPE> == 2 ? 2 : 1)
    for (u32 row = threadIdx.x / 8; row < width; row += THREADS / 8) {
      const Few<DTYPE, 8> few = ending.old<DTYPE, 8>(n + row, tile.first + k);
      float turned[8];
#pragma unroll
      for (int e = 0; e < 8; e++) turned[e] = data[spot<true>(k + e, row, tile.step)];
      ending.write<DTYPE, 8>(few, turned, n + row, tile.first + k);
    }
  }
}

// One element at a time, neighbouring threads along a row.
template <class Each>
__device__ __forceinline__ void for_elements(const Rotation& job, const Tile& tile, u32 n, u32 width, Each&& each) {
  const u32 across = job.axis == 0 ? width : tile.count;
  for (u32 i = threadIdx.x; i < tile.count * width; i += THREADS) {
    const u32 outer = i / across, inner = i % across;
    if (job.axis == 0) each(outer, inner, tile.first + outer, n + inner);
    else each(inner, outer, n + outer, tile.first + inner);
  }
}

template <class Load, class Store>
__device__ __forceinline__ void rotate_through_shared(Work& work, const Rotation* rotations, const Tile* tiles, Load&& load, Store&& store) {
  work.load(rotations, tiles);
  work.load_pieces();
  const Tile tile = work.tile;
  const Ending ending(work.job);
  float* const data = reinterpret_cast<float*>(shared);
  for (u32 n = 0; n < tile.width; n += tile.step) {
    const u32 from = tile.from + n, width = min(tile.step, tile.width - n);
    load(ending, tile, data, from, width);
    turn_all<NO_DTYPE>(work, ending, data, data + tile.count * tile.step, from, width, n > 0 && tile.resident);
    __syncthreads();
    store(ending, tile, data, from, width);
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) rotate_columns(const Rotation* rotations, const Tile* tiles) {
  __shared__ Work work;
  rotate_through_shared(
      work, rotations, tiles,
      [&](const Ending& ending, const Tile& tile, float* data, u32 n, u32 width) {
        switch (work.job.dtype) {
          case F32: return load_columns<F32>(ending, tile, data, n, width);
          case F16: return load_columns<F16>(ending, tile, data, n, width);
          case BF16: return load_columns<BF16>(ending, tile, data, n, width);
          case E4M3: return load_columns<E4M3>(ending, tile, data, n, width);
          default: return load_columns<E5M2>(ending, tile, data, n, width);
        }
      },
      [&](const Ending& ending, const Tile& tile, const float* data, u32 n, u32 width) {
        switch (work.job.dtype) {
          case F32: return store_columns<F32>(ending, tile, data, n, width);
          case F16: return store_columns<F16>(ending, tile, data, n, width);
          case BF16: return store_columns<BF16>(ending, tile, data, n, width);
          case E4M3: return store_columns<E4M3>(ending, tile, data, n, width);
          default: return store_columns<E5M2>(ending, tile, data, n, width);
        }
      });
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) rotate_any(const Rotation* rotations, const Tile* tiles) {
  __shared__ Work work;
  rotate_through_shared(
      work, rotations, tiles,
      [&](const Ending&, const Tile& tile, float* data, u32 n, u32 width) {
        const Rotation& job = work.job;
        for_elements(job, tile, n, width, [&](u32 k, u32 at, u32 row, u32 column) {
          const u32 offset = job.base_columns ? job.base_columns[column] : column;
          data[spot<true>(k, at, tile.step)] = read_as(job.dtype, job.base, row * job.base_row + offset);
        });
      },
      [&](const Ending& ending, const Tile& tile, const float* data, u32 n, u32 width) {
        for_elements(work.job, tile, n, width, [&](u32 k, u32 at, u32 row, u32 column) {
          ending.write_one(work.job, data[spot<true>(k, at, tile.step)], row, column);
        });
      });
}

// ---- large blocks

// Where a number stands in its 16 so that lane t of a product's four has what lies at 4t .. 4t + 3: in the product's numbering 2t, 2t + 1, 2t + 8, 2t + 9.
__device__ __forceinline__ u32 slot(u32 at) { return (at & ~15u) | (at >> 1 & 1) << 3 | (at >> 2 & 3) << 1 | (at & 1); }

// How many bf16 a number is the sum of; NO_DTYPE is scratch memory.
template <u32 DTYPE>
constexpr int PARTS = DTYPE == F32 || DTYPE == NO_DTYPE ? 3 : DTYPE == F16 ? 2 : 1;

// The upper halves of two numbers as a pair of bf16, and what is left of the numbers.
__device__ __forceinline__ u32 take_pair(float& low, float& high) {
  const u32 first = __float_as_uint(low) & 0xffff0000, second = __float_as_uint(high) & 0xffff0000;
  low -= bits_to_float(first), high -= bits_to_float(second);
  return first >> 16 | second;
}

// The tile as it lies in W, rows by columns, in bf16. In every block k are padded with zeros to whole 16; k stand at their slots, columns as well.
struct Planes {
  u16* first;
  u32 stride;  // an odd multiple of 16 bytes: eight rows meet all banks
  u32 size;    // of a plane, one for each part
  u32 block, padded;  // k
  u32 k_count;  // with pads

  __device__ __forceinline__ Planes(const Tile& tile, u32 block, u32 axis) : block(block) {
    padded = (block + 15) / 16 * 16, k_count = tile.count / block * padded;
    first = reinterpret_cast<u16*>(shared);
    stride = (axis == 0 ? tile.step : k_count) + 8;
    size = (axis == 0 ? k_count : tile.step) * stride;
  }

  // Eight neighbours from a column that is a multiple of 8: even pairs go to the first half of their 16, odd ones to the second.
  template <int PARTS>
  __device__ __forceinline__ void put_eight(u32 row, u32 column, float (&values)[8]) const {
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      u32 words[4];
#pragma unroll
      for (int w = 0; w < 4; w++) words[w] = take_pair(values[2 * w], values[2 * w + 1]);
      u16* const to = first + p * size + row * stride + slot(column);
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[2]);
      *reinterpret_cast<uint2*>(to + 8) = make_uint2(words[1], words[3]);
    }
  }

  // Eight bf16 as they are.
  __device__ __forceinline__ void put_eight(u32 row, u32 column, const u32 (&words)[4]) const {
    u16* const to = first + row * stride + slot(column);
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[2]);
    *reinterpret_cast<uint2*>(to + 8) = make_uint2(words[1], words[3]);
  }

  // Four of them from a column that is a multiple of 4.
  __device__ __forceinline__ Few<BF16, 4> four(u32 row, u32 column) const {
    const u16* const from = this->first + row * stride + slot(column);
    Few<BF16, 4> few;
    few.raw[0] = *reinterpret_cast<const u32*>(from), few.raw[1] = *reinterpret_cast<const u32*>(from + 8);
    return few;
  }

  template <int PARTS>
  __device__ __forceinline__ void put(u32 row, u32 column, float value) const {
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      float none = 0.0f;
      first[p * size + row * stride + slot(column)] = u16(take_pair(value, none));
    }
  }
};

// W, or what the stages before have left of it, to shared memory.
template <u32 DTYPE>
__device__ __forceinline__ void load_planes(const Planes& planes, const Rotation& job, const Tile& tile, const u32* order, u32 from, u32 width) {
  const u32 axis = job.axis, across = axis == 0 ? width : planes.k_count, total = planes.k_count * width;
  for (u32 i = threadIdx.x; i < total; i += blockDim.x) {
    const u32 line = i / across, along = i % across, at = axis == 0 ? line : along;
    const u32 block = at / planes.padded, k = at % planes.padded;
    float value = 0.0f;
    if (k < planes.block) {
      const u32 position = tile.first + block * planes.block + k, place = order ? order[position] : position;
      const u32 row = axis == 0 ? place : from + line, column = axis == 0 ? from + along : place;
      if constexpr (DTYPE == NO_DTYPE) value = job.scratch[u64(row) * job.columns + column];
      else value = read_as(DTYPE, job.base, row * job.base_row + (job.base_columns ? job.base_columns[column] : column));
    }
    planes.put<PARTS<DTYPE>>(axis == 0 ? slot(line) : line, along, value);
  }
}

// The same with eight neighbours at a time. On axis 1 blocks are multiples of 8 and there is no order. Axis 0: step / 8 threads stand along a row; axis
// 1: 32.
template <u32 DTYPE>
__device__ __forceinline__ void load_eights(const Planes& planes, const Ending& ending, const Tile& tile, u32 axis, const u32* order, u32 from, u32 width) {
  constexpr u32 AHEAD = 4;
  const u32 shift = axis == 0 ? __popc(tile.step / 8 - 1) : 5, lines = blockDim.x >> shift;
  const u32 across = axis == 0 ? width : planes.k_count, count = axis == 0 ? planes.k_count : width, padded = planes.padded, size = planes.block;
  for (u32 along = (threadIdx.x & (1 << shift) - 1) * 8; along < across; along += 8 << shift) {
    // The block and k of the thread's place: fixed on axis 1.
    u32 block = along / padded, k = along % padded, line = threadIdx.x >> shift;
    if (axis == 0) block = line / padded, k = line % padded;
    while (line < count) {
      Few<DTYPE, 8> few[AHEAD] = {};  // zeros, in every dtype
      u32 ahead = line;
#pragma unroll
      for (u32 a = 0; a < AHEAD; a++, ahead += lines) {
        if (ahead < count && k < size) {
          const u32 position = tile.first + block * size + k;
          few[a] = axis == 1 ? ending.old<DTYPE, 8>(from + ahead, position) : ending.old<DTYPE, 8>(order ? order[position] : position, from + along);
        }
        if (axis == 0) {
          for (k += lines; k >= padded; k -= padded) block++;
        }
      }
#pragma unroll
      for (u32 a = 0; a < AHEAD; a++, line += lines) {
        if (line >= count) break;
        const u32 row = axis == 0 ? slot(line) : line;
        if constexpr (DTYPE == BF16) {
          planes.put_eight(row, along, few[a].raw);
        } else {
          float values[8];
#pragma unroll
          for (int e = 0; e < 8; e++) values[e] = few[a].value(e);
          planes.put_eight<PARTS<DTYPE>>(row, along, values);
        }
      }
    }
  }
}

// [unit of 16 n][half][d]: in a unit's 16 x 16 numbers, as they lie in W, row g + 8 * (d / 2) and column 4t + 2 * half + d % 2.
typedef float Turned[4][2][4];

// 16 x 16 numbers of W as an operand of a product; lanes 8i .. 8i + 7 name the rows of its i-th 8 x 8.
template <u32 AXIS>
__device__ __forceinline__ uint4 load_unit(const u16* from) {
  uint4 w;
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(from));
  if (AXIS == 0) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "r"(at) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "r"(at) : "memory");
  }
  return w;
}

// 16 rows of a block's matrix times all n of the tile. Axis 0: matrix x W, axis 1: W x matrix^T, so that a lane's results are neighbours in a row.
template <int PARTS, u32 AXIS>
__device__ __forceinline__ void product(Turned& sum, const Planes& planes, const float* matrix, u32 block_at, u32 first_row, u32 units, float strength) {
  const u32 lane = threadIdx.x & 31, size = planes.block;
  // Of the second operand lane g holds the columns; they stand at slots.
  const u32 row = first_row + (AXIS == 0 ? lane / 4 : lane / 8 * 4 + lane / 4 % 2), other_row = row + (AXIS == 0 ? 8 : 2);
  const u32 k0 = lane % 4 * 4;
  const bool fours = size % 4 == 0;
  const auto four = [&](u32 row, u32 k) {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row >= size || k >= size) return v;
    const float* const from = matrix + u64(row) * size + k;
    if (fours) v = *reinterpret_cast<const float4*>(from);
    else {
      v.x = from[0];
      if (k + 1 < size) v.y = from[1];
      if (k + 2 < size) v.z = from[2];
      if (k + 3 < size) v.w = from[3];
    }
    return v;
  };
  const u32 k_step = AXIS == 0 ? 16 * planes.stride : 16, unit_step = AXIS == 0 ? 16 : 16 * planes.stride;
  const u16* from = planes.first + (lane & 15) * planes.stride + lane / 16 * 8 + block_at * planes.padded * (AXIS == 0 ? planes.stride : 1);
  float4 upper = four(row, k0), lower = four(other_row, k0);
  for (u32 k = 0; k < size; k += 16) {
    float4 r[2] = {upper, lower};
    if (k + 16 < size) upper = four(row, k + 16 + k0), lower = four(other_row, k + 16 + k0);
    if (strength != 1.0f) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 diagonal = (i ? other_row : row) - (k + k0);
        r[i].x = blend(r[i].x, diagonal == 0, strength), r[i].y = blend(r[i].y, diagonal == 1, strength);
        r[i].z = blend(r[i].z, diagonal == 2, strength), r[i].w = blend(r[i].w, diagonal == 3, strength);
      }
    }
    uint4 parts[3];
#pragma unroll
    for (int p = 0; p < 3; p++) {
      parts[p].x = take_pair(r[0].x, r[0].y), parts[p].y = take_pair(r[1].x, r[1].y);
      parts[p].z = take_pair(r[0].z, r[0].w), parts[p].w = take_pair(r[1].z, r[1].w);
    }
#pragma unroll
    for (u32 u = 0; u < 4; u++) {
      if (u >= units) continue;
      // Tensor cores cut off what they add to a larger number: fp32 results are summed by the others.
      Turned own;
      float(&d)[2][4] = PARTS == 1 ? sum[u] : own[0];
      if (PARTS > 1) {
#pragma unroll
        for (int i = 0; i < 8; i++) d[i / 4][i % 4] = 0.0f;
      }
#pragma unroll
      for (int p = PARTS - 1; p >= 0; p--) {
        const uint4 w = load_unit<AXIS>(from + p * planes.size + u * unit_step);
#pragma unroll
        for (int q = 2 - p; q >= 0; q--) {
          if (AXIS == 0) {
            mma<false>(d[0], parts[q], w.x, w.y);
            mma<false>(d[1], parts[q], w.z, w.w);
          } else {
            mma<false>(d[0], w, parts[q].x, parts[q].z);
            mma<false>(d[1], w, parts[q].y, parts[q].w);
          }
        }
      }
      if (PARTS > 1) {
#pragma unroll
        for (int i = 0; i < 8; i++) sum[u][i / 4][i % 4] += d[i / 4][i % 4];
      }
    }
    from += k_step;
  }
}

// `count` neighbours of a row of W, from a position and an n, one by one.
__device__ __noinline__ void write_scattered(const Rotation& job, const u32* order, float4 turned, u32 count, u32 position, u32 n, bool last) {
  const Ending ending(job);
  for (u32 i = 0; i < count; i++) {
    const u32 at = position + (job.axis == 0 ? 0 : i), place = order ? order[at] : at;
    const u32 row = job.axis == 0 ? place : n, column = job.axis == 0 ? n + i : place;
    if (last) ending.write_one(job, turned.x, row, column);
    else job.scratch[u64(row) * job.columns + column] = turned.x;
    turned.x = turned.y, turned.y = turned.z, turned.z = turned.w;
  }
}

// DTYPE: of W, for the first stage; NO_DTYPE: the stage reads scratch memory.
template <u32 DTYPE>
__device__ __forceinline__ void rotate_large(const Rotation* rotations, const Tile* tiles) {
  __shared__ Work work;
  work.load(rotations, tiles);
  const Rotation& job = work.job;
  const Tile tile = work.tile;
  const Part part = job.parts[tile.part];
  const Ending ending(job);
  const bool last = part.stage + 1 == job.stages;
  const float strength = job.interpolate ? job.strength : 1.0f;
  const u32 size = part.size, axis = job.axis, g = threadIdx.x / 4 % 8, t = threadIdx.x % 4;
  const bool eights = DTYPE != NO_DTYPE && job.vectors && (axis == 0 || (size % 8 == 0 && !part.order));
  const float* const matrices = part.blocks + u64(tile.first - part.first) * size;
  const Planes planes(tile, size, axis);
  const u32 rows = planes.padded / 16, items = tile.count / size * rows;
  for (u32 n = 0; n < tile.width; n += tile.step) {
    const u32 from = tile.from + n, width = min(tile.step, tile.width - n), units = (width + 15) / 16;
    if (n > 0) __syncthreads();
    if constexpr (DTYPE != NO_DTYPE) {
      if (eights) load_eights<DTYPE>(planes, ending, tile, axis, part.order, from, width);
    }
    if (!eights) load_planes<DTYPE>(planes, job, tile, part.order, from, width);
    __syncthreads();
    for (u32 item = threadIdx.x / 32; item < items; item += blockDim.x / 32) {
      const u32 block = item / rows, row = item % rows * 16;
      const float* const matrix = matrices + u64(block) * size * size;
      Turned sum;
#pragma unroll
      for (int i = 0; i < 32; i++) sum[i / 8][i / 4 % 2][i % 4] = 0.0f;
      if (axis == 0) product<PARTS<DTYPE>, 0>(sum, planes, matrix, block, row, units, strength);
      else product<PARTS<DTYPE>, 1>(sum, planes, matrix, block, row, units, strength);
#pragma unroll(SIZE<DTYPE> == 2 ? 4 : 1)
      for (u32 u = 0; u < 4; u++) {
        if (u >= units) break;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
          const float turned[4] = {sum[0][0][half * 2], sum[0][0][half * 2 + 1], sum[0][1][half * 2], sum[0][1][half * 2 + 1]};
          // In W's directions, from the product's first number.
          const u32 down = g + half * 8, right = t * 4;
          const u32 k = row + (axis == 0 ? down : right), at = u * 16 + (axis == 0 ? right : down), position = tile.first + block * size + k;
          if (k >= size || at >= width) continue;
          const u32 count = min(4u, axis == 0 ? width - at : size - k);
          if (!eights || !last) {
            write_scattered(job, part.order, make_float4(turned[0], turned[1], turned[2], turned[3]), count, position, from + at, last);
          } else if constexpr (DTYPE != NO_DTYPE) {
            const u32 place = part.order ? part.order[position] : position;
            const u32 to = axis == 0 ? place : from + at, column = axis == 0 ? from + at : place;
            if constexpr (DTYPE == BF16) {
              const u32 line = block * planes.padded + (axis == 0 ? slot(k) : k);
              ending.write<DTYPE, 4>(axis == 0 ? planes.four(line, at) : planes.four(at, line), turned, to, column);
            } else {
              ending.write<DTYPE, 4>(ending.old<DTYPE, 4>(to, column), turned, to, column);
            }
          }
        }
        // The next one moves up: in a loop the code for one serves all.
#pragma unroll
        for (int i = 0; i < 24; i++) sum[i / 8][i / 4 % 2][i % 4] = sum[i / 8 + 1][i / 4 % 2][i % 4];
      }
    }
  }
}

#define ROTATE(name, dtype)                                                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS, 5) rotate_rows_##name(const Rotation* rotations, const Tile* tiles) {       \
    rotate_rows<dtype>(rotations, tiles);                                                                                           \
  }                                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(LARGE_THREADS, 2) rotate_large_##name(const Rotation* rotations, const Tile* tiles) { \
    rotate_large<dtype>(rotations, tiles);                                                                                          \
  }

ROTATE(f32, F32)
ROTATE(f16, F16)
ROTATE(bf16, BF16)
ROTATE(e4m3, E4M3)
ROTATE(e5m2, E5M2)

extern "C" __global__ void __launch_bounds__(LARGE_THREADS, 2) rotate_scratch(const Rotation* rotations, const Tile* tiles) {
  rotate_large<NO_DTYPE>(rotations, tiles);
}
