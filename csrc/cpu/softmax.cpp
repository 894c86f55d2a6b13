#include "softmax.h"

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "vectorised.h"

#ifdef DRRLHF_MULTIVERSIONED
#include <immintrin.h>
#endif

#define DRRLHF_INLINE inline __attribute__((always_inline))

namespace drrlhf::cpu {
namespace {
constexpr float kInfinityF = __builtin_huge_valf();
}

void merge(Others& into, const Others& from) {
  const bool earlier = from.index >= 0 && (into.index < 0 || from.index < into.index);
  if (from.top > into.top || (from.top == into.top && earlier)) into.index = from.index;
  into.top = from.top > into.top ? from.top : into.top;
  into.total += from.total;
  if (into.sum == 0) {
    into.reference = from.reference;
    into.sum = from.sum;
    into.shifted = from.shifted;
    into.squares = from.squares;
  } else if (from.sum != 0) {
    const double d = static_cast<double>(from.reference) - into.reference;
    const double keep = d > 0 ? std::exp(-d) : 1, take = d > 0 ? 1 : std::exp(d);
    const double up = d > 0 ? d : 0, down = d > 0 ? 0 : d;
    into.shifted = (keep == 0 ? 0 : (into.shifted - into.sum * up) * keep) +
                   (take == 0 ? 0 : (from.shifted + from.sum * down) * take);
    into.sum = into.sum * keep + from.sum * take;
    into.squares = into.squares * keep * keep + from.squares * take * take;
    into.reference = d > 0 ? from.reference : into.reference;
  }
}

namespace baseline {
namespace {
#define DRRLHF_LANES 4
#include "softmax_kernels.inc"
#undef DRRLHF_LANES
}  // namespace
}  // namespace baseline

#ifdef DRRLHF_MULTIVERSIONED

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
namespace {
#define DRRLHF_LANES 8
#include "softmax_kernels.inc"
#undef DRRLHF_LANES
}  // namespace
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace avx512 {
namespace {
#define DRRLHF_LANES 16
#include "softmax_kernels.inc"
#undef DRRLHF_LANES
}  // namespace
}  // namespace avx512
#pragma GCC pop_options

#endif

const SoftmaxKernels& softmax_kernels() {
#ifdef DRRLHF_MULTIVERSIONED
  switch (widest_vectors()) {
    case Vectors::kAvx512:
      return avx512::kKernels;
    case Vectors::kAvx2:
      return avx2::kKernels;
    case Vectors::kBaseline:
      break;
  }
#endif
  return baseline::kKernels;
}

TokenStatistics finish(const Others& o, float label_z, std::int64_t label, std::int64_t n) {
  TokenStatistics s;
  const double d = static_cast<double>(label_z) - o.reference;
  const double others = o.sum == 0 ? 0 : o.sum * std::exp(-d);  // relative to the label's own
  double log_sum, logp, sum, shifted, squares;
  if (others < 1) {
    log_sum = std::log1p(others);
    logp = -log_sum;
    sum = 1 + others;
    shifted = others == 0 ? 0 : (o.shifted - o.sum * d) * std::exp(-d);
    squares = 1 + o.squares * std::exp(-d) * std::exp(-d);
  } else {
    const double e = std::exp(d);
    sum = o.sum + e;
    log_sum = std::log(sum);
    logp = d - log_sum;
    shifted = o.shifted + (e == 0 ? 0 : e * d);
    squares = o.squares + e * e;
  }
  s.logp = static_cast<float>(logp);
  // Log-sum-exp in two numbers. Of a huge logit even float64 would not hold the log of the sum.
  const double from = others < 1 ? label_z : o.reference;
  s.lse = static_cast<float>(from + log_sum);
  s.lse_tail = static_cast<float>((from - s.lse) + log_sum);
  s.entropy = static_cast<float>(log_sum - shifted / sum);
  s.log_sum_squares = static_cast<float>(std::log(squares) - 2 * log_sum);
  // What has no answer must stay seen: the label's own logit infinite, or every logit -infinity.
  if (label_z - label_z != 0 && (!(label_z < 0) || o.sum == 0))
    s.logp = s.lse = s.entropy = s.log_sum_squares = std::nanf("");
  s.mean = static_cast<float>(o.total / static_cast<double>(n));
  s.is_top1 = label_z > o.top || (label_z == o.top && label < o.index);
  return s;
}

}  // namespace drrlhf::cpu
