// The CPU side of the ops: argument checks, launches, and a report of the build. csrc/ops_cuda.cpp
// is the same for a GPU. The schemas of both stand in drrlhf/ops, where the ops are defined.
#include <ATen/ATen.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string_view>

#ifdef DRRLHF_CUDA
#include <cuda.h>  // CUDA_VERSION alone
#endif

#include "core/pair_losses.h"
#include "cpu/logprobs.h"
#include "cpu/memory.h"
#include "cpu/policy_loss.h"
#include "cpu/robust_risk.h"
#include "cpu/row_attention.h"
#include "cpu/row_worst_case.h"
#include "cpu/vectorised.h"
#include "message.h"
#include "names.h"

namespace drrlhf {
namespace {

using namespace cpu;

// (n,) as contiguous float64, checked against n.
Tensor load(const char* name, const Tensor& x, std::int64_t n) {
  DRRLHF_CHECK_VALUE(x.dim() == 1 && x.numel() == n, name, ": expected shape (", n, "), got ",
                     x.sizes());
  DRRLHF_CHECK_VALUE(x.device().is_cpu(), name, ": expected a CPU tensor, got ", x.device());
  return x.to(at::kDouble).contiguous();
}

OptionalTensor load(const char* name, const OptionalTensor& x, std::int64_t n) {
  return x.has_value() ? OptionalTensor(load(name, *x, n)) : std::nullopt;
}

const double* pointer(const OptionalTensor& x) {
  return x.has_value() ? x->const_data_ptr<double>() : nullptr;
}

// Owns what AdversaryArguments points to.
struct Adversary {
  OptionalTensor nominal;
  Tensor groups, group_weights;
  AdversaryArguments arguments;
};

Adversary load_adversary(const OptionalTensor& nominal, const OptionalTensor& groups,
                         const OptionalTensor& group_weights, std::int64_t n,
                         const Ambiguity& set) {
  Adversary result;
  result.nominal = load("nominal", nominal, n);
  if (result.nominal.has_value()) {
    const double* p = pointer(result.nominal);
    for (std::int64_t i = 0; i < n; ++i) {
      DRRLHF_CHECK_VALUE(p[i] >= 0 && p[i] < kInfinity,
                         "nominal: expected finite weights >= 0 (0 masks a pair), got ", p[i],
                         " at index ", i, "; drop or clamp it");
    }
  }
  auto& arguments = result.arguments;
  arguments = {set, pointer(result.nominal), nullptr, nullptr, 0};
  result.group_weights = at::empty({0}, at::kDouble);
  if (arguments.set.kind == Kind::kGroup) {
    DRRLHF_CHECK_VALUE(groups.has_value() && group_weights.has_value(),
                       "groups: Group needs group ids and group weights");
    DRRLHF_CHECK_VALUE(groups->dim() == 1 && groups->numel() == n, "groups: expected shape (", n,
                       "), got ", groups->sizes());
    result.groups = groups->to(at::kLong).contiguous();
    result.group_weights = group_weights->to(at::kDouble).clone();
    arguments.groups = result.groups.const_data_ptr<std::int64_t>();
    arguments.group_weights = result.group_weights.mutable_data_ptr<double>();
    arguments.num_groups = static_cast<int>(result.group_weights.numel());
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t g = arguments.groups[i];
      DRRLHF_CHECK_VALUE(g >= 0 && g < arguments.num_groups, "groups: expected ids in [0, ",
                         arguments.num_groups, ") for Group(num_groups=", arguments.num_groups,
                         "), got ", g, " at index ", i, "; raise num_groups or fix the column");
    }
  }
  return result;
}

// Beyond the dtype's range it is infinite, as in a tensor that is converted.
Tensor scalar(double value, at::ScalarType dtype) {
  return at::scalar_tensor(dtype == at::kFloat ? static_cast<float>(value) : value, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> robust_risk(
    const Tensor& losses, const OptionalTensor& nominal, const OptionalTensor& groups,
    const OptionalTensor& group_weights, std::string_view kind, double parameter,
    double temperature, double trim, bool update) {
  const std::int64_t n = losses.numel();
  const Tensor l = load("losses", losses, n);
  Adversary adversary = load_adversary(nominal, groups, group_weights, n,
                                       ambiguity(kind, parameter, temperature, trim, update));
  Tensor q = at::empty({n}, at::kDouble);
  const Solution s = robust_risk_cpu(l.const_data_ptr<double>(), n, adversary.arguments,
                                     q.mutable_data_ptr<double>());
  const auto dtype = statistics_dtype(losses);
  return {scalar(s.value, dtype), q.to(dtype), scalar(s.dual, dtype), adversary.group_weights};
}

NineTensors sequence_preference_loss(const Tensor& logps, const Tensor& labels,
                                     const OptionalTensor& cu_seqlens, const Tensor& ref_logps,
                                     const OptionalTensor& nominal, const OptionalTensor& groups,
                                     const OptionalTensor& group_weights, std::int64_t ignore_index,
                                     double beta, double label_smoothing, std::string_view kind,
                                     double parameter, double temperature, double trim,
                                     bool update) {
  const SequenceSums sums = sequence_sums(logps, labels, cu_seqlens, ignore_index);
  const std::int64_t sequences = sums.total.numel(), n = sequences / 2;
  DRRLHF_CHECK_VALUE(sequences % 2 == 0,
                     "labels: expected an even number of stacked sequences, got ", sequences);
  const Tensor references = load("ref_logps", ref_logps, sequences);
  Adversary adversary = load_adversary(nominal, groups, group_weights, n,
                                       ambiguity(kind, parameter, temperature, trim, update));
  Tensor pairs = at::empty({4, n}, at::kDouble), gradient = at::empty({2 * n}, at::kDouble);
  double* loss = pairs.mutable_data_ptr<double>();
  double *q = loss + n, *chosen = q + n, *rejected = chosen + n;
  double* d = gradient.mutable_data_ptr<double>();
  const double *sum = sums.total.const_data_ptr<double>(),
               *reference = references.const_data_ptr<double>();
  for (std::int64_t i = 0; i < n; ++i) {
    chosen[i] = beta * (sum[i] - reference[i]);
    rejected[i] = beta * (sum[n + i] - reference[n + i]);
    const PairLoss pair = preference_pair_loss(chosen[i] - rejected[i], label_smoothing);
    loss[i] = pair.loss;
    d[i] = beta * pair.slope;
  }
  const Solution s = robust_risk_cpu(loss, n, adversary.arguments, q);
  for (std::int64_t i = 0; i < n; ++i) {
    d[i] = q[i] == 0 ? 0.0 : q[i] * d[i];  // a masked pair gets none, whatever its slope is
    d[n + i] = -d[i];
  }
  const auto dtype = statistics_dtype(logps);
  // Copies: outputs must not share storage.
  const auto row = [&](int i) { return pairs[i].to(dtype, false, true); };
  return {scalar(s.value, dtype),
          row(1),
          row(0),
          row(2),
          row(3),
          scalar(s.dual, dtype),
          adversary.group_weights,
          sums.total.to(dtype),
          gradient.to(dtype)};
}

Tensor sequence_logprobs(const Tensor& logps, const Tensor& labels,
                         const OptionalTensor& cu_seqlens, std::int64_t ignore_index, bool mean) {
  const SequenceSums sums = sequence_sums(logps, labels, cu_seqlens, ignore_index);
  const Tensor result = mean ? sums.total / sums.count.clamp_min(1) : sums.total;
  return result.to(statistics_dtype(logps));
}

std::tuple<Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logps, const OptionalTensor& old_logps, const OptionalTensor& ref_logps,
    const OptionalTensor& entropy, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
    const Tensor& advantages, bool by_sequence, double clip_low, double clip_high, double kl_beta,
    bool correct_kl) {
  const Tensor shift = load("advantages", advantages, advantages.numel());
  const PolicySums sums =
      policy_sums({logps, old_logps, ref_logps, entropy, mask, cu_seqlens}, shift,
                  {by_sequence, clip_low, clip_high, kl_beta, correct_kl});
  const Tensor surrogate = sums.table[kSurrogate];
  // Not 0 times infinity where nobody asked for the divergence.
  return {kl_beta == 0 ? surrogate.clone() : surrogate + kl_beta * sums.table[kK3Sum], sums.slopes,
          sums.table.to(statistics_dtype(logps))};
}

Tensor token_logprobs_backward(const Tensor& logits, const Tensor& labels,
                               const OptionalTensor& grad, const OptionalTensor& grad_entropy,
                               const Tensor& logp, const Tensor& lse, const Tensor& lse_tail,
                               const Tensor& entropy, std::int64_t ignore_index, double temperature,
                               std::optional<double> softcap) {
  Tensor out = empty_on_huge_pages(logits.sizes(), logits.scalar_type());
  token_logprobs_backward_cpu(logits, labels, {grad, grad_entropy, logp, lse, lse_tail, entropy},
                              ignore_index, temperature, softcap, out);
  return out;
}

void token_logprobs_backward_(Tensor logits, const Tensor& labels, const OptionalTensor& grad,
                              const OptionalTensor& grad_entropy, const Tensor& logp,
                              const Tensor& lse, const Tensor& lse_tail, const Tensor& entropy,
                              std::int64_t ignore_index, double temperature,
                              std::optional<double> softcap) {
  Tensor out = whole_rows(logits);
  token_logprobs_backward_cpu(out, labels, {grad, grad_entropy, logp, lse, lse_tail, entropy},
                              ignore_index, temperature, softcap, out);
  if (!out.is_same(logits)) logits.copy_(out);
}

EightTensors linear_token_logprobs(const Tensor& hidden, const Tensor& weight,
                                   const OptionalTensor& bias, const Tensor& labels,
                                   std::int64_t ignore_index, double temperature,
                                   std::optional<double> softcap, double logit_scale,
                                   std::int64_t outputs, std::int64_t keep,
                                   std::int64_t workspace) {
  const Head head = {weight, bias, ignore_index, temperature, softcap, logit_scale};
  return linear_token_logprobs_cpu(hidden, head, labels, outputs, static_cast<Keep>(keep),
                                   workspace);
}

std::tuple<Tensor, Tensor, Tensor> linear_token_logprobs_backward(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& labels,
    const OptionalTensor& grad, const OptionalTensor& grad_entropy, const Tensor& logp,
    const Tensor& lse, const Tensor& lse_tail, const Tensor& entropy, const Tensor& kept,
    std::int64_t ignore_index, double temperature, std::optional<double> softcap,
    double logit_scale, std::int64_t keep, std::int64_t workspace, bool need_hidden,
    bool need_weight, bool need_bias) {
  const Head head = {weight, bias, ignore_index, temperature, softcap, logit_scale};
  return linear_token_logprobs_backward_cpu(
      hidden, head, labels, {grad, grad_entropy, logp, lse, lse_tail, entropy}, kept,
      static_cast<Keep>(keep), workspace, need_hidden, need_weight, need_bias);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch_version"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["isa"] = name(widest_vectors());
#ifdef DRRLHF_CUDA
  info["mode"] = "cuda";
  info["cuda"] = true;
  info["cuda_architectures"] = pybind11::str(DRRLHF_CUDA).attr("split")();
  info["cuda_version"] = CUDA_VERSION;
#else
  info["mode"] = "cpu";
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace drrlhf

TORCH_LIBRARY_IMPL(drrlhf_cpp, CPU, m) {
  m.impl("robust_risk", &drrlhf::robust_risk);
  m.impl("row_worst_case", &drrlhf::row_worst_case);
  m.impl("sequence_preference_loss", &drrlhf::sequence_preference_loss);
  m.impl("sequence_logprobs", &drrlhf::sequence_logprobs);
  m.impl("sequence_logprobs_backward", &drrlhf::spread_to_tokens);
  m.impl("token_logprobs", &drrlhf::token_logprobs_cpu);
  m.impl("token_logprobs_backward", &drrlhf::token_logprobs_backward);
  m.impl("token_logprobs_backward_", &drrlhf::token_logprobs_backward_);
  m.impl("linear_token_logprobs", &drrlhf::linear_token_logprobs);
  m.impl("linear_token_logprobs_backward", &drrlhf::linear_token_logprobs_backward);
  m.impl("row_attention_backward", &drrlhf::row_attention_backward);
  m.impl("policy_loss", &drrlhf::policy_loss);
  m.impl("policy_loss_backward", &drrlhf::policy_loss_backward);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of drrlhf; importing it registers torch.ops.drrlhf_cpp.";
  m.def("build_info", &drrlhf::build_info, "What this module was built from and for.");
}
