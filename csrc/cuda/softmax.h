// Softmax statistics and gradients of a row of logits, for the threads of one block. The
// mathematics is kernels/softmax.py's: the label's own logit is known first and stays out of the
// sums, so that log p = -log1p(sum of the others relative to it) keeps a confident model's digits.
#pragma once

#include "device_team.h"

namespace drrlhf::cuda {

constexpr float kLargest = 3.4028234663852886e38f;
constexpr float kInfinityF = __builtin_huge_valf(), kNanF = __builtin_nanf("");
constexpr int kBytesOfLoad = 16;

template <Dtype kDtype>
struct Storage;

template <>
struct Storage<Dtype::kFloat> {
  using Element = float;
  __device__ static float widen(float x) { return x; }
  __device__ static float narrow(float x) { return x; }
};

template <>
struct Storage<Dtype::kBFloat16> {
  using Element = std::uint16_t;
  __device__ static float widen(std::uint16_t x) { return bfloat16_to_float(x); }
  __device__ static std::uint16_t narrow(float x) { return float_to_bfloat16(x); }
};

template <>
struct Storage<Dtype::kHalf> {
  using Element = std::uint16_t;
  __device__ static float widen(std::uint16_t x) { return half_to_float(x); }
  __device__ static std::uint16_t narrow(float x) { return float_to_half(x); }
};

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

template <Dtype kDtype>
struct Type {
  static constexpr Dtype value = kDtype;
};

// Calls f with the dtype as a type.
template <class F>
Failure with_type(Dtype dtype, F f, Failure otherwise) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(Type<Dtype::kFloat>{});
    case Dtype::kBFloat16:
      return f(Type<Dtype::kBFloat16>{});
    case Dtype::kHalf:
      return f(Type<Dtype::kHalf>{});
    default:
      return otherwise;
  }
}

// Calls f with the dtype of logits and two flags as types.
template <class F>
Failure with_types(Dtype dtype, bool first, bool second, F f) {
  const auto flags = [&](auto type) {
    if (first)
      return second ? f(type, Flag<true>{}, Flag<true>{}) : f(type, Flag<true>{}, Flag<false>{});
    return second ? f(type, Flag<false>{}, Flag<true>{}) : f(type, Flag<false>{}, Flag<false>{});
  };
  return with_type(dtype, flags, "logits: expected float32, bfloat16 or float16");
}

template <Dtype kDtype>
using ElementOf = typename Storage<kDtype>::Element;

// Entries of a load.
template <Dtype kDtype>
constexpr int kVector = kBytesOfLoad / int(sizeof(ElementOf<kDtype>));

template <class Element, int N>
struct alignas(kBytesOfLoad) Vector {
  Element of[N];
};

template <Dtype kDtype>
using VectorOf = Vector<ElementOf<kDtype>, kVector<kDtype>>;

template <Dtype kDtype>
__device__ VectorOf<kDtype> load_vector(const ElementOf<kDtype>* from) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  VectorOf<kDtype> x;
  memcpy(&x, &raw, sizeof x);
  return x;
}

template <Dtype kDtype>
__device__ void store_vector(ElementOf<kDtype>* to, const VectorOf<kDtype>& x) {
  uint4 raw;
  memcpy(&raw, &x, sizeof raw);
  *reinterpret_cast<uint4*>(to) = raw;
}

// Entries before the first whole load of the row that begins at x.
template <class Element>
__device__ std::int64_t entries_before_load(const Element* x, std::int64_t entries) {
  const auto beyond = reinterpret_cast<std::uintptr_t>(x) % kBytesOfLoad;
  const std::int64_t before =
      beyond == 0 ? 0 : std::int64_t((kBytesOfLoad - beyond) / sizeof(Element));
  return before < entries ? before : entries;
}

// exp(x) in float32. Precise undoes the rounding of x log2(e), which float32 outputs show.
template <bool kPrecise>
__device__ float exponential(float x) {
  constexpr float kLog2e = 1.4426950408889634f, kLog2eTail = 1.92596298909109e-08f;
  constexpr float kLn2 = 0.6931471805599453f;
  if constexpr (kPrecise) {
    x = x < -200.0f ? -200.0f : x;
    const float high = multiply(x, kLog2e);
    const float low = fmaf(x, kLog2e, -high) + x * kLog2eTail;
    const float e = exp2f(high);
    // An infinite exponent has no rounding to undo.
    return high < 128.0f ? fmaf(e, low * kLn2, e) : e;
  } else {
    return exp2f(x * kLog2e);
  }
}

struct Transformed {
  float z, slope;  // slope: dz/dx without the factor scale inverse_temperature
};

// kPrecise: the slope to its last digit, which a narrow result does not show and registers pay for.
template <bool kCapped, bool kPrecise = false>
__device__ Transformed transformed(float x, const LogitTransform& t) {
  // Products are rounded here, so that a logit is the same number wherever it is used.
  x = multiply(x, t.scale);
  float slope = 1.0f;
  if constexpr (kCapped) {
    const float u = x / t.softcap, minus = -2.0f * fabsf(u);
    const float e = expf(minus), value = -expm1f(minus) / (1.0f + e);
    if constexpr (kPrecise) {
      // 1 - tanh^2 by 1 - tanh, whose error counts the less the nearer the slope is to 1.
      const float rest = 2.0f * e / (1.0f + e);
      slope = rest * (2.0f - rest);
    } else {
      slope = 4.0f * e / ((1.0f + e) * (1.0f + e));
    }
    x = t.softcap * (u < 0 ? -value : value);
  }
  return {multiply(x, t.inverse_temperature), slope};
}

// Of the entries other than the label's that a thread has met, relative to `reference`: total =
// sum e, e = exp(z - reference), shifted = sum e (z - reference), squares = sum e^2; plain = sum z;
// the largest z before and after the label.
struct RowState {
  float reference, total, shifted, squares, plain, before, after;
};

constexpr float kHeadroom = 1.0f;

// Counts entries `first` .. first + kCount - 1 in; the label is entry `label`.
template <bool kExtras, bool kPrecise, int kCount>
__device__ void fold(RowState& s, const float (&z)[kCount], std::int64_t first,
                     std::int64_t label) {
  float w[kCount];
  const std::int64_t own = label - first;
  float top = -kInfinityF;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    w[j] = z[j];
    if (own >= 0 && own < kCount && j == own) w[j] = -kInfinityF;
    top = w[j] > top ? w[j] : top;
    if constexpr (kExtras) {
      if (j != own) s.plain += w[j];
      float& best = j < own ? s.before : s.after;
      best = w[j] > best ? w[j] : best;
    }
  }
  if (!(top <= s.reference + kHeadroom)) {
    const float factor = exponential<kPrecise>(s.reference - top);
    if constexpr (kExtras) {
      // Nothing was summed while the reference was the least of all numbers.
      const float rise = s.total > 0 ? top - s.reference : 0.0f;
      // A rise beyond all numbers leaves nothing of what was summed.
      s.shifted = factor > 0 ? factor * (s.shifted - rise * s.total) : 0.0f;
      s.squares *= factor * factor;
    }
    s.total *= factor;
    s.reference = top;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float x = w[j] - s.reference, e = exponential<kPrecise>(x);
    s.total += e;
    if constexpr (kExtras) {
      s.shifted += e > 0 ? e * x : 0.0f;
      s.squares += e * e;
    }
  }
}

// What a row is known by. lse + lse_tail is its log-sum-exp to more digits than one float32 holds.
struct RowStatistics {
  float logp, lse, lse_tail, entropy, mean, log_sum_squares;
  bool is_top1;
};

// The statistics of a row from what the threads of the block have met; t: the label's z, NaN where
// the label is none. Every thread gets them.
template <bool kExtras>
__device__ RowStatistics finish_row(const BlockReduce& block, const RowState& s, float t,
                                    std::int64_t vocabulary) {
  const Sums<3> tops = block.template reduce<Larger>(
      Sums<3>{{double(s.reference), double(s.before), double(s.after)}});
  const double reference = tops.v[0], behind = double(s.reference) - reference;
  const bool summed = s.total != 0;
  const double factor = summed ? exp(behind) : 0.0;
  Sums<4> sums = {{summed ? s.total * factor : 0.0, 0.0, 0.0, 0.0}};
  if constexpr (kExtras) {
    sums.v[1] = factor > 0 ? (s.shifted + s.total * behind) * factor : 0.0;
    sums.v[2] = s.squares * factor * factor;
    sums.v[3] = s.plain;
  }
  sums = block.template reduce<Add>(sums);
  const double others = sums.v[0], u = double(t) - reference, own = exp(u), whole = others + own;
  double log_sum = u == 0 ? log1p(others) : log(whole);
  // What has no answer must stay seen: the label's logit infinite, or every logit -infinity.
  if (t != t || t > kLargest || (t < -kLargest && others == 0)) log_sum = kNanF;
  RowStatistics found = {};
  found.logp = float(u - log_sum);
  found.lse = float(reference + log_sum);
  found.lse_tail = float((reference - found.lse) + log_sum);
  if constexpr (kExtras) {
    found.entropy = float(log_sum - (sums.v[1] + (own > 0 ? own * u : 0.0)) / whole);
    found.mean = float((sums.v[3] + t) / double(vocabulary));
    const double squares = sums.v[2];
    found.log_sum_squares =
        float((u == 0 ? log1p(squares) : log(squares + own * own)) - 2 * log_sum);
    found.is_top1 = t > tops.v[1] && t >= tops.v[2];
  }
  return found;
}

__device__ inline void put_row(const TokenOut& out, std::int64_t row, const RowStatistics& s) {
  out.logp[row] = s.logp;
  out.lse[row] = s.lse;
  out.lse_tail[row] = s.lse_tail;
  if (out.entropy != nullptr) out.entropy[row] = s.entropy;
  if (out.mean != nullptr) out.mean[row] = s.mean;
  if (out.log_sum_squares != nullptr) out.log_sum_squares[row] = s.log_sum_squares;
  if (out.is_top1 != nullptr) out.is_top1[row] = s.is_top1;
}

// The label's entry of a row (or none), and its z.
struct OwnEntry {
  std::int64_t label;
  bool counted, known;
  float z;
};

template <Dtype kDtype, bool kCapped>
__device__ OwnEntry own_entry(const ElementOf<kDtype>* x, const Logits& logits,
                              const Integers& labels, std::int64_t row, std::int64_t ignore_index,
                              const LogitTransform& t) {
  OwnEntry own;
  own.label = integer_at(labels, row);
  own.counted = own.label != ignore_index;
  own.label -= logits.first;
  own.known = own.label >= 0 && own.label < logits.vocabulary;
  own.z = own.known && own.counted ? transformed<kCapped>(Storage<kDtype>::widen(x[own.label]), t).z
                                   : kNanF;
  return own;
}

// Reads the row x once, 16 bytes at a time and several times in flight.
template <Dtype kDtype, bool kExtras, bool kCapped, bool kPrecise>
__device__ RowStatistics read_row(const BlockReduce& block, const ElementOf<kDtype>* x,
                                  std::int64_t vocabulary, const OwnEntry& own,
                                  const LogitTransform& t) {
  constexpr int kCount = kVector<kDtype>, kInFlight = kExtras || kCapped ? 2 : 4;
  // Exponents are measured from the label's logit at first, if it is a number.
  RowState s = {own.z > -kLargest ? own.z : (own.z == own.z ? -kLargest : own.z),
                0.0f,
                0.0f,
                0.0f,
                0.0f,
                -kInfinityF,
                -kInfinityF};
  const auto one = [&](std::int64_t i) {
    const float z[1] = {transformed<kCapped>(Storage<kDtype>::widen(x[i]), t).z};
    fold<kExtras, kPrecise>(s, z, i, own.label);
  };
  const auto some = [&](const VectorOf<kDtype>& raw, std::int64_t first) {
    float z[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      z[j] = transformed<kCapped>(Storage<kDtype>::widen(raw.of[j]), t).z;
    }
    fold<kExtras, kPrecise>(s, z, first, own.label);
  };
  const std::int64_t head = entries_before_load(x, vocabulary);
  const std::int64_t loads = (vocabulary - head) / kCount, body = head + loads * kCount;
  if (threadIdx.x < head) one(threadIdx.x);
  std::int64_t i = threadIdx.x;
  for (; i + (kInFlight - 1) * kThreads < loads; i += kInFlight * kThreads) {
    VectorOf<kDtype> raw[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      raw[k] = load_vector<kDtype>(x + head + (i + k * kThreads) * kCount);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) some(raw[k], head + (i + k * kThreads) * kCount);
  }
  for (; i < loads; i += kThreads) {
    some(load_vector<kDtype>(x + head + i * kCount), head + i * kCount);
  }
  for (i = body + threadIdx.x; i < vocabulary; i += kThreads) one(i);
  return finish_row<kExtras>(block, s, own.z, vocabulary);
}

// d (a logp + b entropy) / dx of one entry.
struct RowCoefficients {
  float a, b, own, lse, lse_tail, entropy;  // own: 1 - p of the label
};

template <bool kByEntropy, bool kCapped, bool kPrecise>
__device__ float entry_gradient(float x, bool is_label, const RowCoefficients& c,
                                const LogitTransform& t) {
  const Transformed at = transformed<kCapped, kPrecise>(x, t);
  const float log_p = (at.z - c.lse) - c.lse_tail, p = exponential<kPrecise>(log_p);
  float d = c.a * (is_label ? c.own : -p);
  if constexpr (kByEntropy) d -= p > 0 ? c.b * (p * (log_p + c.entropy)) : 0.0f;
  return d * at.slope * (t.scale * t.inverse_temperature);
}

// Entries first .. first + kCount - 1 of a row, which begin on whole loads where `aligned`.
template <Dtype kIn, int kCount>
__device__ void load_entries(const ElementOf<kIn>* x, bool aligned, ElementOf<kIn> (&to)[kCount]) {
  constexpr int kEach = kVector<kIn>;
  static_assert(kCount % kEach == 0);
  if (aligned) {
#pragma unroll
    for (int k = 0; k < kCount; k += kEach) {
      const VectorOf<kIn> part = load_vector<kIn>(x + k);
#pragma unroll
      for (int j = 0; j < kEach; ++j) to[k + j] = part.of[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = x[j];
  }
}

// The gradient of loads from .. to - 1 of a row, and with `edges` of what lies before the first
// load and after the last one. out may be x: every entry is read and written by one thread. It may
// begin where x does in a narrower dtype too, if this block has the whole row: what is written then
// overtakes nothing that is still to be read.
template <Dtype kIn, Dtype kOut, bool kByEntropy, bool kCapped>
__device__ void write_row(const ElementOf<kIn>* x, ElementOf<kOut>* out, std::int64_t vocabulary,
                          std::int64_t label, std::int64_t from, std::int64_t to, bool edges,
                          const RowCoefficients& c, const LogitTransform& t) {
  constexpr int kCount = kVector<kOut>;
  constexpr int kInFlight = kByEntropy || kCapped || kIn != kOut ? 2 : 4;
  constexpr bool kPrecise = kOut == Dtype::kFloat;
  const auto gradient = [&](ElementOf<kIn> entry, std::int64_t i) {
    return Storage<kOut>::narrow(entry_gradient<kByEntropy, kCapped, kPrecise>(
        Storage<kIn>::widen(entry), i == label, c, t));
  };
  const auto all_have_read = [] {
    if constexpr (kIn != kOut) __syncthreads();
  };
  const std::int64_t head = entries_before_load(out, vocabulary);
  const std::int64_t loads = (vocabulary - head) / kCount, body = head + loads * kCount;
  const bool aligned = reinterpret_cast<std::uintptr_t>(x + head) % kBytesOfLoad == 0;
  to = to < loads ? to : loads;
  const auto edge = [&](std::int64_t i, bool mine) {
    const ElementOf<kIn> entry = mine ? x[i] : ElementOf<kIn>(0);
    all_have_read();
    if (mine) out[i] = gradient(entry, i);
  };
  if (edges) edge(threadIdx.x, threadIdx.x < head);
  for (std::int64_t base = from; base < to; base += kInFlight * kThreads) {
    ElementOf<kIn> raw[kInFlight][kCount];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const std::int64_t i = base + threadIdx.x + k * kThreads;
      if (i < to) load_entries<kIn>(x + head + i * kCount, aligned, raw[k]);
    }
    all_have_read();
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const std::int64_t i = base + threadIdx.x + k * kThreads, first = head + i * kCount;
      if (i >= to) continue;
      VectorOf<kOut> d;
#pragma unroll
      for (int j = 0; j < kCount; ++j) d.of[j] = gradient(raw[k][j], first + j);
      store_vector<kOut>(out + first, d);
    }
  }
  if (edges) edge(body + threadIdx.x, body + threadIdx.x < vocabulary);
}

}  // namespace drrlhf::cuda
