// Rotations in blocks of at most 16, every tile of every weight in one launch; rotate.cuh has the formulas.
//
// One block of 128 threads per tile. A thread takes all k of a block and a few neighbouring n into registers, so that what it writes is needed by
// nobody else, in shared memory and in place in W alike. The matrices stand in shared memory and are read by a warp in one piece. Fp32 throughout.
// Bytes: each element of W read and written and, with several stages, read once more from L2 for its old bits; the matrices once per tile.
//
//   rotate_rows_DTYPE  axis 0; every four neighbours of a row lie together, aligned to their bytes; the first stage reads W itself and the last one
//                      writes the result, so that a single stage needs no tile in shared memory
//   rotate_columns     axis 1; every eight neighbours lie together, aligned to their bytes or to 16; tiles start and end at multiples of 8
//   rotate_any         strides, odd sizes, odd addresses; one element at a time
#include "rotate.cuh"

__device__ __forceinline__ void prepare(float* records, const Piece& piece, u32 tile_first, float strength) {
  const u32 size = padded(piece.size), shift = __popc(size - 1), words = record_words(size);
  records += piece.word;
  const float* const blocks = global(piece.blocks);
  const u32* const order = global(piece.order);
  for (u32 i = threadIdx.x; i < piece.count << 2 * shift; i += THREADS) {
    const u32 block = i >> 2 * shift, row = i >> shift & (size - 1), column = i & (size - 1);
    const bool in = row < piece.size && column < piece.size;
    records[block * words + (i & (size * size - 1))] =
        in ? blend(blocks[(block * piece.size + row) * piece.size + column], row == column, strength) : 0.0f;
  }
  for (u32 i = threadIdx.x; i < piece.count << shift; i += THREADS) {
    const u32 block = i >> shift, column = i & (size - 1), at = block * piece.size + (column < piece.size ? column : 0);
    const u32 place = order ? order[at] - tile_first : piece.position + at;
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
__device__ __forceinline__ void turn(const Ending& ending, const Piece& piece, const float* records, float* data, u32 step, u32 tile_first, u32 n,
                                     u32 width, bool first, bool last) {
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

#define ROTATE_ROWS(name, dtype)                                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, 5) rotate_rows_##name(const Rotation* rotations, const Tile* tiles) { \
    rotate_rows<dtype>(rotations, tiles);                                                                                     \
  }

ROTATE_ROWS(f32, F32)
ROTATE_ROWS(f16, F16)
ROTATE_ROWS(bf16, BF16)
ROTATE_ROWS(e4m3, E4M3)
ROTATE_ROWS(e5m2, E5M2)
