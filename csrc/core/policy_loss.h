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

// Without branches, so that a loop over tokens vectorises. A NaN stays one.
DRRLHF_HD Surrogate clipped_surrogate(double log_ratio, double advantage, double low, double high) {
  const double negative = advantage < 0 ? 1.0 : 0.0, positive = advantage > 0 ? 1.0 : 0.0;
  const double over = log_ratio > kExponentLimit ? 1.0 : 0.0;
  const double ratio = exp_bounded(log_ratio > kExponentLimit ? kExponentLimit : log_ratio);
  const double raised = ratio < low ? low : ratio;
  const double clipped = raised > high ? high : raised;
  const double free = ratio * advantage, held = clipped * advantage;
  const double low_clipped = ratio < low ? negative : 0.0;
  const double high_clipped = ratio > high ? positive : 0.0;
  return {-(free < held ? free : held),
          low_clipped + high_clipped + over > 0 ? 0.0 : -free,
          ratio,
          low_clipped,
          high_clipped,
          over};
}

struct K3 {
  double value, slope, overflowed;
};

// exp(d) - d - 1 of d = log p_ref - log p, and its derivative by log p.
DRRLHF_HD K3 k3_divergence(double difference) {
  const double d = difference > kExponentLimit ? kExponentLimit : difference;
  const ExpParts e = exp_parts(d < -708.0 ? -708.0 : d);
  const double parts = (e.scale - 1.0) + e.scale * e.tail;
  const double grown = d < -708.0 ? -1.0 : parts;  // expm1(d)
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
  const double series = d * d * s, plain = grown - d;
  return {fabs(d) < 0.34 ? series : plain, difference > kExponentLimit ? 0.0 : -grown,
          difference > kExponentLimit ? 1.0 : 0.0};
}

}  // namespace drrlhf
