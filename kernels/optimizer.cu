// One update of all parameters over the flat buffers, in three launches or five. src/train/fused.rs mirrors the structs; the formulas are those of
// src/train/optim/, where each stands in the head of its file.
//
//   squares  partial[block] = sum of g^2 over PART elements, fp32 in a thread, fp64 above; 256 threads; reads 4 bytes an element
//   decide   the norm, whether it is finite, clip, learning rate, and in fp64 what the rule makes of the step; one block of 1024 threads
//   update   the rule, the average of the parameters, the working copy, a gradient of zero; 256 threads of 4 elements each. AdamW with all of
//            these reads 20 and writes 22 bytes an element. In 8 bits: a warp for each 256 elements that share a scale.
//
// Rules that find the size of their steps, d, from sums over all elements take two more, between decide and update:
//
//   gather   the state, and partial sums of <g, .> and |s|_1 over PART elements, in fp64; 256 threads. Prodigy reads 24 and writes 12 bytes an
//            element
//   measure  d, and what update needs of it, from the sums; one block of 1024 threads
//
// Those of factored means (Adafactor, CAME) have libtorch's operations there.
//
// All that changes from step to step lies on the device, so a captured graph of them goes on by itself. Sums have a fixed order: the same
// gradients give the same bits.
#include "common.cuh"

constexpr u32 PART = 16384, RATES = 4096, SCALED = 256;

struct Clock {
  double steps;    // updates done
  double skipped;  // left out because the gradient was not finite
  double starved;  // left out for want of a learning rate
  double held;     // not 0: nothing shall change
  double norm;     // of the last averaged gradient
  double rate;     // of the last step
  double updated;  // whether the last step changed anything
  double scale;    // what its gradient is multiplied by
  double first;    // rates[0] is that of the step after so many
  double rates[RATES];
};

// Neighbours with one learning rate, from and to multiples of 4. `kept` and later fields are of the optimizer in 8 bits: where the means lie, in
// 32 bits if `small`, and how many blocks come before.
struct Range {
  u64 start, end, kept;
  u32 small, first_block;
};

struct Job {
  float *master, *gradient;
  float* ema;  // may be NULL
  void* working;                   // may be NULL
  void* state[10];
  double* carried[4];
  Clock* clock;
  double* partial;  // `parts` numbers; for rules that find d three times as many
  struct Moment* moment;
  const Range* ranges;
  const double* factors;  // one per range
  float* scalars;         // 16 per range
  double numbers[12];
  double average, max_norm, ema_share;
  u64 count;  // a multiple of 4
  u32 parts, range_count, blocks;
  u32 working_dtype;
  u32 forgiving;  // a gradient that is not finite is cleared and counted, otherwise left as it is
};

// What a step has in common for all ranges.
struct Moment {
  double t, rate, a, b, c;
};

// torch's, which gives `to` itself for a weight of 1.
__device__ __forceinline__ float lerp(float from, float to, float weight) {
  return weight < 0.5f ? fmaf(weight, to - from, from) : fmaf(weight - 1.0f, to - from, to);
}

// ---- rules: `common` is computed once, `scalars` once per range, `apply` once per element

struct AdamW {
  static constexpr int BUFFERS = 2;
  struct Numbers {
    double b1, b2, eps, decay;
  };
  struct Scalars {
    float decay, keep_mean, mean, keep_square, square, rate, root, eps;
  };
  static __device__ void common(const Numbers& n, Moment& m, double* const*) {
    m.a = 1.0 - pow(n.b1, m.t);
    m.b = sqrt(1.0 - pow(n.b2, m.t));
  }
  static __device__ Scalars scalars(const Numbers& n, const Moment& m, double factor) {
    const double rate = m.rate * factor;
    return {float(1.0 - rate * n.decay), float(n.b1), float(1.0 - n.b1), float(n.b2), float(1.0 - n.b2), float(-(rate / m.a)), float(m.b), float(n.eps)};
  }
  static __device__ __forceinline__ void move(const Scalars& s, float g, float& p, float mean, float& square) {
    square = fmaf(s.square * g, g, square * s.keep_square);
    p = fmaf(p, s.decay, s.rate * mean / (sqrtf(square) / s.root + s.eps));
  }
  static __device__ __forceinline__ void apply(const Scalars& s, float g, float& p, float (&state)[BUFFERS]) {
    state[0] = lerp(state[0], g, s.mean);
    move(s, g, p, state[0], state[1]);
  }
};

struct Sgd {
  static constexpr int BUFFERS = 1;
  struct Numbers {
    double momentum, decay;
  };
  struct Scalars {
    float momentum, decay, rate;
  };
  static __device__ void common(const Numbers&, Moment&, double* const*) {}
  static __device__ Scalars scalars(const Numbers& n, const Moment& m, double factor) {
    return {float(n.momentum), float(n.decay), float(-(m.rate * factor))};
  }
  static __device__ __forceinline__ void apply(const Scalars& s, float g, float& p, float (&state)[BUFFERS]) {
    g = fmaf(p, s.decay, g);
    state[0] = fmaf(state[0], s.momentum, g);
    p = fmaf(fmaf(state[0], s.momentum, g), s.rate, p);
  }
};

struct Lion {
  static constexpr int BUFFERS = 1;
  struct Numbers {
    double b1, b2, decay;
  };
  struct Scalars {
    float decay, rate, keep_sign, sign, keep_mean, mean;
  };
  static __device__ void common(const Numbers&, Moment&, double* const*) {}
  static __device__ Scalars scalars(const Numbers& n, const Moment& m, double factor) {
    const double rate = m.rate * factor;
    return {float(1.0 - rate * n.decay), float(rate), float(n.b1), float(1.0 - n.b1), float(n.b2), float(1.0 - n.b2)};
  }
  static __device__ __forceinline__ void apply(const Scalars& s, float g, float& p, float (&state)[BUFFERS]) {
    // Rounded one by one, as the sign must be that of the other path.
    const float blend = __fadd_rn(__fmul_rn(state[0], s.keep_sign), __fmul_rn(g, s.sign));
    p = p * s.decay - (blend > 0.0f ? s.rate : blend < 0.0f ? -s.rate : 0.0f);
    state[0] = __fadd_rn(__fmul_rn(state[0], s.keep_mean), __fmul_rn(g, s.mean));
  }
};

// z, and the mean of squares. Carried: the sum of the average's weights, the largest rate so far.
struct ScheduleFree {
  static constexpr int BUFFERS = 2;
  struct Numbers {
    double beta, r, power, b2, eps, decay, other;
  };
  struct Scalars {
    float start, keep_square, square, correction, eps, decay, weight, pull, rate, adaptive;
  };
  // With the rate of the step, and whether its direction is divided by the root; a and b become the weight of z and the correction of the squares.
  static __device__ void weigh(const Numbers& n, Moment& m, double rate, bool adaptive, double* const* carried) {
    const double largest = fmax(*carried[1], rate);
    const double weight = pow(m.t, n.r) * pow(largest, n.power), sum = *carried[0] + weight;
    *carried[0] = sum;
    *carried[1] = largest;
    m.rate = rate;
    m.a = sum == 0.0 ? 0.0 : weight / sum;
    m.b = 1.0 - pow(n.b2, m.t);
    m.c = adaptive;
  }
  static __device__ Scalars scalars(const Numbers& n, const Moment& m, double factor) {
    const double rate = m.rate * factor;
    return {float(m.t == 1.0), float(n.b2), float(1.0 - n.b2), float(m.b), float(n.eps), float(n.decay), float(m.a),
            float(rate * (n.beta * (1.0 - m.a) - 1.0)), float(-rate), float(m.c)};
  }
  static __device__ __forceinline__ void apply(const Scalars& s, float g, float& y, float (&state)[BUFFERS]) {
    float z = s.start != 0.0f ? y : state[0];
    state[1] = fmaf(s.square * g, g, state[1] * s.keep_square);
    if (s.adaptive != 0.0f) g = g / (sqrtf(state[1] / s.correction) + s.eps);
    g = fmaf(y, s.decay, g);
    y = fmaf(g, s.pull, lerp(y, z, s.weight));
    state[0] = fmaf(g, s.rate, z);
  }
};

struct AdamWScheduleFree : ScheduleFree {
  static __device__ void common(const Numbers& n, Moment& m, double* const* carried) {
    const double warmup_steps = n.other;
    weigh(n, m, m.t <= warmup_steps ? m.rate * (m.t / warmup_steps) : m.rate, true, carried);
  }
};

struct RAdamScheduleFree : ScheduleFree {
  static __device__ void common(const Numbers& n, Moment& m, double* const* carried) {
    const bool silent = n.other != 0.0;
    const double power = pow(n.b2, m.t), longest = 2.0 / (1.0 - n.b2) - 1.0, length = longest - 2.0 * m.t * power / (1.0 - power);
    const bool rectified = length > 4.0;
    double rise = !silent;
    if (rectified) rise = sqrt((length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length));
    weigh(n, m, m.rate * rise, rectified, carried);
  }
};

// ---- rules that find d: `scalars` and `gather` before it is known, `measure`, and `later` and `apply` behind that. Moment's a is c, the rate of the
// whole step, b the d before it, c how much counts: 0 where nothing shall happen.

// As torch's sign.
__device__ __forceinline__ float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

// Adam's sqrt(1 - b2^t) / (1 - b1^t).
__device__ __forceinline__ double bias_correction(double b1, double b2, double t) { return sqrt(1.0 - pow(b2, t)) / (1.0 - pow(b1, t)); }

// What a thread's elements add to the two sums.
struct Found {
  double inner, length;
};

// Carried: d, r, the largest d, updates that changed anything. State: m, v, s, p0.
struct Prodigy {
  struct Numbers {
    double b1, b2, b3, eps, decay, coupled, bias, safeguard, d0, coefficient, growth;
    double every;
  };
  struct Scalars {
    float start, counts, coupled, keep_mean, mean, keep_square, square, keep_sum, sum, factor;
  };
  struct Later {
    float decay, rate, eps;
  };
  static __device__ void common(const Numbers& n, Moment& m, double* const* carried) {
    m.b = *carried[0];
    m.a = m.b * m.rate * (n.bias != 0.0 ? bias_correction(n.b1, n.b2, *carried[3] + 1.0) : 1.0);
    m.c = m.rate != 0.0;
  }
  static __device__ Scalars scalars(const Numbers& n, const Moment& m, double factor) {
    const double d = m.b;
    return {float(m.t == 1.0), float(m.c), float(n.coupled), float(n.b1), float(d * (1.0 - n.b1)), float(n.b2), float(d * d * (1.0 - n.b2)),
            float(n.b3), float(d / n.d0 * (n.safeguard != 0.0 ? d : m.a)), float(factor)};
  }
  // The sampled elements of s and p0 lie side by side.
  static __device__ __forceinline__ bool sampled(const Job& job, u64& at) {
    const u64 every = u64(reinterpret_cast<const Numbers*>(job.numbers)->every);
    if (every == 1) return true;
    const bool taken = at % every == 0;
    at /= every;
    return taken;
  }
  static __device__ __forceinline__ void gather(const Job& job, const Scalars& n, u64 at, float g, float& p, Found& found) {
    float *mean = static_cast<float*>(job.state[0]) + at, *square = static_cast<float*>(job.state[1]) + at;
    u64 index = at;
    const bool taken = sampled(job, index);
    float *sum = static_cast<float*>(job.state[2]) + index, *from = static_cast<float*>(job.state[3]) + index;
    if (taken && n.start != 0.0f) *from = p;
    if (n.counts == 0.0f) return;
    g = fmaf(p, n.coupled, g);
    *mean = fmaf(g, n.mean, *mean * n.keep_mean);
    *square = fmaf(g * n.square, g, *square * n.keep_square);
    if (!taken) return;
    const float s = fmaf(g, n.sum, *sum * n.keep_sum);
    *sum = s;
    found.inner += double((*from - p) * g);
    found.length += double(fabsf(s)) * n.factor;
  }
  static __device__ void measure(const Numbers& n, Moment& m, double* const* carried, const Found& found) {
    const double d = m.b, r = *carried[1] * n.b3 + d / n.d0 * m.a * found.inner, estimate = r * n.coefficient / found.length;
    m.c = found.length > 0.0;
    if (m.c == 0.0) return;
    const double raised = d == n.d0 ? fmax(d, estimate) : d, largest = fmax(*carried[2], estimate);
    *carried[0] = n.growth > 0.0 ? fmin(largest, raised * n.growth) : largest;
    *carried[1] = r;
    *carried[2] = largest;
    *carried[3] += 1.0;
  }
  static __device__ Later later(const Numbers& n, const Moment& m, double* const* carried, double factor) {
    const double rate = -m.a * m.c * factor;
    return {float(rate * n.decay), float(rate), float(*carried[0] * n.eps)};
  }
  static __device__ __forceinline__ void apply(const Job& job, const Later& n, u64 at, float& p) {
    const float mean = static_cast<const float*>(job.state[0])[at], square = static_cast<const float*>(job.state[1])[at];
    p = fmaf(p, n.decay, p);
    p += mean * n.rate / (sqrtf(square) + n.eps);
  }
};

// Carried: d, r, updates that changed anything. State: m, v, s.
struct DAdaptAdam {
  struct Numbers {
    double b1, b2, eps, decay, coupled, bias, growth;
  };
  struct Scalars {
    float counts, coupled, eps, keep_mean, mean, keep_square, square, keep_sum, sum, factor;
  };
  struct Later {
    float decay, counts, eps;
  };
  static __device__ void common(const Numbers& n, Moment& m, double* const* carried) {
    m.b = *carried[0];
    m.a = m.b * m.rate * (n.bias != 0.0 ? bias_correction(n.b1, n.b2, *carried[2] + 1.0) : 1.0);
    m.c = m.rate != 0.0;
  }
  static __device__ Scalars scalars(const Numbers& n, const Moment& m, double factor) {
    const double q = sqrt(n.b2);
    return {float(m.c), float(n.coupled), float(n.eps), float(n.b1), float(m.a * factor * (1.0 - n.b1)), float(n.b2), float(1.0 - n.b2),
            float(q), float(m.a * (1.0 - q)), float(factor)};
  }
  static __device__ __forceinline__ void gather(const Job& job, const Scalars& n, u64 at, float g, float& p, Found& found) {
    float *mean = static_cast<float*>(job.state[0]) + at, *square = static_cast<float*>(job.state[1]) + at;
    float* sum = static_cast<float*>(job.state[2]) + at;
    if (n.counts == 0.0f) return;
    g = fmaf(p, n.coupled, g);
    found.inner += double(*sum / (sqrtf(*square) + n.eps) * g) * n.factor;
    *mean = fmaf(g, n.mean, *mean * n.keep_mean);
    *square = fmaf(g * n.square, g, *square * n.keep_square);
    const float s = fmaf(g, n.sum, *sum * n.keep_sum);
    *sum = s;
    found.length += double(fabsf(s)) * n.factor;
  }
  static __device__ void measure(const Numbers& n, Moment& m, double* const* carried, const Found& found) {
    const double q = sqrt(n.b2), d = m.b, r = *carried[1] * q + found.inner * m.a * (1.0 - q);
    double bound = r / (found.length * (1.0 - q));
    if (n.growth > 0.0) bound = fmin(bound, d * n.growth);
    m.b = m.c;
    m.c = found.length > 0.0;
    if (m.c == 0.0) return;
    *carried[0] = fmax(d, bound);
    *carried[1] = r;
    *carried[2] += 1.0;
  }
  static __device__ Later later(const Numbers& n, const Moment& m, double* const*, double factor) {
    return {float(-m.a * m.c * n.decay * factor), float(m.b), float(n.eps)};
  }
  static __device__ __forceinline__ void apply(const Job& job, const Later& n, u64 at, float& p) {
    const float mean = static_cast<const float*>(job.state[0])[at], square = static_cast<const float*>(job.state[1])[at];
    p = fmaf(p, n.decay, p);
    p -= n.counts * (mean / (sqrtf(square) + n.eps));
  }
};

// Carried: d, r. State: m, s. Parameters move before d is found.
struct DAdaptLion {
  struct Numbers {
    double b1, b2, decay;
  };
  struct Scalars {
    float decay, rate, keep_sign, sign, keep_mean, mean, keep_sum, sum;
  };
  struct Later {};
  static __device__ void common(const Numbers&, Moment& m, double* const* carried) {
    m.b = *carried[0];
    m.a = m.b * m.rate;
    m.c = m.rate > 0.0;
  }
  static __device__ Scalars scalars(const Numbers& n, const Moment& m, double factor) {
    const double q = sqrt(n.b2), rate = m.a * factor;
    return {float(1.0 - rate * n.decay), float(rate), float(n.b1), float(1.0 - n.b1), float(n.b2), float(m.a * (1.0 - n.b2)), float(q),
            float(m.a * (1.0 - q))};
  }
  static __device__ __forceinline__ void gather(const Job& job, const Scalars& n, u64 at, float g, float& p, Found& found) {
    float *mean = static_cast<float*>(job.state[0]) + at, *sum = static_cast<float*>(job.state[1]) + at;
    // Rounded one by one, as the sign must be that of the other path.
    const float update = sign(__fadd_rn(__fmul_rn(*mean, n.keep_sign), __fmul_rn(g, n.sign)));
    p = p * n.decay - update * n.rate;
    static_cast<float*>(job.master)[at] = p;
    *mean = __fadd_rn(__fmul_rn(*mean, n.keep_mean), __fmul_rn(g, n.mean));
    found.inner += double(update * *sum);
    const float s = fmaf(update, n.sum, *sum * n.keep_sum);
    *sum = s;
    found.length += double(fabsf(s));
  }
  static __device__ void measure(const Numbers& n, Moment& m, double* const* carried, const Found& found) {
    const double q = sqrt(n.b2), r = *carried[1] * q + found.inner * m.a * (1.0 - q);
    *carried[1] = r;
    if (m.c != 0.0 && found.length > 0.0) *carried[0] = fmax(m.b, r / (found.length * (1.0 - q)));
  }
  static __device__ Later later(const Numbers&, const Moment&, double* const*, double) { return {}; }
  static __device__ __forceinline__ void apply(const Job&, const Later&, u64, float&) {}
};

// Nothing: libtorch's operations move the parameters between decide and update.
struct Given {
  struct Numbers {};
  struct Scalars {};
  struct Later {};
  static __device__ void common(const Numbers&, Moment&, double* const*) {}
  static __device__ Scalars scalars(const Numbers&, const Moment&, double) { return {}; }
  static __device__ __forceinline__ void apply(const Job&, const Later&, u64, float&) {}
};

// ---- the launches

// The sum over a block, in its first thread.
template <int THREADS>
__device__ __forceinline__ double total(double sum) {
  __shared__ double sums[THREADS / 32];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < THREADS / 32; warp++) sum += sums[warp];
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(256) squares(const Job job) {
  const u64 first = u64(blockIdx.x) * PART + threadIdx.x * 4;
  float sum = 0.0f;
#pragma unroll 8
  for (u32 i = 0; i < PART; i += 1024) {
    if (first + i < job.count) {
      const float4 g = *reinterpret_cast<const float4*>(job.gradient + first + i);
      sum = fmaf(g.x, g.x, fmaf(g.y, g.y, fmaf(g.z, g.z, fmaf(g.w, g.w, sum))));
    }
  }
  const double all = total<256>(sum);
  if (threadIdx.x == 0) job.partial[blockIdx.x] = all;
}

template <class Rule>
__device__ void decide(const Job& job) {
  __shared__ Moment moment;
  __shared__ bool updates;
  const auto& numbers = *reinterpret_cast<const typename Rule::Numbers*>(job.numbers);
  double sum = 0.0;
  for (u32 i = threadIdx.x; i < job.parts; i += 1024) sum += job.partial[i];
  sum = total<1024>(sum);
  if (threadIdx.x == 0) {
    Clock& clock = *job.clock;
    const double norm = sqrt(sum) * job.average, at = clock.steps - clock.first;
    const bool finite = norm - norm == 0.0, known = at >= 0.0 && at < RATES;
    if (known) clock.rate = clock.rates[u32(at)];
    if (clock.held == 0.0) {
      clock.skipped += job.forgiving && !finite;
      clock.starved += finite && !known;
    }
    updates = finite && known && clock.held == 0.0;
    clock.norm = norm;
    clock.updated = updates;
    // torch.nn.utils.clip_grad_norm_ has the same 1e-6.
    clock.scale = job.average * (job.max_norm > 0.0 ? fmin(job.max_norm / (norm + 1e-6), 1.0) : 1.0);
    if (updates) {
      clock.steps += 1.0;
      moment.t = clock.steps;
      moment.rate = clock.rate;
      Rule::common(numbers, moment, job.carried);
    }
  }
  __syncthreads();
  if (!updates) return;
  if (job.moment && threadIdx.x == 0) *job.moment = moment;
  for (u32 i = threadIdx.x; i < job.range_count; i += 1024) {
    *reinterpret_cast<typename Rule::Scalars*>(job.scalars + i * 16) = Rule::scalars(numbers, moment, job.factors[i]);
  }
}

struct Four {
  float v[4];
};

__device__ __forceinline__ Four load(const void* buffer, u64 at) {
  const float4 x = *reinterpret_cast<const float4*>(static_cast<const float*>(buffer) + at);
  return {x.x, x.y, x.z, x.w};
}

__device__ __forceinline__ void store(void* buffer, u64 at, const Four& x) {
  *reinterpret_cast<float4*>(static_cast<float*>(buffer) + at) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
}

// The range of an element.
__device__ __forceinline__ u32 range_of(const Job& job, u64 at) {
  u32 range = 0, last = job.range_count - 1;
  while (range < last) {
    const u32 middle = (range + last) / 2;
    if (at < job.ranges[middle].end) last = middle;
    else range = middle + 1;
  }
  return range;
}

// The gradient is cleared without an update when one is left out for good.
__device__ __forceinline__ bool clears(const Job& job) { return job.forgiving || job.clock->held != 0.0; }

// New parameters, and what follows them.
__device__ __forceinline__ void finish(const Job& job, u64 at, const Four& p, const Four& ema) {
  store(job.master, at, p);
  if (job.ema) store(job.ema, at, ema);
  if (!job.working) return;
  const bool half = job.working_dtype == F16;
  uint2& to = *reinterpret_cast<uint2*>(static_cast<u16*>(job.working) + at);
  to = half ? make_uint2(pack_half(p.v[0], p.v[1]), pack_half(p.v[2], p.v[3])) : make_uint2(pack_bf16(p.v[0], p.v[1]), pack_bf16(p.v[2], p.v[3]));
}

template <class Rule>
__device__ __forceinline__ void update(const Job& job) {
  const u64 at = (u64(blockIdx.x) * 256 + threadIdx.x) * 4;
  if (at >= job.count) return;
  if (job.clock->updated == 0.0) {
    if (clears(job)) store(job.gradient, at, {});
    return;
  }
  Four g = load(job.gradient, at), p = load(job.master, at), state[Rule::BUFFERS], ema = p;
#pragma unroll
  for (int i = 0; i < Rule::BUFFERS; i++) state[i] = load(job.state[i], at);
  if (job.ema) ema = load(job.ema, at);
  const auto scalars = *reinterpret_cast<const typename Rule::Scalars*>(job.scalars + range_of(job, at) * 16);
  const float scale = float(job.clock->scale), share = float(job.ema_share);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    float kept[Rule::BUFFERS];
#pragma unroll
    for (int i = 0; i < Rule::BUFFERS; i++) kept[i] = state[i].v[e];
    Rule::apply(scalars, g.v[e] * scale, p.v[e], kept);
#pragma unroll
    for (int i = 0; i < Rule::BUFFERS; i++) state[i].v[e] = kept[i];
    ema.v[e] = lerp(ema.v[e], p.v[e], share);
  }
#pragma unroll
  for (int i = 0; i < Rule::BUFFERS; i++) store(job.state[i], at, state[i]);
  store(job.gradient, at, {});
  finish(job, at, p, ema);
}

#define RULE(name, Rule)                                                                                     \
  extern "C" __global__ void __launch_bounds__(1024) decide_##name(const Job job) { decide<Rule>(job); }     \
  extern "C" __global__ void __launch_bounds__(256) update_##name(const Job job) { update<Rule>(job); }

RULE(adamw, AdamW)
RULE(sgd, Sgd)
RULE(lion, Lion)
RULE(adamw_schedule_free, AdamWScheduleFree)
RULE(radam_schedule_free, RAdamScheduleFree)

// ---- rules that find d

template <class Rule>
__device__ __forceinline__ void gather(const Job& job) {
  if (job.clock->updated == 0.0) return;
  const float scale = float(job.clock->scale);
  Found found = {};
  for (u32 i = 0; i < PART; i += 256) {
    const u64 at = u64(blockIdx.x) * PART + i + threadIdx.x;
    if (at >= job.count) break;
    const auto scalars = *reinterpret_cast<const typename Rule::Scalars*>(job.scalars + range_of(job, at) * 16);
    float p = job.master[at];
    Rule::gather(job, scalars, at, job.gradient[at] * scale, p, found);
  }
  const double inner = total<256>(found.inner);
  __syncthreads();
  const double length = total<256>(found.length);
  if (threadIdx.x == 0) {
    job.partial[job.parts + blockIdx.x] = inner;
    job.partial[2 * job.parts + blockIdx.x] = length;
  }
}

template <class Rule>
__device__ __forceinline__ void measure(const Job& job) {
  __shared__ Moment moment;
  if (job.clock->updated == 0.0) return;
  const auto& numbers = *reinterpret_cast<const typename Rule::Numbers*>(job.numbers);
  Found found = {};
  for (u32 i = threadIdx.x; i < job.parts; i += 1024) {
    found.inner += job.partial[job.parts + i];
    found.length += job.partial[2 * job.parts + i];
  }
  found.inner = total<1024>(found.inner);
  __syncthreads();
  found.length = total<1024>(found.length);
  if (threadIdx.x == 0) {
    moment = *job.moment;
    Rule::measure(numbers, moment, job.carried, found);
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < job.range_count; i += 1024) {
    *reinterpret_cast<typename Rule::Later*>(job.scalars + i * 16) = Rule::later(numbers, moment, job.carried, job.factors[i]);
  }
}

template <class Rule>
__device__ __forceinline__ void follow(const Job& job) {
  const u64 at = (u64(blockIdx.x) * 256 + threadIdx.x) * 4;
  if (at >= job.count) return;
  if (job.clock->updated == 0.0) {
    if (clears(job)) store(job.gradient, at, {});
    return;
  }
  Four p = load(job.master, at), ema = job.ema ? load(job.ema, at) : p;
  const auto later = *reinterpret_cast<const typename Rule::Later*>(job.scalars + range_of(job, at) * 16);
#pragma unroll
  for (int e = 0; e < 4; e++) {
    Rule::apply(job, later, at + e, p.v[e]);
    ema.v[e] = lerp(ema.v[e], p.v[e], float(job.ema_share));
  }
  store(job.gradient, at, {});
  finish(job, at, p, ema);
}

#define MEASURED(name, Rule)                                                                                 \
  extern "C" __global__ void __launch_bounds__(1024) decide_##name(const Job job) { decide<Rule>(job); }     \
  extern "C" __global__ void __launch_bounds__(256) gather_##name(const Job job) { gather<Rule>(job); }      \
  extern "C" __global__ void __launch_bounds__(1024) measure_##name(const Job job) { measure<Rule>(job); }   \
  extern "C" __global__ void __launch_bounds__(256) update_##name(const Job job) { follow<Rule>(job); }

extern "C" __global__ void __launch_bounds__(1024) decide_given(const Job job) { decide<Given>(job); }
extern "C" __global__ void __launch_bounds__(256) update_given(const Job job) { follow<Given>(job); }

MEASURED(prodigy, Prodigy)
MEASURED(dadapt_adam, DAdaptAdam)
MEASURED(dadapt_lion, DAdaptLion)

// ---- AdamW with means in 8 bits

extern "C" __global__ void __launch_bounds__(1024) decide_adamw8bit(const Job job) { decide<AdamW>(job); }

// The means of one kind, as a Job's state has them: in 32 bits, codes, scales, and the tables of 256 values and 255 middles.
struct Means {
  float* wide;
  u8* codes;
  float *scales, *values, *middles;
};

// A warp per block of values that share a scale, eight neighbours a lane.
extern "C" __global__ void __launch_bounds__(256) update_adamw8bit(const Job job) {
  constexpr u32 EACH = SCALED / 32;
  // The middles as a tree to search: the root at 1, what is below and above node i at 2 i and 2 i + 1, so that a level lies in different banks.
  __shared__ float values[2][256], tree[2][256];
  const Means means[2] = {*reinterpret_cast<const Means*>(job.state), *reinterpret_cast<const Means*>(job.state + 5)};
  const u32 level = 31 - __clz(threadIdx.x | 1), place = threadIdx.x - (1u << level);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    values[i][threadIdx.x] = means[i].values[threadIdx.x];
    if (threadIdx.x > 0) tree[i][threadIdx.x] = means[i].middles[((2 * place + 1) << (7 - level)) - 1];
  }
  __syncthreads();
  const bool updates = job.clock->updated != 0.0;
  if (!updates && !clears(job)) return;
  const float gradient_scale = float(job.clock->scale), share = float(job.ema_share);
  const u32 lane = threadIdx.x % 32;
  for (u32 block = blockIdx.x * 8 + threadIdx.x / 32; block < job.blocks; block += gridDim.x * 8) {
    u32 index = 0, last = job.range_count - 1;
    while (index < last) {
      const u32 middle = (index + last + 1) / 2;
      if (block < job.ranges[middle].first_block) last = middle - 1;
      else index = middle;
    }
    const Range range = job.ranges[index];
    // Reaches into padding, whose zeros stay.
    const u64 offset = u64(block - range.first_block) * SCALED + lane * EACH, at = range.start + offset, kept = range.kept + offset;
    Four g[2], p[2], ema[2];
    float m[2][EACH];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      g[half] = load(job.gradient, at + half * 4);
      p[half] = load(job.master, at + half * 4);
      ema[half] = job.ema ? load(job.ema, at + half * 4) : p[half];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (range.small) {
#pragma unroll
        for (u32 k = 0; k < EACH; k++) m[i][k] = at + k < range.end ? means[i].wide[kept + k] : 0.0f;
      } else {
        const u64 codes = *reinterpret_cast<const u64*>(means[i].codes + kept);
        const float scale = means[i].scales[kept / SCALED];
#pragma unroll
        for (u32 k = 0; k < EACH; k++) m[i][k] = values[i][codes >> (8 * k) & 0xff] * scale;
      }
    }
    store(job.gradient, at, {});
    store(job.gradient, at + 4, {});
    if (!updates) continue;
    const auto scalars = *reinterpret_cast<const AdamW::Scalars*>(job.scalars + index * 16);
    float largest[2] = {};
#pragma unroll
    for (u32 k = 0; k < EACH; k++) {
      const float gradient = g[k / 4].v[k % 4] * gradient_scale;
      float &value = p[k / 4].v[k % 4], &average = ema[k / 4].v[k % 4];
      // Rounded one by one, as the code must be that of the other path.
      m[0][k] = __fadd_rn(__fmul_rn(m[0][k], scalars.keep_mean), __fmul_rn(gradient, scalars.mean));
      AdamW::move(scalars, gradient, value, m[0][k], m[1][k]);
      average = lerp(average, value, share);
      largest[0] = fmaxf(largest[0], fabsf(m[0][k]));
      largest[1] = fmaxf(largest[1], m[1][k]);
    }
    finish(job, at, p[0], ema[0]);
    finish(job, at + 4, p[1], ema[1]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (range.small) {
#pragma unroll
        for (u32 k = 0; k < EACH; k++) {
          if (at + k < range.end) means[i].wide[kept + k] = m[i][k];
        }
        continue;
      }
      for (int step = 16; step > 0; step /= 2) largest[i] = fmaxf(largest[i], __shfl_xor_sync(~0u, largest[i], step));
      // A block of zeros has the scale 0; its values then are 0 / 1.
      const float divisor = largest[i] == 0.0f ? 1.0f : largest[i];
      u64 codes = 0;
#pragma unroll
      for (u32 k = 0; k < EACH; k++) {
        // The nearest value's index is how many middles lie below.
        const float x = m[i][k] / divisor;
        u32 node = 1;
#pragma unroll
        for (int step = 0; step < 8; step++) node = 2 * node + (tree[i][node] < x);
        codes |= u64(node - 256) << (8 * k);
      }
      *reinterpret_cast<u64*>(means[i].codes + kept) = codes;
      if (lane == 0) means[i].scales[kept / SCALED] = largest[i];
    }
  }
}
