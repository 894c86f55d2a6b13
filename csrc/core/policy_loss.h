// The clipped surrogate of one token and its k3 divergence, with derivatives. Definition and
// sources: drrlhf/reference.py.
#pragma once

#include "math.h"

namespace drrlhf {

// In the order of the names in drrlhf/reference.py.
enum class PolicyLossType { kGrpo, kBnpo, kDrGrpo, kDapo };

struct PolicyOptions {
  PolicyLossType loss_type;
  bool by_sequence;  // one ratio for a sequence, the geometric mean of its tokens'
  double clip_low, clip_high, kl_beta, max_completion_length;
};

// Rows of the table of sequences.
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

struct Surrogate {
  double loss, slope, ratio, low_clipped, high_clipped, overflowed;
};

// exp(x), for a log-ratio that is at most kExponentLimit; NaN for NaN, 0 for -infinity.
DRRLHF_HD double exp_bounded(double x) {
  const ExpParts e = exp_parts(x < -708.0 ? -708.0 : x);
  const double value = e.scale + e.scale * e.tail;
  return x < -708.0 ? 0.0 : value;
}

DRRLHF_HD Surrogate clipped_surrogate(double log_ratio, double advantage, double low, double high) {
  const bool over = log_ratio > kExponentLimit;
  const double ratio = exp_bounded(over ? kExponentLimit : log_ratio);
  const double clipped = ratio < low ? low : (ratio > high ? high : ratio);
  const double free = ratio * advantage, held = clipped * advantage;
  const double least = free < held ? free : held;
  const bool low_clipped = ratio < low && advantage < 0;
  const bool high_clipped = ratio > high && advantage > 0;
  const bool still = low_clipped || high_clipped || over || advantage == 0;
  return {advantage == 0 ? 0.0 * ratio : -least,  // a ratio of NaN must be seen
          still ? 0.0 : -free,
          ratio,
          low_clipped ? 1.0 : 0.0,
          high_clipped ? 1.0 : 0.0,
          over ? 1.0 : 0.0};
}

struct K3 {
  double value, slope, overflowed;
};

// exp(d) - d - 1 of d = log p_ref - log p, and its derivative by log p.
DRRLHF_HD K3 k3_divergence(double difference) {
  const bool over = difference > kExponentLimit;
  const double d = over ? kExponentLimit : difference;
  const ExpParts e = exp_parts(d < -708.0 ? -708.0 : d);
  const double grown = d < -708.0 ? -1.0 : (e.scale - 1.0) + e.scale * e.tail;  // expm1(d)
  // What expm1(d) - d cancels is the series' square and above, which exp_parts would not keep.
  double s = 1.6059043836821613e-10;
  s = s * d + 2.08767569878681e-09;
  s = s * d + 2.505210838544172e-08;
  s = s * d + 2.755731922398589e-07;
  s = s * d + 2.7557319223985893e-06;
  s = s * d + 2.48015873015873e-05;
  s = s * d + 1.984126984126984e-04;
  s = s * d + 1.388888888888889e-03;
  s = s * d + 8.333333333333333e-03;
  s = s * d + 4.1666666666666664e-02;
  s = s * d + 1.6666666666666666e-01;
  s = s * d + 0.5;
  const bool small = d > -0.34 && d < 0.34;
  return {small ? d * d * s : grown - d, over ? 0.0 : -grown, over ? 1.0 : 0.0};
}

}  // namespace drrlhf
