#include "policy_loss.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "../message.h"
#include "sequences.h"
#include "vectorised.h"

namespace drrlhf::cpu {
namespace {

constexpr std::int64_t kBlock = 128;      // tokens that are worked on before they are summed
constexpr std::int64_t kGrain = 1 << 13;  // tokens that are worth a thread

// Tokens of one sequence; null where there are none. float or double.
template <class T>
struct Tokens {
  const T *logps, *old_logps, *ref_logps, *entropy;
  const bool* mask;
  T* slopes;
};

template <class T>
DRRLHF_HD Tokens<T> from(const Tokens<T>& t, std::int64_t i) {
  const auto at = [i](auto* p) { return p == nullptr ? p : p + i; };
  return {at(t.logps), at(t.old_logps), at(t.ref_logps), at(t.entropy), at(t.mask), at(t.slopes)};
}

// One past the last of n tokens that counts: padding is mostly at the end.
std::int64_t counted_until(const bool* mask, std::int64_t n) {
  if (mask == nullptr) return n;
  while (n > 0 && !mask[n - 1]) --n;
  return n;
}

template <class T>
DRRLHF_HD void count(const Tokens<T>& t, std::int64_t n, T* counted) {
  if (t.mask == nullptr) {
    for (std::int64_t i = 0; i < n; ++i) counted[i] = T(1);
  } else {
    for (std::int64_t i = 0; i < n; ++i) counted[i] = t.mask[i] ? T(1) : T(0);
  }
}

// log r of n tokens, counted or not.
template <class T>
DRRLHF_HD void log_ratios(const Tokens<T>& t, std::int64_t n, T* log_ratio) {
  if (t.old_logps == nullptr) {
    for (std::int64_t i = 0; i < n; ++i) log_ratio[i] = T(0);
  } else {
    for (std::int64_t i = 0; i < n; ++i) log_ratio[i] = t.logps[i] - t.old_logps[i];
  }
}

constexpr int kWidth = 16;  // independent chains of a sum

// Sum of the counted entries of x (kBlock,), whose entries from n on are not read.
template <class T>
DRRLHF_HD double sum(const T* x, const T* counted, std::int64_t n) {
  T lanes[kWidth] = {};
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    for (int j = 0; j < kWidth; ++j) lanes[j] += select(counted[i + j] != 0, x[i + j], T(0));
  }
  for (int j = 0; i < n; ++i, ++j) lanes[j] += select(counted[i] != 0, x[i], T(0));
  double total = 0;
  for (int j = 0; j < kWidth; ++j) total += double(lanes[j]);
  return total;
}

template <class T>
struct Work {
  T counted[kBlock], log_ratio[kBlock], loss[kBlock], slope[kBlock], ratio[kBlock], low[kBlock],
      high[kBlock], over[kBlock], divergence[kBlock];
};

// The sums (kSequenceSums) of one sequence of n tokens, and its slopes.
template <class T>
DRRLHF_HD void sum_sequence(const Tokens<T>& t, std::int64_t n, T advantage,
                            const PolicyOptions& options, double* sums) {
  const T low = T(1.0 - options.clip_low), high = T(1.0 + options.clip_high);
  const T kl_beta = T(options.kl_beta);
  // Numbers, for a comparison of them vectorises: whether the divergence is weighed by the ratio,
  // and whether a token's own ratio takes a gradient from it.
  const T corrected = options.correct_kl ? T(1) : T(0);
  const T of_tokens = options.by_sequence ? T(0) : corrected;
  Work<T> w;
  for (int k = 0; k < kSequenceSums; ++k) sums[k] = 0;
  Surrogate<T> whole = {};
  if (options.by_sequence) {
    double total = 0, tokens = 0;
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
      const std::int64_t size = n - begin < kBlock ? n - begin : kBlock;
      const Tokens<T> block = from(t, begin);
      count(block, size, w.counted);
      log_ratios(block, size, w.log_ratio);
      total += sum(w.log_ratio, w.counted, size);
      tokens += sum(w.counted, w.counted, size);
    }
    whole = clipped_surrogate(T(total / (tokens > 1 ? tokens : 1.0)), advantage, low, high);
  }
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const Tokens<T> block = from(t, begin);
    count(block, size, w.counted);
    if (options.by_sequence) {
      for (std::int64_t i = 0; i < size; ++i) {
        w.slope[i] = whole.slope;
        w.ratio[i] = whole.ratio;
        w.over[i] = whole.overflowed;
      }
    } else {
      log_ratios(block, size, w.log_ratio);
      for (std::int64_t i = 0; i < size; ++i) {
        const Surrogate<T> s = clipped_surrogate(w.log_ratio[i], advantage, low, high);
        w.loss[i] = s.loss;
        w.slope[i] = s.slope;
        w.ratio[i] = s.ratio;
        w.low[i] = s.low_clipped;
        w.high[i] = s.high_clipped;
        w.over[i] = s.overflowed;
      }
      sums[kSurrogate] += sum(w.loss, w.counted, size);
      sums[kRatio] += sum(w.ratio, w.counted, size);
      sums[kLowClipped] += sum(w.low, w.counted, size);
      sums[kHighClipped] += sum(w.high, w.counted, size);
    }
    if (block.ref_logps != nullptr) {
      for (std::int64_t i = 0; i < size; ++i) {
        const K3<T> d = k3_divergence(block.ref_logps[i] - block.logps[i]);
        // Selected, not multiplied by 0: a ratio or a divergence may be infinite.
        const T r = select(corrected != 0, w.ratio[i], T(1));
        const T own = select(w.over[i] > 0, T(0), of_tokens);
        const T by_ratio = select(own != 0, r * d.value, T(0));
        w.divergence[i] = r * d.value;
        // Not 0 times infinity where nobody asked for the divergence.
        w.slope[i] += select(kl_beta != 0, kl_beta * (r * d.slope + by_ratio), T(0));
        w.over[i] = d.overflowed > 0 ? d.overflowed : w.over[i];
      }
      sums[kK3Sum] += sum(w.divergence, w.counted, size);
    }
    if (block.entropy != nullptr) sums[kEntropySum] += sum(block.entropy, w.counted, size);
    for (std::int64_t i = 0; i < size; ++i) {
      block.slopes[i] = w.counted[i] != 0 ? w.slope[i] : T(0);
    }
    sums[kOverflowed] += sum(w.over, w.counted, size);
    sums[kTokens] += sum(w.counted, w.counted, size);
  }
  if (options.by_sequence && sums[kTokens] > 0) {
    sums[kSurrogate] = sums[kTokens] * double(whole.loss);
    sums[kRatio] = sums[kTokens] * double(whole.ratio);
    sums[kLowClipped] = sums[kTokens] * double(whole.low_clipped);
    sums[kHighClipped] = sums[kTokens] * double(whole.high_clipped);
    if (kl_beta != 0 && options.correct_kl && t.ref_logps != nullptr && !(whole.overflowed > 0)) {
      // Every token moves the ratio, which multiplies the divergence of all of them.
      const T by_ratio = T(options.kl_beta * sums[kK3Sum] / sums[kTokens]);
      for (std::int64_t i = 0; i < n; ++i) {
        t.slopes[i] += t.mask == nullptr || t.mask[i] ? by_ratio : T(0);
      }
    }
  }
}

// Calls f(s, begin, n) for each sequence s and its n tokens from `begin` on, in parallel.
template <class F>
void each_sequence(const Sequences& sequences, std::int64_t tokens, const F& f) {
  const std::int64_t each = tokens / (sequences.count > 0 ? sequences.count : 1) + 1;
  at::parallel_for(0, sequences.count, kGrain / each + 1,
                   [&](std::int64_t first, std::int64_t last) {
                     for (std::int64_t s = first; s < last; ++s) {
                       const std::int64_t begin = sequences.begin(s);
                       f(s, begin, sequences.begin(s + 1) - begin);
                     }
                   });
}

template <class T>
const T* pointer(const OptionalTensor& x) {
  return x.has_value() ? x->template const_data_ptr<T>() : nullptr;
}

template <class T>
PolicySums sums_of(const PolicyTokens& given, const Tensor& advantages,
                   const PolicyOptions& options, const Sequences& sequences) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  const auto load = [&](const OptionalTensor& x, at::ScalarType as) -> OptionalTensor {
    return x.has_value() ? OptionalTensor(x->to(as).contiguous()) : std::nullopt;
  };
  const Tensor logps = given.logps.to(type).contiguous();
  const OptionalTensor old_logps = load(given.old_logps, type), ref = load(given.ref_logps, type),
                       entropy = load(given.entropy, type), mask = load(given.mask, at::kBool);
  PolicySums out = {at::empty({kSequenceSums, sequences.count}, at::kDouble),
                    at::empty(given.logps.sizes(), type)};
  const Tokens<T> tokens = {logps.const_data_ptr<T>(), pointer<T>(old_logps),
                            pointer<T>(ref),           pointer<T>(entropy),
                            pointer<bool>(mask),       out.slopes.mutable_data_ptr<T>()};
  const double* advantage = advantages.const_data_ptr<double>();
  double* table = out.table.mutable_data_ptr<double>();
  each_sequence(sequences, logps.numel(), [&](std::int64_t s, std::int64_t begin, std::int64_t n) {
    double sums[kSequenceSums];
    const Tokens<T> mine = from(tokens, begin);
    const std::int64_t used = counted_until(mine.mask, n);
    vectorised(
        [=, a = T(advantage[s]), into = &sums[0]] { sum_sequence(mine, used, a, options, into); });
    std::fill(mine.slopes + used, mine.slopes + n, T(0));
    for (int k = 0; k < kSequenceSums; ++k) table[k * sequences.count + s] = sums[k];
  });
  return out;
}

template <class T>
Tensor scaled_slopes(const Tensor& slopes, const Tensor& factors, const Sequences& sequences) {
  Tensor out = at::empty(slopes.sizes(), slopes.options());
  const T *from = slopes.const_data_ptr<T>(), *factor = factors.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  each_sequence(sequences, slopes.numel(), [&](std::int64_t s, std::int64_t begin, std::int64_t n) {
    if (factor[s] == 0) {
      std::fill_n(to + begin, n, T(0));
    } else {
      scaled(from + begin, n, factor[s], to + begin);
    }
  });
  return out;
}

}  // namespace

PolicySums policy_sums(const PolicyTokens& tokens, const Tensor& advantages,
                       const PolicyOptions& options) {
  const Sequences sequences("logps", tokens.logps, tokens.cu_seqlens);
  DRRLHF_CHECK_VALUE(tokens.logps.device().is_cpu() && advantages.numel() == sequences.count,
                     "advantages: expected shape (", sequences.count, "), got ",
                     advantages.sizes());
  for (const auto* x : {&tokens.old_logps, &tokens.ref_logps, &tokens.entropy, &tokens.mask}) {
    DRRLHF_CHECK_VALUE(
        !x->has_value() || ((*x)->device().is_cpu() && (*x)->sizes() == tokens.logps.sizes()),
        "policy_loss: expected CPU tensors of shape ", tokens.logps.sizes(), " as logps");
  }
  if (tokens.logps.scalar_type() == at::kDouble) {
    return sums_of<double>(tokens, advantages, options, sequences);
  }
  return sums_of<float>(tokens, advantages, options, sequences);
}

Tensor policy_loss_backward(const Tensor& grad, const Tensor& slopes,
                            const OptionalTensor& cu_seqlens) {
  const Sequences sequences("slopes", slopes, cu_seqlens);
  DRRLHF_CHECK_VALUE(slopes.device().is_cpu() && grad.numel() == sequences.count,
                     "grad: expected shape (", sequences.count, "), got ", grad.sizes());
  const Tensor factors = grad.to(slopes.scalar_type()).contiguous();
  if (slopes.scalar_type() == at::kDouble) {
    return scaled_slopes<double>(slopes.contiguous(), factors, sequences);
  }
  return scaled_slopes<float>(slopes.contiguous(), factors, sequences);
}

}  // namespace drrlhf::cpu
