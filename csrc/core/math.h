// Elementary functions in the form that the losses need: accurate where the plain expression
// cancels, free of branches where a loop should vectorise.
#pragma once

#include "platform.h"

namespace drrlhf {

constexpr double kInfinity = __builtin_huge_val(), kNan = __builtin_nan("");

DRRLHF_HD double bits_to_double(std::uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DRRLHF_HD std::uint64_t double_to_bits(double value) {
  std::uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// One of two numbers that are both there. What a sum reads must not be read under a condition: see
// FACTS.md.
template <class T>
DRRLHF_HD T select(bool first, T one, T other) {
  return first ? one : other;
}

// exp(x) = 2^k (1 + tail) with |x - k log 2| <= log(2)/2; tail = expm1 of the remainder.
template <class T>
struct ExpPartsOf {
  T scale, tail;
};
using ExpParts = ExpPartsOf<double>;

// x in [-745, 700]. Error of 1 + tail: about one unit in the last place.
DRRLHF_HD ExpParts exp_parts(double x) {
  // Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits.
  constexpr double kShift = 6755399441055744.0;
  constexpr double kLog2e = 1.4426950408889634074;
  constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  const double shifted = x * kLog2e + kShift;
  const double k = shifted - kShift;
  const double r = (x - k * kLn2High) - k * kLn2Low;
  // Taylor to r^13 / 13!: the remainder is below 2^-53 for |r| <= log(2)/2.
  double s = 1.6059043836821613e-10;
  s = s * r + 2.08767569878681e-09;
  s = s * r + 2.505210838544172e-08;
  s = s * r + 2.755731922398589e-07;
  s = s * r + 2.7557319223985893e-06;
  s = s * r + 2.48015873015873e-05;
  s = s * r + 1.984126984126984e-04;
  s = s * r + 1.388888888888889e-03;
  s = s * r + 8.333333333333333e-03;
  s = s * r + 4.1666666666666664e-02;
  s = s * r + 1.6666666666666666e-01;
  s = s * r + 0.5;
  const double tail = r + r * r * s;
  // 2^k, where the low bits of `shifted` hold k.
  const std::uint64_t exponent = (double_to_bits(shifted) + 1023) << 52;
  return {bits_to_double(exponent), tail};
}

// The same in float32, x in [-87, 87].
DRRLHF_HD ExpPartsOf<float> exp_parts(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723212e-6f;
  const float shifted = x * 1.44269504f + kShift;
  const float k = shifted - kShift;
  const float r = (x - k * kLn2High) - k * kLn2Low;
  // Taylor to r^7 / 7!: the remainder is below 2^-27 for |r| <= log(2)/2.
  float s = 1.98412698e-4f;
  s = s * r + 1.38888889e-3f;
  s = s * r + 8.33333333e-3f;
  s = s * r + 4.16666667e-2f;
  s = s * r + 1.66666667e-1f;
  s = s * r + 0.5f;
  const float tail = r + r * r * s;
  std::uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return {scale, tail};
}

// exp(x) for x <= 0; 0 from -708 on, where only subnormal numbers are left.
DRRLHF_HD double exp_nonpositive(double x) {
  const ExpParts e = exp_parts(x < -708.0 ? -708.0 : x);
  const double value = e.scale + e.scale * e.tail;
  return x < -708.0 ? 0.0 : value;
}

// exp(x) - 1 for -0.34 <= x <= 0, without cancellation.
DRRLHF_HD double expm1_small(double x) { return exp_parts(x).tail; }

// log(1 + exp(x)) = -log sigmoid(-x).
DRRLHF_HD double softplus(double x) { return (x > 0 ? x : 0.0) + log1p(exp(x > 0 ? -x : x)); }

DRRLHF_HD double sigmoid(double x) {
  const double e = exp(x > 0 ? -x : x);
  return (x > 0 ? 1.0 : e) / (1.0 + e);
}

}  // namespace drrlhf
