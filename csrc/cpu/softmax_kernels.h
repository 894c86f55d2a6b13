// The kernels of softmax.h at one vector width. Included once per width by softmax.cpp, inside a
// namespace and under the compiler's target for that width, with DRRLHF_LANES set. Vector types
// are the compiler's own, so one text serves AVX-512, AVX2 and everything else.

typedef float Floats __attribute__((vector_size(4 * DRRLHF_LANES)));
typedef std::int32_t Ints __attribute__((vector_size(4 * DRRLHF_LANES)));
typedef std::uint32_t Words __attribute__((vector_size(4 * DRRLHF_LANES)));
typedef std::uint16_t Shorts __attribute__((vector_size(2 * DRRLHF_LANES)));

constexpr int kLanes = DRRLHF_LANES;
constexpr int kUnroll = 4;  // independent chains, to hide the latency of an add
constexpr int kStep = kLanes * kUnroll;
constexpr int kChunk = 2048;  // of a row: its float32 copy stays in the L1 cache

template <class To, class From>
DRRLHF_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

DRRLHF_INLINE Floats all(float x) { return x - Floats{}; }
DRRLHF_INLINE Ints all_ints(std::int32_t x) { return x - Ints{}; }
// Not the larger where x is NaN but x itself: a NaN must stay seen.
DRRLHF_INLINE Floats at_least(Floats x, Floats floor) { return x < floor ? floor : x; }
DRRLHF_INLINE Floats larger(Floats x, Floats best) { return x > best ? x : best; }

// a b + c with one rounding, where the processor can. The compiler fuses nothing by itself: which
// product of an expression keeps its digits matters, and so does that a logit is the same number
// wherever it is used.
constexpr bool kFuses = DRRLHF_LANES >= 8;
DRRLHF_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if DRRLHF_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif DRRLHF_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Horner's rule; the coefficient of the highest power first.
template <class... Lower>
DRRLHF_INLINE Floats polynomial(Floats x, float highest, Lower... lower) {
  Floats p = all(highest);
  ((p = fused(p, x, all(lower))), ...);
  return p;
}

template <Storage S>
struct Element {
  using Type = std::uint16_t;
};
template <>
struct Element<Storage::kFloat> {
  using Type = float;
};

DRRLHF_INLINE Floats from_half(Words h) {
  const Words sign = (h & 0x8000u) << 16, rest = (h & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, subnormal numbers included.
  const Words finite = bits<Words>(bits<Floats>(rest) * 0x1p112f);
  const Words special = rest | 0x7f800000u;
  return bits<Floats>(sign | (rest >= 0x0f800000u ? special : finite));
}

DRRLHF_INLINE Words to_half(Floats x) {
  const Words all_bits = bits<Words>(x), sign = all_bits & 0x80000000u, u = all_bits ^ sign;
  const Words special = u > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
  // Adding 0.5 leaves a subnormal half, rounded to nearest even, in the low bits.
  const Words subnormal = bits<Words>(bits<Floats>(u) + 0.5f) - 0x3f000000u;
  const Words normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const Words finite = u < 0x38800000u ? subnormal : normal;
  return (u >= 0x47800000u ? special : finite) | (sign >> 16);
}

// To nearest, ties to even; the upper half of each word is the bfloat16.
DRRLHF_INLINE Words rounded_to_bfloat16(Floats x) {
  const Words u = bits<Words>(x);
  return x == x ? u + 0x7fffu + ((u >> 16) & 1u) : u | 0x400000u;
}

template <Storage S>
DRRLHF_INLINE Floats load(const typename Element<S>::Type* from) {
  if constexpr (S == Storage::kFloat) {
    Floats x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
  } else {
    Shorts narrow;
    __builtin_memcpy(&narrow, from, sizeof narrow);
    const Words wide = __builtin_convertvector(narrow, Words);
    return S == Storage::kHalf ? from_half(wide) : bits<Floats>(wide << 16);
  }
}

template <Storage S>
DRRLHF_INLINE void store(typename Element<S>::Type* to, Floats x) {
  if constexpr (S == Storage::kFloat) {
    __builtin_memcpy(to, &x, sizeof x);
  } else {
    Words narrow;
    if constexpr (S == Storage::kHalf) {
      narrow = to_half(x);
    } else {
      narrow = rounded_to_bfloat16(x) >> 16;
    }
    const Shorts out = __builtin_convertvector(narrow, Shorts);
    __builtin_memcpy(to, &out, sizeof out);
  }
}

// Undoes load_two.
template <Storage S>
DRRLHF_INLINE void store_two(typename Element<S>::Type* to, Floats one, Floats two) {
  if constexpr (S == Storage::kBFloat16) {
    const Words pairs = (rounded_to_bfloat16(one) >> 16) | (rounded_to_bfloat16(two) & 0xffff0000u);
    __builtin_memcpy(to, &pairs, sizeof pairs);
  } else {
    store<S>(to, one);
    store<S>(to + kLanes, two);
  }
}

// A part of a vector; what is missing reads as `fill`.
template <Storage S>
DRRLHF_INLINE Floats load_part(const typename Element<S>::Type* from, std::int64_t count,
                               float fill) {
  typename Element<S>::Type part[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) part[i] = from[i];
  Floats x = load<S>(part);
  for (int i = 0; i < kLanes; ++i) x[i] = i < count ? x[i] : fill;
  return x;
}

template <Storage S>
DRRLHF_INLINE void store_part(typename Element<S>::Type* to, std::int64_t count, Floats x) {
  typename Element<S>::Type part[kLanes];
  store<S>(part, x);
  for (std::int64_t i = 0; i < count; ++i) to[i] = part[i];
}

constexpr float kLog2e = 1.44269504f;  // 1.44269502 in float32
constexpr float kLn2 = 0.693147181f;
constexpr float kLog2eLost = 1.334977e-8f;  // log2(e) / kLog2e - 1
constexpr float kShift = 12582912.0f;       // 1.5 * 2^23: rounds to an integer

// 2^t for t < 128, relative error 6e-8; exactly 1 at 0, and 0 where it would be below the normal
// numbers.
//
// Refined: of t = x log2(e) with the rounded constant, for the exact one. What rounding it takes
// from every x is nothing to a sum of them, but it is a bias of the single value.
template <bool Refined>
DRRLHF_INLINE Floats two_to(Floats t) {
#if DRRLHF_LANES == 16
  if constexpr (Refined) t = at_least(t, all(-1000.0f));
  Floats f = _mm512_maskz_reduce_ps(0xffff, t, _MM_FROUND_TO_NEG_INF);
#else
  t = at_least(t, all(-1000.0f));
  const Floats shifted = (t - 0.5f) + kShift;
  Floats f = t - (shifted - kShift);
#endif
  if constexpr (Refined) f = fused(t, all(kLog2eLost), f);
  // 2^f on [0, 1], fitted for the least largest relative error.
  const Floats p = polynomial(f, 0x1.c54174p-13f, 0x1.46d64ep-10f, 0x1.3d0b92p-7f, 0x1.c68912p-5f,
                              0x1.ebfd58p-3f, 0x1.62e42cp-1f, 1.0f);
#if DRRLHF_LANES == 16
  return _mm512_maskz_scalef_ps(0xffff, p, t);  // takes the floor of t
#else
  const Ints exponent = bits<Ints>(shifted) - (0x4b400000 - 127);
  return p * bits<Floats>((exponent > 0 ? exponent : Ints{}) << 23);
#endif
}

constexpr float kLn2High = 0.693359375f;  // so few digits that a product with an integer is exact
constexpr float kLn2Low = -2.12194440e-4f;

// x = k ln 2 + r with an integer k and |r| <= ln 2 / 2; 2^k for normal results.
struct Reduced {
  Floats r, k, shifted;
  DRRLHF_INLINE explicit Reduced(Floats x) {
    shifted = fused(x, all(kLog2e), all(kShift));
    k = shifted - kShift;
    r = fused(k, all(-kLn2Low), fused(k, all(-kLn2High), x));
  }
};

// exp(x) for x < 88, relative error 8e-8; 0 where it would be below the normal numbers.
DRRLHF_INLINE Floats exponential(Floats x) {
  const Reduced by(at_least(x, all(-700.0f)));
  // (exp(r) - 1 - r) / r^2, fitted for the least largest error of the whole, 3e-9.
  const Floats s = polynomial(by.r, 0x1.6a4d58p-10f, 0x1.12398ep-7f, 0x1.5558bp-5f, 0x1.555492p-3f,
                              0x1.fffffcp-2f);
  const Floats p = 1.0f + fused(by.r * by.r, s, by.r);
#if DRRLHF_LANES == 16
  return _mm512_maskz_scalef_ps(0xffff, p, by.k);
#else
  const Ints exponent = bits<Ints>(by.shifted) - (0x4b400000 - 127);
  return p * bits<Floats>((exponent > 0 ? exponent : Ints{}) << 23);
#endif
}

// exp(x) of tiny x: what a float32 cannot hold of a number below 1e4 or so.
DRRLHF_INLINE Floats exponential_of_tiny(Floats x) { return 1.0f + (x + 0.5f * x * x); }

// exp(z - reference) = factor 2^exponent(z) for a reference that many z share. One fused operation
// makes an exponent: the product reference * log2(e) is rounded, but what that does is known and
// the same for every z, so the factor, close to 1, takes it back. For large references it would not
// be.
constexpr float kLargeReference = 1e4f;

template <bool Large>
struct Relative {
  static constexpr bool kByDifference = Large || !kFuses;
  Floats reference, product;
  DRRLHF_INLINE explicit Relative(Floats z) : reference(z), product(z * kLog2e) {}
  DRRLHF_INLINE Floats exponent(Floats z) const {
    return kByDifference ? (z - reference) * kLog2e : fused(z, all(kLog2e), -product);
  }
  // Minus the log of the factor.
  DRRLHF_INLINE Floats lost() const {
    return kByDifference ? Floats{} : fused(reference, all(kLog2e), -product) * kLn2;
  }
  DRRLHF_INLINE Floats factor() const { return exponential_of_tiny(-lost()); }
};

DRRLHF_INLINE bool any(Ints condition) {
  std::int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= condition[i];
  return found != 0;
}

// The reference of logits that are all -infinity; finite, so that differences are not NaN.
constexpr float kLeastReference = -FLT_MAX;

// How far above its reference a logit may lie: exponents far from 0 have a coarser rounding.
constexpr float kHeadroom = 1.0f;

// tanh u and 1 - tanh^2 u, each to its own last digits, from e = exp(-2 |u|).
struct Tangent {
  Floats value, slope;
};

DRRLHF_INLINE Tangent hyperbolic_tangent(Floats u) {
  const Floats sign = bits<Floats>(bits<Words>(u) & 0x80000000u);
  Floats x = bits<Floats>(bits<Words>(u) & 0x7fffffffu) * -2.0f;
  x = at_least(x, all(-40.0f));
  const Reduced by(x);
  const Floats r = by.r;
  const Floats s = polynomial(r, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f);
  const Floats tail = fused(r * r, s, r);
  const Floats scale = bits<Floats>((bits<Ints>(by.shifted) - (0x4b400000 - 127)) << 23);
  // (1 - e) / (1 + e) where that is small, 1 - 2 e / (1 + e) where it is not.
  const Floats e = fused(scale, tail, scale), minus_expm1 = fused(-scale, tail, 1.0f - scale);
  const Ints small = x > -1.0f;
  const Floats quotient = (small ? minus_expm1 : 2.0f * e) / (1.0f + e);
  const Floats value = small ? quotient : 1.0f - quotient;
  const Floats slope = small ? (1.0f - value) * (1.0f + value) : quotient * (2.0f - quotient);
  return {bits<Floats>(bits<Words>(value) | bits<Words>(sign)), slope};
}

// How much of the transform there is to do.
enum class Form { kIdentity, kScaled, kCapped };

template <Form F>
DRRLHF_INLINE Floats transformed(Floats x, const Transform& t) {
  if constexpr (F == Form::kIdentity) return x;
  if constexpr (F == Form::kScaled) return x * (t.scale * t.inverse_temperature);
  return hyperbolic_tangent(x * (t.scale / t.softcap)).value * (t.softcap * t.inverse_temperature);
}

// dz/dx from z.
template <Form F>
DRRLHF_INLINE Floats slope(Floats z, const Transform& t) {
  if constexpr (F == Form::kIdentity) return all(1.0f);
  const float scaled = t.scale * t.inverse_temperature;
  if constexpr (F == Form::kScaled) return all(scaled);
  const Floats h = z / (t.softcap * t.inverse_temperature);
  return (1.0f - h) * (1.0f + h) * scaled;
}

// The same, in units of scale / temperature.
template <Form F>
DRRLHF_INLINE Floats relative_slope(Floats z, const Transform& t) {
  if constexpr (F != Form::kCapped) return all(1.0f);
  const Floats h = z / (t.softcap * t.inverse_temperature);
  return (1.0f - h) * (1.0f + h);
}

// A transformed logit and dz/dx.
struct Sloped {
  Floats z, slope;
};

template <Form F>
DRRLHF_INLINE Sloped sloped(Floats x, const Transform& t) {
  if constexpr (F != Form::kCapped) return {transformed<F>(x, t), slope<F>(x, t)};
  const Tangent h = hyperbolic_tangent(x * (t.scale / t.softcap));
  return {h.value * (t.softcap * t.inverse_temperature),
          h.slope * (t.scale * t.inverse_temperature)};
}

DRRLHF_INLINE double sum_of(Floats x) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

DRRLHF_INLINE float largest_of(Floats x, float best) {
  for (int i = 0; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// Two vectors at once, in whatever order is cheapest: bfloat16 comes apart into its even and its
// odd entries by a shift and a mask.
template <Storage S>
DRRLHF_INLINE void load_two(const typename Element<S>::Type* from, Floats& one, Floats& two) {
  if constexpr (S == Storage::kBFloat16) {
    Words pairs;
    __builtin_memcpy(&pairs, from, sizeof pairs);
    one = bits<Floats>(pairs << 16);
    two = bits<Floats>(pairs & 0xffff0000u);
  } else {
    one = load<S>(from);
    two = load<S>(from + kLanes);
  }
}

// A vector at i < n of a row, transformed; what lies beyond the row reads as `fill`.
template <Storage S, Form F>
DRRLHF_INLINE Floats logits_at(const typename Element<S>::Type* from, std::int64_t i,
                               std::int64_t n, float fill, const Transform& t) {
  if (i + kLanes <= n) return transformed<F>(load<S>(from + i), t);
  Floats z = transformed<F>(load_part<S>(from + i, n - i, 0.0f), t);
  for (int j = 0; j < kLanes; ++j) z[j] = j < n - i ? z[j] : fill;
  return z;
}

template <Storage S, Form F>
DRRLHF_INLINE float largest(const typename Element<S>::Type* from, std::int64_t n,
                            const Transform& t) {
  Floats best = all(kLeastReference);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    best = larger(logits_at<S, F>(from, i, n, -kInfinityF, t), best);
  }
  return largest_of(best, kLeastReference);
}

// The sums of `Others` over a part of a row, relative to a given reference.
template <Storage S, Form F, bool Extras, bool Large>
DRRLHF_INLINE Others part_of_row(const typename Element<S>::Type* from, std::int64_t n,
                                 float reference, const Transform& t) {
  const Relative<Large> relative(all(reference));
  Floats sum[kUnroll] = {}, shifted[kUnroll] = {}, squares[kUnroll] = {}, total[kUnroll] = {};
  Floats top[kUnroll];
  for (int u = 0; u < kUnroll; ++u) top[u] = all(-FLT_MAX);
  const auto add = [&](int u, Floats z) __attribute__((always_inline)) {
    const Floats x = relative.exponent(z), e = two_to<false>(x);
    sum[u] += e;
    if constexpr (Extras) {
      shifted[u] = fused(e, at_least(x, all(-1000.0f)), shifted[u]);
      squares[u] = fused(e, e, squares[u]);
    }
    top[u] = larger(z, top[u]);
  };
  std::int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    // Pages end the processor's own prefetching, and there is one every few steps.
    constexpr int kBytes = kStep * sizeof(*from), kAhead = 2048;
    const char* ahead = reinterpret_cast<const char*>(from + i) + kAhead;
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + line);
    for (int u = 0; u < kUnroll; u += 2) {
      Floats one, two;
      load_two<S>(from + i + u * kLanes, one, two);
      one = transformed<F>(one, t);
      two = transformed<F>(two, t);
      add(u, one);
      add(u + 1, two);
      if constexpr (Extras) total[u] += one + two;
    }
  }
  for (; i < n; i += kLanes) {
    add(0, logits_at<S, F>(from, i, n, -kInfinityF, t));
    if constexpr (Extras) total[0] += logits_at<S, F>(from, i, n, 0.0f, t);
  }
  const double factor = relative.factor()[0];
  Others part;
  part.reference = reference;
  part.sum = factor * sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if constexpr (Extras) {
    part.shifted = factor / kLog2e * sum_of((shifted[0] + shifted[1]) + (shifted[2] + shifted[3])) -
                   part.sum * relative.lost()[0];
    part.squares = factor * factor * sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
    part.total = sum_of(total[0] + total[2]);
  }
  part.top = -FLT_MAX;
  for (int u = 0; u < kUnroll; ++u) part.top = largest_of(top[u], part.top);
  return part;
}

// One pass over memory: a chunk is summed relative to the largest logit of the first chunk, and
// summed again, out of the cache, in the rare case that it holds a larger one.
template <Storage S, Form F, bool Extras>
DRRLHF_INLINE void fold_range(const typename Element<S>::Type* x, std::int64_t begin,
                              std::int64_t end, const Transform& t, Others& o) {
  for (std::int64_t start = begin; start < end; start += kChunk) {
    const std::int64_t n = end - start < kChunk ? end - start : kChunk;
    const auto* from = x + start;
    const auto part = [&](float reference) {
      return __builtin_fabsf(reference) < kLargeReference
                 ? part_of_row<S, F, Extras, false>(from, n, reference, t)
                 : part_of_row<S, F, Extras, true>(from, n, reference, t);
    };
    if (o.sum == 0) o.reference = largest<S, F>(from, n, t);
    Others p = part(o.reference);
    if (p.top > o.reference + kHeadroom) p = part(p.top);
    if constexpr (Extras) {
      if (p.top > o.top) {
        std::int64_t i = 0;
        while (!any(logits_at<S, F>(from, i, n, -kInfinityF, t) == p.top)) i += kLanes;
        while (!(transformed<F>(load_part<S>(from + i, 1, 0.0f), t)[0] == p.top)) ++i;
        p.index = start + i;
      }
    }
    merge(o, p);
  }
}

template <Storage S, Form F, bool Extras>
void fold_row_as(const void* row, std::int64_t n, std::int64_t label, const Transform& t, Others& o,
                 float& label_z) {
  const auto* x = static_cast<const typename Element<S>::Type*>(row);
  fold_range<S, F, Extras>(x, 0, label, t, o);
  fold_range<S, F, Extras>(x, label + 1, n, t, o);
  label_z = transformed<F>(load_part<S>(x + label, 1, 0.0f), t)[0];
  o.total += label_z;
}

// d/dz of the label's own entry: 1 - p from the log-prob, for 1 - p cancels where p is close to 1.
DRRLHF_INLINE float label_gradient(const RowCoefficients& c) {
  const float p = __builtin_expf(c.logp);
  const float entropy_part = c.b != 0 && p > 0 ? c.b * p * (c.logp + c.entropy) : 0.0f;
  return -c.a * __builtin_expm1f(c.logp) - entropy_part;
}

// The coefficients of a row's or of several columns' gradient, ready for its loop.
//
// Direct: the exponential of z - lse - lse_tail, whose digits are all right where p is not small;
// else the quick way, for a log-sum-exp that is not too large.
template <bool Direct, bool Entropy>
struct Gradient {
  Relative<false> relative;
  Floats a, b, lse, lse_tail, entropy;

  DRRLHF_INLINE Gradient(Floats a_, Floats b_, Floats lse_, Floats tail, Floats h)
      : relative(lse_), a(a_), b(b_), lse(lse_), lse_tail(tail), entropy(h) {
    static_assert(Direct || !Entropy);
    if constexpr (!Direct) a *= exponential_of_tiny(-(relative.lost() + tail));
  }

  // -(a p + b p (log p + entropy)) for p = exp(z - log-sum-exp).
  DRRLHF_INLINE Floats operator()(Floats z) const {
    if constexpr (!Direct) return -(a * two_to<true>(relative.exponent(z)));
    const Floats log_p = (z - lse) - lse_tail;
    if constexpr (!Entropy) return -(a * exponential(log_p));
    const Floats shifted = at_least(log_p, all(-1000.0f)) + entropy;
    return -(fused(b, shifted, a) * exponential(log_p));
  }
};

template <Storage S, Form F, class G>
DRRLHF_INLINE void row_gradient_by(const G& gradient, const typename Element<S>::Type* x,
                                   typename Element<S>::Type* out, std::int64_t n,
                                   const Transform& t) {
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    constexpr int kBytes = 2 * kLanes * sizeof(*x), kAhead = 2048;
    const char* ahead = reinterpret_cast<const char*>(x + i) + kAhead;
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + line);
    Floats one, two;
    load_two<S>(x + i, one, two);
    const Sloped a = sloped<F>(one, t), b = sloped<F>(two, t);
    store_two<S>(out + i, gradient(a.z) * a.slope, gradient(b.z) * b.slope);
  }
  for (; i < n; i += kLanes) {
    const std::int64_t left = n - i < kLanes ? n - i : kLanes;
    const Sloped a = sloped<F>(load_part<S>(x + i, left, 0.0f), t);
    store_part<S>(out + i, left, gradient(a.z) * a.slope);
  }
}

template <Storage S, Form F>
void row_gradient_as(const void* row, void* to, std::int64_t n, std::int64_t label,
                     const Transform& t, const RowCoefficients& c) {
  using T = typename Element<S>::Type;
  const auto* x = static_cast<const T*>(row);
  auto* out = static_cast<T*>(to);
  const Floats label_slope = sloped<F>(load_part<S>(x + label, 1, 0.0f), t).slope;
  const auto by = [&](auto gradient) { row_gradient_by<S, F>(gradient, x, out, n, t); };
  const Floats a = all(c.a), b = all(c.b), lse = all(c.lse), tail = all(c.lse_tail);
  if (c.b != 0) {
    by(Gradient<true, true>(a, b, lse, tail, all(c.entropy)));
  } else if (S != Storage::kFloat && __builtin_fabsf(c.lse) < kLargeReference) {
    by(Gradient<false, false>(a, b, lse, tail, Floats{}));
  } else {
    by(Gradient<true, false>(a, b, lse, tail, Floats{}));
  }
  store_part<S>(out + label, 1, label_gradient(c) * label_slope);
}

// Folds a block of kLanes columns into the statistics at column j.
template <bool Extras, bool Large>
DRRLHF_INLINE Floats fold_columns(const float* block, std::int64_t stride, std::int64_t rows,
                                  Floats reference, Floats& top, Floats& shifted, Floats& squares) {
  const Relative<Large> relative(reference);
  Floats sum[2] = {}, shift[2] = {}, square[2] = {};
  Floats best[2] = {all(-FLT_MAX), all(-FLT_MAX)};
  const auto add = [&](std::int64_t v, int u) __attribute__((always_inline)) {
    const Floats z = load<Storage::kFloat>(block + v * stride);
    const Floats x = relative.exponent(z), e = two_to<false>(x);
    best[u] = larger(z, best[u]);
    sum[u] += e;
    if constexpr (Extras) {
      shift[u] = fused(e, at_least(x, all(-1000.0f)), shift[u]);
      square[u] = fused(e, e, square[u]);
    }
  };
  std::int64_t v = 0;
  for (; v + 2 <= rows; v += 2) {
    add(v, 0);
    add(v + 1, 1);
  }
  if (v < rows) add(v, 0);
  top = larger(best[0], best[1]);
  const Floats factor = relative.factor();
  if constexpr (Extras) {
    shifted = (shift[0] + shift[1]) * factor * (1 / kLog2e) -
              (sum[0] + sum[1]) * factor * relative.lost();
    squares = (square[0] + square[1]) * factor * factor;
  }
  return (sum[0] + sum[1]) * factor;
}

template <Form F>
void transform_tile_as(float* tile, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                       const float* bias, const Transform& t) {
  constexpr auto kF = Storage::kFloat;
  if (F == Form::kIdentity && bias == nullptr) return;
  for (std::int64_t v = 0; v < rows; ++v) {
    const float b = bias == nullptr ? 0.0f : bias[v];
    float* row = tile + v * stride;
    for (std::int64_t j = 0; j < columns; j += kLanes) {
      store<kF>(row + j, transformed<F>(load<kF>(row + j) + b, t));
    }
  }
}

template <bool Extras>
void fold_tile_as(float* tile, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                  std::int64_t first, const std::int64_t* labels, const OthersOfColumns& o,
                  float* label_z) {
  constexpr auto kF = Storage::kFloat;
  if constexpr (Extras) {
    for (std::int64_t j = 0; j < columns; j += kLanes) {
      Floats total[4] = {};
      for (std::int64_t v = 0; v < rows; ++v) total[v % 4] += load<kF>(tile + v * stride + j);
      store<kF>(o.total + j,
                load<kF>(o.total + j) + ((total[0] + total[1]) + (total[2] + total[3])));
    }
  }
  // The labels' own logits step aside, for the statistics are those of the others.
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int64_t v = labels[j] - first;
    if (v >= 0 && v < rows) {
      label_z[j] = tile[v * stride + j];
      tile[v * stride + j] = -kInfinityF;
    }
  }
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const float* block = tile + j;
    const auto largest_logits = [&] {
      Floats best = all(kLeastReference);
      for (std::int64_t v = 0; v < rows; ++v) best = larger(load<kF>(block + v * stride), best);
      return best;
    };
    Floats sum = load<kF>(o.sum + j), reference = load<kF>(o.reference + j);
    if (any(sum == 0.0f)) reference = sum == 0.0f ? largest_logits() : reference;
    Floats best, shifted, squares;
    const auto fold = [&] {
      const Floats size = bits<Floats>(bits<Words>(reference) & 0x7fffffffu);
      return any(size >= kLargeReference)
                 ? fold_columns<Extras, true>(block, stride, rows, reference, best, shifted,
                                              squares)
                 : fold_columns<Extras, false>(block, stride, rows, reference, best, shifted,
                                               squares);
    };
    Floats added = fold();
    if (any(best > reference + kHeadroom)) {
      const Floats to = larger(best, reference);
      const Floats factor = exponential(reference - to);
      if constexpr (Extras) {
        const Floats held = sum == 0.0f ? Floats{} : sum * (reference - to);
        store<kF>(o.shifted + j, (load<kF>(o.shifted + j) + held) * factor);
        store<kF>(o.squares + j, load<kF>(o.squares + j) * factor * factor);
      }
      sum *= factor;
      reference = to;
      added = fold();
    }
    store<kF>(o.reference + j, reference);
    store<kF>(o.sum + j, sum + added);
    if constexpr (Extras) {
      store<kF>(o.shifted + j, load<kF>(o.shifted + j) + shifted);
      store<kF>(o.squares + j, load<kF>(o.squares + j) + squares);
      Floats top = load<kF>(o.top + j);
      Ints index;
      __builtin_memcpy(&index, o.index + j, sizeof index);
      for (std::int64_t v = 0; v < rows; ++v) {
        const Floats z = load<kF>(block + v * stride);
        index = z > top ? all_ints(static_cast<std::int32_t>(first + v)) : index;
        top = larger(z, top);
      }
      store<kF>(o.top + j, top);
      __builtin_memcpy(o.index + j, &index, sizeof index);
    }
  }
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int64_t v = labels[j] - first;
    if (v >= 0 && v < rows) tile[v * stride + j] = label_z[j];
  }
}

// A block of columns at a time. Writing over the tile is safe: what a block overwrites, it or an
// earlier block has read.
template <Storage S, Form F, class G>
DRRLHF_INLINE void columns_gradient(const G& gradient, const float* block, std::int64_t stride,
                                    std::int64_t rows, const Transform& t,
                                    typename Element<S>::Type* out, std::int64_t out_stride) {
  for (std::int64_t v = 0; v < rows; ++v) {
    const Floats z = load<Storage::kFloat>(block + v * stride);
    store<S>(out + v * out_stride, gradient(z) * slope<F>(z, t));
  }
}

// What a label's own entries become, before a tile that is overwritten loses them.
template <Form F>
DRRLHF_INLINE void label_gradients(const float* tile, std::int64_t stride, std::int64_t rows,
                                   std::int64_t columns, std::int64_t first,
                                   const std::int64_t* labels, const Transform& t,
                                   const ColumnCoefficients& c, float* own) {
  const auto entry = [](const float* values, std::int64_t j, float otherwise) {
    return values == nullptr ? otherwise : values[j];
  };
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int64_t v = labels[j] - first;
    if (v >= 0 && v < rows) {
      const RowCoefficients row = {entry(c.a, j, 1.0f), entry(c.b, j, 0.0f),
                                   c.logp[j],           c.lse[j],
                                   c.lse_tail[j],       entry(c.entropy, j, 0.0f)};
      own[j] = label_gradient(row) * slope<F>(all(tile[v * stride + j]), t)[0];
    }
  }
}

// Calls f with the gradient of the columns [j, j + kLanes).
template <class F>
DRRLHF_INLINE void with_gradient(const ColumnCoefficients& c, std::int64_t j, F f) {
  constexpr auto kF = Storage::kFloat;
  const Floats lse = load<kF>(c.lse + j), tail = load<kF>(c.lse_tail + j);
  const Floats a = c.a == nullptr ? all(1.0f) : load<kF>(c.a + j);
  const Floats size = bits<Floats>(bits<Words>(lse) & 0x7fffffffu);
  if (c.b != nullptr) {
    f(Gradient<true, true>(a, load<kF>(c.b + j), lse, tail, load<kF>(c.entropy + j)));
  } else if (any(size >= kLargeReference)) {
    f(Gradient<true, false>(a, Floats{}, lse, tail, Floats{}));
  } else {
    f(Gradient<false, false>(a, Floats{}, lse, tail, Floats{}));
  }
}

template <Storage S, Form F>
void tile_gradient_as(const float* tile, std::int64_t stride, std::int64_t rows,
                      std::int64_t columns, std::int64_t first, const std::int64_t* labels,
                      const Transform& t, const ColumnCoefficients& c, void* to,
                      std::int64_t out_stride, float* scratch) {
  auto* out = static_cast<typename Element<S>::Type*>(to);
  label_gradients<F>(tile, stride, rows, columns, first, labels, t, c, scratch);
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    with_gradient(c, j, [&](auto gradient) {
      columns_gradient<S, F>(gradient, tile + j, stride, rows, t, out + j, out_stride);
    });
  }
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int64_t v = labels[j] - first;
    if (v >= 0 && v < rows) store_part<S>(out + v * out_stride + j, 1, all(scratch[j]));
  }
}

#if DRRLHF_LANES == 16
// Sixteen rows by sixteen columns of 16-bit entries, transposed: `words` has neighbouring rows'
// entries in pairs, and three rounds of interleaving bring every column's eight words together.
DRRLHF_INLINE void store_transposed(Words (&words)[8], std::uint16_t* out, std::int64_t out_stride,
                                    std::int64_t columns) {
  Words next[8];
  constexpr Words kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Words kHigh = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = __builtin_shuffle(words[i], words[i + 4], kLow);
      next[2 * i + 1] = __builtin_shuffle(words[i], words[i + 4], kHigh);
    }
    for (int i = 0; i < 8; ++i) words[i] = next[i];
  }
  if (columns == kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      __builtin_memcpy(out + j * out_stride,
                       reinterpret_cast<const char*>(&words[j / 2]) + j % 2 * 32, 32);
    }
    return;
  }
  for (std::int64_t j = 0; j < columns; ++j) {
    __builtin_memcpy(out + j * out_stride,
                     reinterpret_cast<const char*>(&words[j / 2]) + j % 2 * 32, 32);
  }
}

constexpr std::int64_t kDepthStep = 32;  // entries of a row that a product takes at once

// A block of sixteen columns: the sum of its ratios.
template <Form F, bool Transposed, bool Whole>
DRRLHF_INLINE Floats ratios_of_columns(const float* block, std::int64_t stride, std::int64_t rows,
                                       Floats reference, const Transform& t, std::uint16_t* out,
                                       std::int64_t out_stride, std::int64_t tokens) {
  Floats sum[2] = {};
  const Relative<true> relative(reference);  // no factor is left over
  // The upper half of each word, to nearest, ties away from 0. What becomes of NaN is not used.
  const auto ratio = [&](std::int64_t v) __attribute__((always_inline)) {
    if (!Whole && v >= rows) return Words{};
    const Floats z = load<Storage::kFloat>(block + v * stride);
    const Floats e = two_to<false>(relative.exponent(z));
    sum[v % 2] += e;
    if constexpr (F != Form::kCapped) return bits<Words>(e) + 0x8000u;
    return bits<Words>(e * relative_slope<F>(z, t)) + 0x8000u;
  };
  for (std::int64_t v = 0; v < rows; v += kLanes) {
    if constexpr (Transposed) {
      Words words[8];
      for (int i = 0; i < 8; ++i) {
        const Words one = ratio(v + 2 * i), two = ratio(v + 2 * i + 1);
        words[i] = (one >> 16) | (two & 0xffff0000u);
      }
      store_transposed(words, out + v, out_stride, tokens);
    } else {
      for (int i = 0; i < kLanes && (Whole || v + i < rows); ++i) {
        const Shorts narrow = __builtin_convertvector(ratio(v + i) >> 16, Shorts);
        std::uint16_t* to = out + (v + i) * out_stride;
        if (tokens == kLanes) {
          __builtin_memcpy(to, &narrow, sizeof narrow);
        } else {
          __builtin_memcpy(to, &narrow, tokens * sizeof *to);
        }
      }
    }
  }
  return sum[0] + sum[1];
}

// The same of two neighbouring blocks, not transposed: whole lines of the cache at a time.
template <Form F>
DRRLHF_INLINE void ratios_of_two(const float* block, std::int64_t stride, std::int64_t rows,
                                 const float* reference, const Transform& t, std::uint16_t* out,
                                 std::int64_t out_stride, float* sum) {
  constexpr auto kF = Storage::kFloat;
  const Relative<true> low(load<kF>(reference)), high(load<kF>(reference + kLanes));
  Floats sums[2] = {};
  const auto ratio = [&](const Relative<true>& relative, const float* from, Floats& to)
                         __attribute__((always_inline)) {
                           const Floats z = load<kF>(from), e = two_to<false>(relative.exponent(z));
                           to += e;
                           if constexpr (F != Form::kCapped) return bits<Words>(e) + 0x8000u;
                           return bits<Words>(e * relative_slope<F>(z, t)) + 0x8000u;
                         };
  for (std::int64_t v = 0; v < rows; ++v) {
    const float* row = block + v * stride;
    const Words one = ratio(low, row, sums[0]), two = ratio(high, row + kLanes, sums[1]);
    typedef std::uint16_t Line __attribute__((vector_size(64)));
    constexpr Line kUpper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                             33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const Line narrow = __builtin_shuffle(bits<Line>(one), bits<Line>(two), kUpper);
    __builtin_memcpy(out + v * out_stride, &narrow, sizeof narrow);
  }
  store<kF>(sum, load<kF>(sum) + sums[0]);
  store<kF>(sum + kLanes, load<kF>(sum + kLanes) + sums[1]);
}

// Zeros behind `rows` entries of each row, so that whole steps of a product may read them.
DRRLHF_INLINE void fill_up(std::uint16_t* out, std::int64_t out_stride, std::int64_t rows,
                           std::int64_t columns) {
  const std::int64_t to = (rows + kDepthStep - 1) / kDepthStep * kDepthStep;
  for (std::int64_t j = 0; rows < to && j < columns; ++j) {
    for (std::int64_t v = rows; v < to; ++v) out[j * out_stride + v] = 0;
  }
}

template <Form F, bool Transposed>
void tile_ratios_as(float* tile, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                    std::int64_t tokens, std::int64_t first, const std::int64_t* labels,
                    const Transform& t, const float* reference, float* sum, float* label_z,
                    float* label_slope, std::uint16_t* out, std::int64_t out_stride) {
  constexpr auto kF = Storage::kFloat;
  const auto each_label = [&](const auto& f) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const std::int64_t v = labels[j] - first;
      if (v >= 0 && v < rows) f(v, j);
    }
  };
  each_label([&](std::int64_t v, std::int64_t j) {
    float& z = tile[v * stride + j];
    label_z[j] = z;
    label_slope[j] = relative_slope<F>(all(z), t)[0];
    z = -kInfinityF;
  });
  const std::int64_t by_token = Transposed ? out_stride : 1;
  std::int64_t j = 0;
  for (; !Transposed && j + 2 * kLanes <= tokens; j += 2 * kLanes) {
    ratios_of_two<F>(tile + j, stride, rows, reference + j, t, out + j, out_stride, sum + j);
  }
  for (; j < columns; j += kLanes) {
    const std::int64_t left = tokens - j < kLanes ? tokens - j : kLanes;
    const Floats by = load<kF>(reference + j);
    std::uint16_t* to = out + j * by_token;
    const Floats added = rows % kLanes == 0
                             ? ratios_of_columns<F, Transposed, true>(tile + j, stride, rows, by, t,
                                                                      to, out_stride, left)
                             : ratios_of_columns<F, Transposed, false>(tile + j, stride, rows, by,
                                                                       t, to, out_stride, left);
    store<kF>(sum + j, load<kF>(sum + j) + added);
  }
  // The slope at -infinity is no number.
  each_label([&](std::int64_t v, std::int64_t j) {
    out[j * by_token + v * (Transposed ? 1 : out_stride)] = 0;
  });
  if constexpr (Transposed) fill_up(out, out_stride, rows, tokens);
}

void transpose(const std::uint16_t* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               std::uint16_t* out, std::int64_t out_stride) {
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const std::int64_t left = columns - j < kLanes ? columns - j : kLanes;
    for (std::int64_t v = 0; v < rows; v += kLanes) {
      Words words[8] = {};
      for (int i = 0; i < kLanes && v + i < rows; ++i) {
        Shorts row = {};
        const std::uint16_t* from = x + (v + i) * stride + j;
        if (left == kLanes) {
          __builtin_memcpy(&row, from, sizeof row);
        } else {
          __builtin_memcpy(&row, from, left * sizeof *from);
        }
        words[i / 2] |= __builtin_convertvector(row, Words) << (i % 2 * 16);
      }
      store_transposed(words, out + j * out_stride + v, out_stride, left);
    }
  }
  fill_up(out, out_stride, rows, columns);
}
#endif

inline Form form_of(const Transform& t) {
  if (t.softcap != 0) return Form::kCapped;
  return t.scale * t.inverse_temperature == 1.0f ? Form::kIdentity : Form::kScaled;
}

// Calls f with the form as a constant.
template <class F>
DRRLHF_INLINE void with_form(const Transform& t, F f) {
  switch (form_of(t)) {
    case Form::kIdentity:
      return f(std::integral_constant<Form, Form::kIdentity>());
    case Form::kScaled:
      return f(std::integral_constant<Form, Form::kScaled>());
    case Form::kCapped:
      return f(std::integral_constant<Form, Form::kCapped>());
  }
}

template <class F>
DRRLHF_INLINE void with_storage(Storage storage, F f) {
  switch (storage) {
    case Storage::kFloat:
      return f(std::integral_constant<Storage, Storage::kFloat>());
    case Storage::kBFloat16:
      return f(std::integral_constant<Storage, Storage::kBFloat16>());
    case Storage::kHalf:
      return f(std::integral_constant<Storage, Storage::kHalf>());
  }
}

void fold_row(const void* x, Storage storage, std::int64_t n, std::int64_t label,
              const Transform& t, bool extras, Others& o, float& label_z) {
  with_storage(storage, [&](auto s) {
    with_form(t, [&](auto f) {
      extras ? fold_row_as<s(), f(), true>(x, n, label, t, o, label_z)
             : fold_row_as<s(), f(), false>(x, n, label, t, o, label_z);
    });
  });
}

void row_gradient(const void* x, void* out, Storage storage, std::int64_t n, std::int64_t label,
                  const Transform& t, const RowCoefficients& c) {
  with_storage(storage, [&](auto s) {
    with_form(t, [&](auto f) { row_gradient_as<s(), f()>(x, out, n, label, t, c); });
  });
}

void transform_tile(float* tile, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                    const float* bias, const Transform& t) {
  with_form(t, [&](auto f) { transform_tile_as<f()>(tile, stride, rows, columns, bias, t); });
}

void fold_tile(float* tile, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               std::int64_t first, const std::int64_t* labels, const OthersOfColumns& o,
               float* label_z) {
  o.index != nullptr ? fold_tile_as<true>(tile, stride, rows, columns, first, labels, o, label_z)
                     : fold_tile_as<false>(tile, stride, rows, columns, first, labels, o, label_z);
}

void tile_gradient(const float* tile, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                   std::int64_t first, const std::int64_t* labels, const Transform& t,
                   const ColumnCoefficients& c, void* out, std::int64_t out_stride, Storage storage,
                   float* scratch) {
  with_storage(storage, [&](auto s) {
    with_form(t, [&](auto f) {
      tile_gradient_as<s(), f()>(tile, stride, rows, columns, first, labels, t, c, out, out_stride,
                                 scratch);
    });
  });
}

void tile_ratios(float* tile, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                 std::int64_t tokens, std::int64_t first, const std::int64_t* labels,
                 const Transform& t, const float* reference, float* sum, float* label_z,
                 float* label_slope, std::uint16_t* out, std::int64_t out_stride, bool transposed) {
#if DRRLHF_LANES == 16
  with_form(t, [&](auto f) {
    transposed ? tile_ratios_as<f(), true>(tile, stride, rows, columns, tokens, first, labels, t,
                                           reference, sum, label_z, label_slope, out, out_stride)
               : tile_ratios_as<f(), false>(tile, stride, rows, columns, tokens, first, labels, t,
                                            reference, sum, label_z, label_slope, out, out_stride);
  });
#else
  (void)tile, (void)stride, (void)rows, (void)columns, (void)tokens, (void)first, (void)labels;
  (void)t, (void)reference, (void)sum, (void)label_z, (void)label_slope, (void)out;
  (void)out_stride, (void)transposed;
  __builtin_trap();  // asked for only beside AVX512-BF16 products
#endif
}

#if DRRLHF_LANES != 16
void transpose(const std::uint16_t*, std::int64_t, std::int64_t, std::int64_t, std::uint16_t*,
               std::int64_t) {
  __builtin_trap();  // as above
}
#endif

void scale_row(const void* x, void* out, Storage storage, std::int64_t n, float factor) {
  with_storage(storage, [&](auto s) {
    using T = typename Element<s()>::Type;
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(out);
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store<s()>(to + i, load<s()>(from + i) * factor);
    if (i < n) store_part<s()>(to + i, n - i, load_part<s()>(from + i, n - i, 0.0f) * factor);
  });
}

void narrow_row(const float* x, void* out, Storage storage, std::int64_t n) {
  with_storage(storage, [&](auto s) {
    auto* to = static_cast<typename Element<s()>::Type*>(out);
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store<s()>(to + i, load<Storage::kFloat>(x + i));
    if (i < n) store_part<s()>(to + i, n - i, load_part<Storage::kFloat>(x + i, n - i, 0.0f));
  });
}

constexpr SoftmaxKernels kKernels = {kLanes,    fold_row,      row_gradient, transform_tile,
                                     fold_tile, tile_gradient, tile_ratios,  transpose,
                                     scale_row, narrow_row};
