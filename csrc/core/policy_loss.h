// The clipped surrogate of one token and its k3 divergence, with derivatives. Definition and
// sources: drrlhf/reference/policy_loss.py.
#pragma once

#include "math.h"

namespace drrlhf {

struct PolicyOptions {
  bool by_sequence;  // one ratio for a sequence, the geometric mean of its tokens'
  double clip_low, clip_high, kl_beta;
  bool correct_kl;  // the divergence times the ratio
};

// Rows of the table of sequences: SequenceStatistics in drrlhf/conventions.py.
enum SequenceSum {
  kTokens,
  kSurrogate,
  kK3Sum,
  kRatio,
  kLowClipped,
  kHighClipped,
  kOverflowed,
  kEntropySum,
  kSequenceSums
};

// Larger exponents are clamped, without gradient, and counted.
constexpr double kExponentLimit = 40.0;

// Below this, exp(x) is taken as 0.
template <class T>
constexpr T kExponentFloor = sizeof(T) == 4 ? T(-87) : T(-708);

template <class T>
struct Surrogate {
  T loss, slope, ratio, low_clipped, high_clipped, overflowed;
};

// Of r = exp(log_ratio): -min(r A, clip(r) A), its derivative by log r, r, and 1 where r was
// clipped low, clipped high, clamped. Without branches, so that a loop over tokens vectorises. A
// NaN stays one.
template <class T>
DRRLHF_HD Surrogate<T> clipped_surrogate(T log_ratio, T advantage, T low, T high) {
  const T limit = T(kExponentLimit), floor = kExponentFloor<T>;
  const T negative = advantage < 0 ? T(1) : T(0), positive = advantage > 0 ? T(1) : T(0);
  const T over = log_ratio > limit ? T(1) : T(0);
  const T exponent = log_ratio > limit ? limit : log_ratio;
  const ExpPartsOf<T> e = exp_parts(exponent < floor ? floor : exponent);
  const T power = e.scale + e.scale * e.tail;
  const T ratio = exponent < floor ? T(0) : power;
  const T raised = ratio < low ? low : ratio;
  const T clipped = raised > high ? high : raised;
  const T free = ratio * advantage, held = clipped * advantage;
  const T low_clipped = ratio < low ? negative : T(0);
  const T high_clipped = ratio > high ? positive : T(0);
  return {-(free < held ? free : held),
          low_clipped + high_clipped + over > 0 ? T(0) : -free,
          ratio,
          low_clipped,
          high_clipped,
          over};
}

template <class T>
struct K3 {
  T value, slope, overflowed;
};

// exp(d) - d - 1 of d = log p_ref - log p, and its derivative by log p.
template <class T>
DRRLHF_HD K3<T> k3_divergence(T difference) {
  const T limit = T(kExponentLimit), floor = kExponentFloor<T>;
  const T d = difference > limit ? limit : difference;
  const ExpPartsOf<T> e = exp_parts(d < floor ? floor : d);
  const T parts = (e.scale - T(1)) + e.scale * e.tail;
  const T grown = d < floor ? T(-1) : parts;  // expm1(d)
  // Where expm1(d) - d would cancel: the series from its square on, to the last digit of a double.
  T s = T(1.6059043836821613e-10);
  if (sizeof(T) == 8) {
    s = s * d + T(2.08767569878681e-09);
    s = s * d + T(2.505210838544172e-08);
    s = s * d + T(2.755731922398589e-07);
    s = s * d + T(2.7557319223985893e-06);
    s = s * d + T(2.48015873015873e-05);
  } else {
    s = T(2.48015873015873e-05);
  }
  s = s * d + T(1.984126984126984e-04);
  s = s * d + T(1.388888888888889e-03);
  s = s * d + T(8.333333333333333e-03);
  s = s * d + T(4.1666666666666664e-02);
  s = s * d + T(1.6666666666666666e-01);
  s = s * d + T(0.5);
  const T series = d * d * s, plain = grown - d, size = d < 0 ? -d : d;
  return {size < T(0.34) ? series : plain, difference > limit ? T(0) : -grown,
          difference > limit ? T(1) : T(0)};
}

}  // namespace drrlhf
