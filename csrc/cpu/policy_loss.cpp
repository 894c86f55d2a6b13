#include "policy_loss.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "../core/team.h"
#include "sequences.h"

namespace drrlhf {
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
Tokens<T> from(const Tokens<T>& t, std::int64_t i) {
  const auto at = [i](auto* p) { return p == nullptr ? p : p + i; };
  return {at(t.logps), at(t.old_logps), at(t.ref_logps), at(t.entropy), at(t.mask), at(t.slopes)};
}

// One past the last of n tokens that counts: padding is mostly at the end.
std::int64_t counted_until(const bool* mask, std::int64_t n) {
  if (mask == nullptr) return n;
  while (n > 0 && !mask[n - 1]) --n;
  return n;
}

// log r of n tokens, or 0 where they do not count, and how many count.
template <class T>
DRRLHF_HD void log_ratios(const Tokens<T>& t, std::int64_t n, double* log_ratio, double* counted) {
  for (std::int64_t i = 0; i < n; ++i) {
    counted[i] = t.mask == nullptr || t.mask[i] ? 1.0 : 0.0;
    const double x = t.old_logps == nullptr ? 0.0 : double(t.logps[i]) - double(t.old_logps[i]);
    log_ratio[i] = counted[i] != 0 ? x : 0.0;
  }
}

// The sums (kSequenceSums) of one sequence of n tokens, and its slopes.
template <class T>
DRRLHF_MULTIVERSION void one_sequence(const Tokens<T>& t, std::int64_t n, double advantage,
                                      const PolicyOptions& options, double* sums) {
  const double low = 1.0 - options.clip_low, high = 1.0 + options.clip_high;
  double log_ratio[kBlock], counted[kBlock], loss[kBlock], slope[kBlock], ratio[kBlock];
  double lower[kBlock], higher[kBlock], over[kBlock], divergence[kBlock], entropy[kBlock];
  for (int k = 0; k < kSequenceSums; ++k) sums[k] = 0;
  Surrogate whole = {};
  if (options.by_sequence) {
    double total = 0, count = 0;
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
      const std::int64_t size = n - begin < kBlock ? n - begin : kBlock;
      log_ratios(from(t, begin), size, log_ratio, counted);
      const Sums<2> part = SerialTeam{size}.template sum<2>(
          [&](std::int64_t i) { return Sums<2>{{log_ratio[i], counted[i]}}; });
      total += part.v[0];
      count += part.v[1];
    }
    whole = clipped_surrogate(total / (count > 1 ? count : 1.0), advantage, low, high);
  }
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const Tokens<T> block = from(t, begin);
    log_ratios(block, size, log_ratio, counted);
    if (options.by_sequence) {
      for (std::int64_t i = 0; i < size; ++i) {
        loss[i] = whole.loss;
        slope[i] = whole.slope;
        ratio[i] = whole.ratio;
        lower[i] = whole.low_clipped;
        higher[i] = whole.high_clipped;
        over[i] = whole.overflowed;
      }
    } else {
      for (std::int64_t i = 0; i < size; ++i) {
        const Surrogate s = clipped_surrogate(log_ratio[i], advantage, low, high);
        loss[i] = s.loss;
        slope[i] = s.slope;
        ratio[i] = s.ratio;
        lower[i] = s.low_clipped;
        higher[i] = s.high_clipped;
        over[i] = s.overflowed;
      }
    }
    for (std::int64_t i = 0; i < size; ++i) divergence[i] = entropy[i] = 0;
    if (block.ref_logps != nullptr) {
      for (std::int64_t i = 0; i < size; ++i) {
        const K3 d = k3_divergence(double(block.ref_logps[i]) - double(block.logps[i]));
        divergence[i] = d.value;
        slope[i] += options.kl_beta * d.slope;
        over[i] = over[i] > d.overflowed ? over[i] : d.overflowed;
      }
    }
    if (block.entropy != nullptr) {
      for (std::int64_t i = 0; i < size; ++i) entropy[i] = double(block.entropy[i]);
    }
    for (std::int64_t i = 0; i < size; ++i) {
      block.slopes[i] = counted[i] != 0 ? T(slope[i]) : T(0);
    }
    for (std::int64_t i = 0; i < size; ++i) {
      const bool in = counted[i] != 0;
      loss[i] = in ? loss[i] : 0.0;
      divergence[i] = in ? divergence[i] : 0.0;
      ratio[i] = in ? ratio[i] : 0.0;
      lower[i] = in ? lower[i] : 0.0;
      higher[i] = in ? higher[i] : 0.0;
      over[i] = in ? over[i] : 0.0;
      entropy[i] = in ? entropy[i] : 0.0;
    }
    const Sums<kSequenceSums> part = SerialTeam{size}.template sum<kSequenceSums>([&](auto i) {
      return Sums<kSequenceSums>{
          {counted[i], loss[i], divergence[i], ratio[i], lower[i], higher[i], over[i], entropy[i]}};
    });
    for (int k = 0; k < kSequenceSums; ++k) sums[k] += part.v[k];
  }
}

DRRLHF_MULTIVERSION void scale(const float* x, std::int64_t n, float factor, float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = factor * x[i];
}

DRRLHF_MULTIVERSION void scale(const double* x, std::int64_t n, double factor, double* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = factor * x[i];
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
  const std::int64_t each = logps.numel() / (sequences.count > 0 ? sequences.count : 1) + 1;
  at::parallel_for(
      0, sequences.count, kGrain / each + 1, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t s = first; s < last; ++s) {
          double sums[kSequenceSums];
          const std::int64_t begin = sequences.begin(s), n = sequences.begin(s + 1) - begin;
          const Tokens<T> mine = from(tokens, begin);
          const std::int64_t used = counted_until(mine.mask, n);
          one_sequence(mine, used, advantage[s], options, sums);
          std::fill(mine.slopes + used, mine.slopes + n, T(0));
          for (int k = 0; k < kSequenceSums; ++k) table[k * sequences.count + s] = sums[k];
        }
      });
  return out;
}

template <class T>
Tensor scaled(const Tensor& slopes, const Tensor& factors, const Sequences& sequences) {
  Tensor out = at::empty(slopes.sizes(), slopes.options());
  const T *from = slopes.const_data_ptr<T>(), *factor = factors.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const std::int64_t each = slopes.numel() / (sequences.count > 0 ? sequences.count : 1) + 1;
  at::parallel_for(
      0, sequences.count, kGrain / each + 1, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t s = first; s < last; ++s) {
          const std::int64_t begin = sequences.begin(s), n = sequences.begin(s + 1) - begin;
          if (factor[s] == 0) {
            std::fill_n(to + begin, n, T(0));
          } else {
            scale(from + begin, n, factor[s], to + begin);
          }
        }
      });
  return out;
}

}  // namespace

PolicySums policy_sums(const PolicyTokens& tokens, const Tensor& advantages,
                       const PolicyOptions& options) {
  const Sequences sequences("logps", tokens.logps, tokens.cu_seqlens);
  TORCH_CHECK_VALUE(tokens.logps.device().is_cpu() && advantages.numel() == sequences.count,
                    "advantages: expected shape (", sequences.count, "), got ", advantages.sizes());
  for (const auto* x : {&tokens.old_logps, &tokens.ref_logps, &tokens.entropy, &tokens.mask}) {
    TORCH_CHECK_VALUE(
        !x->has_value() || ((*x)->device().is_cpu() && (*x)->sizes() == tokens.logps.sizes()),
        "policy_loss: expected CPU tensors of shape ", tokens.logps.sizes(), " as logps");
  }
  if (tokens.logps.scalar_type() == at::kDouble) {
    return sums_of<double>(tokens, advantages, options, sequences);
  }
  return sums_of<float>(tokens, advantages, options, sequences);
}

Tensor policy_loss_backward(const Tensor& grad, const Tensor& slopes, const Tensor& coefficients,
                            const OptionalTensor& cu_seqlens) {
  const Sequences sequences("slopes", slopes, cu_seqlens);
  TORCH_CHECK_VALUE(slopes.device().is_cpu() && coefficients.numel() == sequences.count,
                    "coefficients: expected shape (", sequences.count, "), got ",
                    coefficients.sizes());
  const Tensor factors = (grad * coefficients).to(slopes.scalar_type()).contiguous();
  if (slopes.scalar_type() == at::kDouble) {
    return scaled<double>(slopes.contiguous(), factors, sequences);
  }
  return scaled<float>(slopes.contiguous(), factors, sequences);
}

}  // namespace drrlhf
