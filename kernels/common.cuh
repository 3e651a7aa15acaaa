// What every kernel shares: the tables that the host fills (src/merge/cuda/tables.rs mirrors them field for field), element types, products on
// tensor cores. No header of CUDA is needed, so NVRTC alone compiles this.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum Dtype : u32 { F32 = 0, F16 = 1, BF16 = 2, E4M3 = 3, E5M2 = 4 };
// What a kernel is compiled for may also leave open which of two it is.
constexpr u32 LATE16 = 5, LATE8 = 6;

// How a factor's numbers stand in fragments. SPLIT keeps an fp32 number as a sum of three bf16 ones, which is exact: 3 x 8 bits are its 24.
// UP_SPLIT is of pairs alone: up as SPLIT, down as BF16.
enum Format : u32 { FORMAT_BF16 = 0, FORMAT_F16 = 1, FORMAT_SPLIT = 2, FORMAT_UP_SPLIT = 3 };

enum Kind : u32 { LOW_RANK = 0, HADAMARD = 1, KRON = 2, DENSE = 3, SCALE_ROWS = 4, SCALE_COLUMNS = 5, REPLACE = 6 };

// One weight as a matrix. Strides and offsets count elements.
struct Target {
  const void* base;         // the pristine weight
  void* out;                // where the result goes; may be `base`
  const u32* base_columns;  // offset of every column; NULL: side by side
  const u32* out_columns;
  u64 base_row, out_row;  // distance of rows
  u32 rows, columns;
  u32 first, count;  // its terms
  float scale;       // the real weight is scale * stored
  u32 seed;          // of stochastic rounding; 8-bit weights only
  u32 stochastic;
  u32 dtype;   // of base and out
  u32 axis;    // of squares: 0 sums per row, 1 per column
  u32 products;  // how many of its terms, the first ones, are LOW_RANK or HADAMARD
};

// One primitive at one strength on a region of its weight.
struct Term {
  const void* a;  // LOW_RANK, HADAMARD: up as fragments; KRON: w1; DENSE, REPLACE: the matrix; SCALE: fp32 values
  const void* b;  // down as fragments; w2
  const void* a2;  // the second pair of HADAMARD
  const void* b2;
  const float* gain;  // multiplies the term: one value per row or column of the region; NULL: 1
  float coefficient;  // strength * the file's factor
  u32 kind;
  u32 format, format2;  // of the pairs, or the Dtype of a and b
  u32 ranks, ranks2;    // blocks of 16
  u32 row, rows, column, columns;  // the region
  u32 gain_axis;
  u32 inner_rows, inner_columns, outer_columns;  // KRON: w2 is inner_rows x inner_columns, w1 has outer_columns
  u32 plain;  // no product, no gain, the whole weight; eight neighbours always lie together at 16 bytes: taken eight at once
  float carry;  // the coefficient of the term before it over its own
};

// A block's work: tiles side by side. Tiles have 64 columns, and as many rows as the kernel says.
struct Strip {
  u32 target, row_tile, column_tile, count;
};

// ---- numbers

__device__ __forceinline__ float bits_to_float(u32 bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

__device__ __forceinline__ u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

__device__ __forceinline__ float bf16_to_float(u16 b) { return bits_to_float(u32(b) << 16); }

__device__ __forceinline__ u16 float_to_bf16(float f) {
#if __CUDA_ARCH__ >= 800
  u16 b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
  return b;
#else
  u32 bits = __float_as_uint(f);
  if (f != f) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

// Two numbers in one register, the first in the lower half.
__device__ __forceinline__ u32 pack_bf16(float lower, float upper) {
#if __CUDA_ARCH__ >= 800
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
  return pair;
#else
  return float_to_bf16(lower) | u32(float_to_bf16(upper)) << 16;
#endif
}

__device__ __forceinline__ u32 pack_half(float lower, float upper) {
  return float_to_half(lower) | u32(float_to_half(upper)) << 16;
}

__device__ __forceinline__ u32 is_infinite(float value) { return (__float_as_uint(value) & 0x7fffffff) == 0x7f800000; }

// 8-bit floats: E exponent and M mantissa bits, bias 2^(E-1) - 1. E4M3 is the variant without infinities.
template <int M>
struct Eight {
  static constexpr int DROPPED = 23 - M;                      // fp32 bits below the mantissa
  static constexpr int BIAS = M == 3 ? 7 : 15;
  static constexpr u32 SMALLEST = (127 - BIAS + 1) << 23;     // the smallest normal number, as fp32 bits
  static constexpr u32 LARGEST = M == 3 ? 0x43e00000 : 0x47600000;  // 448; 57344
  static constexpr u32 NOT_A_NUMBER = 0x7f;

  static __device__ __forceinline__ float read(u32 code) {
    // The upper half of an fp16 number.
    if (M == 2) return half_to_float(u16(code << 8));
    u32 sign = (code & 0x80) << 24, rest = code & 0x7f;
    if (rest == 0x7f) return bits_to_float(0x7fffffff);
    // The exponent and mantissa fields placed as fp32's make a number that is 2^(127 - BIAS) too small, subnormal ones included.
    float magnitude = bits_to_float(rest << DROPPED) * bits_to_float((127 + 127 - BIAS) << 23);
    return bits_to_float(__float_as_uint(magnitude) | sign);
  }

  // A magnitude that is multiplied by this has the exponent field of the code as fp32's, subnormal numbers included, and so the code in its upper bits.
  static constexpr u32 FACTOR = u32(BIAS) << 23;  // 2^(BIAS - 127)

  // Rounded to nearest even or, with 16 random bits, up with the probability of the distance; never beyond the largest number, but for an infinity
  // where the format has it: that is no sum of finite weights, and a number of the format is never changed.
  static __device__ __forceinline__ u32 write(float value, bool stochastic, u32 random) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return NOT_A_NUMBER;
    const float size = fminf(fabsf(value), bits_to_float(LARGEST));
    u32 code;
    if (stochastic) {
      code = (__float_as_uint(__fmul_rz(size, bits_to_float(FACTOR))) + (random << (DROPPED - 16))) >> DROPPED;
    } else {
      // Subnormal numbers stand as far apart as the smallest normal ones. In units of the last place; the sum's mantissa is that number, rounded.
      const u32 exponent = max(__float_as_uint(size) & 0x7f800000, SMALLEST);
      const float units = fmaf(size, bits_to_float((u32(127 + 127 + M) << 23) - exponent), 8388608.0f);
      code = (__float_as_uint(units) & 0xff) + (exponent >> DROPPED) - (SMALLEST >> DROPPED);
    }
    // Infinity's code comes after that of the largest number.
    if (M == 2) code += is_infinite(value);
    return code | (bits >> 24 & 0x80);
  }
};

// Two numbers as codes, rounded to nearest even; the first in the lowest byte. Infinity is as the largest number or stays, by the device.
__device__ __forceinline__ u32 pack_eights(u32 dtype, float first, float second) {
#if __CUDA_ARCH__ >= 890
  u32 pair;
  if (dtype == E4M3) asm("{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, %1, %2; cvt.u32.u16 %0, pair; }" : "=r"(pair) : "f"(second), "f"(first));
  else asm("{ .reg .b16 pair; cvt.rn.satfinite.e5m2x2.f32 pair, %1, %2; cvt.u32.u16 %0, pair; }" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  if (dtype == E4M3) return Eight<3>::write(first, false, 0) | Eight<3>::write(second, false, 0) << 8;
  return Eight<2>::write(first, false, 0) | Eight<2>::write(second, false, 0) << 8;
#endif
}

// Two E4M3 codes, the first in the lowest byte; upper bits are any.
__device__ __forceinline__ void read_e4m3_pair(u32 codes, float& first, float& second) {
#if __CUDA_ARCH__ >= 890
  u32 halves;
  asm("{ .reg .b16 pair; cvt.u16.u32 pair, %1; cvt.rn.f16x2.e4m3x2 %0, pair; }" : "=r"(halves) : "r"(codes));
  first = half_to_float(u16(halves));
  second = half_to_float(u16(halves >> 16));
#else
  first = Eight<3>::read(codes & 0xff);
  second = Eight<3>::read(codes >> 8 & 0xff);
#endif
}

// Random bits of elements 2 * pair and 2 * pair + 1 (lower and upper half); src/dtype.rs has the definition. In two steps, since neighbouring pairs
// that differ in their lower 32 bits alone have the first in common but for STRIDE.
struct Noise {
  static constexpr u32 STRIDE = 0x9e3779b1u;
  static __device__ __forceinline__ u32 start(u64 pair, u32 seed) { return u32(pair) * STRIDE + u32(pair >> 32) * 0x85ebca77u + seed; }
  // The lower half is still to be combined with the upper one.
  static __device__ __forceinline__ u32 halves(u32 x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    return x * 0x846ca68bu;
  }
  static __device__ __forceinline__ u32 bits(u32 x) {
    x = halves(x);
    return x ^ x >> 16;
  }
};

// Stored codes and their values, for a dtype known late; folds away for one known early.
__device__ __forceinline__ float decode(u32 dtype, u32 code) {
  switch (dtype) {
    case F32: return bits_to_float(code);
    case F16: return half_to_float(u16(code));
    case BF16: return bits_to_float(code << 16);
    case E4M3: return Eight<3>::read(code);
    default: return Eight<2>::read(code);
  }
}

__device__ __forceinline__ u32 encode(u32 dtype, float value, bool stochastic, u32 random) {
  switch (dtype) {
    case F32: return __float_as_uint(value);
    case F16: return float_to_half(value);
    case BF16: return float_to_bf16(value);
    case E4M3: return Eight<3>::write(value, stochastic, random);
    default: return Eight<2>::write(value, stochastic, random);
  }
}

__device__ __forceinline__ u32 code_of(u32 dtype, const void* from, u64 at) {
  switch (dtype) {
    case F32: return static_cast<const u32*>(from)[at];
    case F16:
    case BF16: return static_cast<const u16*>(from)[at];
    default: return static_cast<const u8*>(from)[at];
  }
}

__device__ __forceinline__ float read_as(u32 dtype, const void* from, u64 at) { return decode(dtype, code_of(dtype, from, at)); }

// ---- products: D[16, 8] += A[16, 16] B[16, 8], one warp, operands as the PTX manual lays out mma.m16n8k16

// Called: inlined everywhere it would be most of the code.
__device__ __noinline__ float4 mma_emulated(float4 sum, uint4 a, u32 b0, u32 b1, bool half) {
  float d[4] = {sum.x, sum.y, sum.z, sum.w};
  // sm_75 has no such product. Lane (g, t) holds rows g and g + 8 of A and column g of B, both at ranks 2t, 2t + 1, 2t + 8, 2t + 9.
  const u32 lane = threadIdx.x & 31;
  auto low = [&](u32 pair) { return half ? half_to_float(u16(pair)) : bits_to_float(pair << 16); };
  auto high = [&](u32 pair) { return half ? half_to_float(u16(pair >> 16)) : bits_to_float(pair & 0xffff0000); };
#pragma unroll 1
  for (u32 t = 0; t < 4; t++) {
    const u32 row = (lane & ~3u) + t, column = (lane & 3) * 8 + t;
    const u32 upper[2] = {__shfl_sync(~0u, a.x, row), __shfl_sync(~0u, a.z, row)};
    const u32 lower[2] = {__shfl_sync(~0u, a.y, row), __shfl_sync(~0u, a.w, row)};
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const u32 b[2] = {__shfl_sync(~0u, b0, column + 4 * e), __shfl_sync(~0u, b1, column + 4 * e)};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        d[e] += low(upper[i]) * low(b[i]) + high(upper[i]) * high(b[i]);
        d[2 + e] += low(lower[i]) * low(b[i]) + high(lower[i]) * high(b[i]);
      }
    }
  }
  return make_float4(d[0], d[1], d[2], d[3]);
}

template <bool HALF>
__device__ __forceinline__ void mma(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800 && !defined(LYCORE_EMULATE_MMA)
  if (HALF) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
#else
  const float4 sum = mma_emulated(make_float4(d[0], d[1], d[2], d[3]), a, b0, b1, HALF);
  d[0] = sum.x, d[1] = sum.y, d[2] = sum.z, d[3] = sum.w;
#endif
}

// The three bf16 numbers whose sum is `x`; what is not finite stays in the first.
__device__ __forceinline__ void split(float x, float (&parts)[3]) {
  parts[0] = bf16_to_float(float_to_bf16(x));
  // Rounding up at the end of the range would make an infinity of a number.
  if (parts[0] - parts[0] != 0.0f && x - x == 0.0f) parts[0] = bits_to_float(__float_as_uint(x) & 0xffff0000);
  const bool finite = parts[0] - parts[0] == 0.0f;
  const float rest = finite ? x - parts[0] : 0.0f;
  parts[1] = bf16_to_float(float_to_bf16(rest));
  parts[2] = bf16_to_float(float_to_bf16(rest - parts[1]));
}
