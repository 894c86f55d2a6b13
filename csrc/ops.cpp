// The CPU side of the ops: argument checks, launches, and a report of the build. csrc/ops_cuda.cpp
// is the same for a GPU, csrc/schemas.h has the schemas of both.
#include <ATen/ATen.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string_view>

#ifdef DRRLHF_CUDA
#include <cuda.h>  // CUDA_VERSION alone
#endif

#include "cpu/logprobs.h"
#include "cpu/losses.h"
#include "cpu/memory.h"
#include "cpu/policy_loss.h"
#include "message.h"
#include "names.h"
#include "schemas.h"

namespace drrlhf {
namespace {

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
                         const OptionalTensor& group_weights, std::int64_t n, std::string_view kind,
                         double a, double b, double trim) {
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
  arguments = {{by_name<Kind>("kind", kind, kKinds), a, b, trim},
               pointer(result.nominal),
               nullptr,
               nullptr,
               0};
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

at::ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor scalar(double value, at::ScalarType dtype) { return at::scalar_tensor(value, dtype); }

std::tuple<Tensor, Tensor, Tensor, Tensor> robust_risk(
    const Tensor& losses, const OptionalTensor& nominal, const OptionalTensor& groups,
    const OptionalTensor& group_weights, std::string_view kind, double a, double b, double trim) {
  const std::int64_t n = losses.numel();
  const Tensor l = load("losses", losses, n);
  Adversary adversary = load_adversary(nominal, groups, group_weights, n, kind, a, b, trim);
  Tensor q = at::empty({n}, at::kDouble);
  const Solution s = robust_risk_cpu(l.const_data_ptr<double>(), n, adversary.arguments,
                                     q.mutable_data_ptr<double>());
  const auto dtype = statistics_dtype(losses);
  return {scalar(s.value, dtype), q.to(dtype), scalar(s.dual, dtype), adversary.group_weights};
}

using NineTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors preference_loss(const Tensor& chosen_logps, const Tensor& rejected_logps,
                            const OptionalTensor& ref_chosen_logps,
                            const OptionalTensor& ref_rejected_logps,
                            const OptionalTensor& chosen_lengths,
                            const OptionalTensor& rejected_lengths, const OptionalTensor& nominal,
                            const OptionalTensor& groups, const OptionalTensor& group_weights,
                            std::string_view loss_type, double beta, double label_smoothing,
                            double simpo_gamma, double discopop_tau, std::string_view f_divergence,
                            double f_alpha, std::string_view kind, double a, double b,
                            double trim) {
  const std::int64_t n = chosen_logps.numel();
  Tensor chosen = load("chosen_logps", chosen_logps, n);
  Tensor rejected = load("rejected_logps", rejected_logps, n);
  if (ref_chosen_logps.has_value() && ref_rejected_logps.has_value()) {
    chosen = chosen - load("ref_chosen_logps", *ref_chosen_logps, n);
    rejected = rejected - load("ref_rejected_logps", *ref_rejected_logps, n);
  }
  const OptionalTensor lc = load("chosen_lengths", chosen_lengths, n);
  const OptionalTensor lr = load("rejected_lengths", rejected_lengths, n);
  const PairOptions options{
      by_name<LossType>("loss_type", loss_type, kLossTypes), beta, label_smoothing, simpo_gamma,
      discopop_tau, by_name<Divergence>("f_divergence", f_divergence, kDivergences), f_alpha,
      // As TRL 1.16 clamps it per input dtype.
      chosen_logps.scalar_type() == at::kHalf ? 11.0 : 80.0};
  Adversary adversary = load_adversary(nominal, groups, group_weights, n, kind, a, b, trim);
  Tensor out = at::empty({4, n}, at::kDouble);
  double* loss = out.mutable_data_ptr<double>();
  double *q = loss + n, *d_chosen = q + n, *d_rejected = d_chosen + n;
  pair_losses_cpu(chosen.const_data_ptr<double>(), rejected.const_data_ptr<double>(), pointer(lc),
                  pointer(lr), n, options, loss, d_chosen, d_rejected);
  const Solution s = robust_risk_cpu(loss, n, adversary.arguments, q);
  weigh_cpu(q, n, d_chosen);
  weigh_cpu(q, n, d_rejected);
  const auto dtype = statistics_dtype(chosen_logps);
  // Copies: outputs must not share storage.
  const auto row = [&](int i, at::ScalarType type) { return out[i].to(type, false, true); };
  return {scalar(s.value, dtype),
          row(1, dtype),
          row(0, dtype),
          (beta * chosen).to(dtype),
          (beta * rejected).to(dtype),
          scalar(s.dual, dtype),
          adversary.group_weights,
          row(2, chosen_logps.scalar_type()),
          row(3, rejected_logps.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> reward_loss(
    const Tensor& chosen_rewards, const Tensor& rejected_rewards, const OptionalTensor& margin,
    const OptionalTensor& nominal, const OptionalTensor& groups,
    const OptionalTensor& group_weights, double center_coefficient, std::string_view kind, double a,
    double b, double trim) {
  const std::int64_t n = chosen_rewards.numel();
  const Tensor chosen = load("chosen_rewards", chosen_rewards, n);
  const Tensor rejected = load("rejected_rewards", rejected_rewards, n);
  const OptionalTensor m = load("margin", margin, n);
  Adversary adversary = load_adversary(nominal, groups, group_weights, n, kind, a, b, trim);
  Tensor out = at::empty({4, n}, at::kDouble);
  double* loss = out.mutable_data_ptr<double>();
  double *q = loss + n, *d_chosen = q + n, *d_rejected = d_chosen + n;
  reward_losses_cpu(chosen.const_data_ptr<double>(), rejected.const_data_ptr<double>(), pointer(m),
                    n, center_coefficient, loss, d_chosen, d_rejected);
  const Solution s = robust_risk_cpu(loss, n, adversary.arguments, q);
  weigh_cpu(q, n, d_chosen);
  weigh_cpu(q, n, d_rejected);
  const auto dtype = statistics_dtype(chosen_rewards);
  const auto row = [&](int i, at::ScalarType type) { return out[i].to(type, false, true); };
  return {scalar(s.value, dtype),
          row(1, dtype),
          row(0, dtype),
          scalar(s.dual, dtype),
          adversary.group_weights,
          row(2, chosen_rewards.scalar_type()),
          row(3, rejected_rewards.scalar_type())};
}

NineTensors sequence_preference_loss(
    const Tensor& logps, const Tensor& labels, const OptionalTensor& cu_seqlens,
    const OptionalTensor& ref_logps, const OptionalTensor& nominal, const OptionalTensor& groups,
    const OptionalTensor& group_weights, std::int64_t ignore_index, std::string_view loss_type,
    double beta, double label_smoothing, double simpo_gamma, double discopop_tau,
    std::string_view f_divergence, double f_alpha, std::string_view kind, double a, double b,
    double trim) {
  const SequenceSums sums = sequence_sums(logps, labels, cu_seqlens, ignore_index);
  const std::int64_t sequences = sums.total.numel(), n = sequences / 2;
  DRRLHF_CHECK_VALUE(sequences % 2 == 0,
                     "labels: expected an even number of stacked sequences, got ", sequences);
  const auto chosen = [&](const Tensor& x) { return x.narrow(0, 0, n); };
  const auto rejected = [&](const Tensor& x) { return x.narrow(0, n, n); };
  OptionalTensor ref_chosen, ref_rejected;
  if (ref_logps.has_value()) {
    const Tensor references = load("ref_logps", *ref_logps, sequences);
    ref_chosen = chosen(references);
    ref_rejected = rejected(references);
  }
  const auto [value, q, losses, chosen_rewards, rejected_rewards, dual, state, d_chosen,
              d_rejected] =
      preference_loss(chosen(sums.total), rejected(sums.total), ref_chosen, ref_rejected,
                      chosen(sums.count), rejected(sums.count), nominal, groups, group_weights,
                      loss_type, beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence,
                      f_alpha, kind, a, b, trim);
  const auto dtype = statistics_dtype(logps);
  return {value.to(dtype),
          q.to(dtype),
          losses.to(dtype),
          chosen_rewards.to(dtype),
          rejected_rewards.to(dtype),
          dual.to(dtype),
          state,
          sums.total.to(dtype),
          at::cat({d_chosen, d_rejected}).to(dtype)};
}

Tensor sequence_logprobs(const Tensor& logps, const Tensor& labels,
                         const OptionalTensor& cu_seqlens, std::int64_t ignore_index, bool mean) {
  const SequenceSums sums = sequence_sums(logps, labels, cu_seqlens, ignore_index);
  const Tensor result = mean ? sums.total / sums.count.clamp_min(1) : sums.total;
  return result.to(statistics_dtype(logps));
}

NineTensors policy_loss(const Tensor& logps, const OptionalTensor& old_logps,
                        const OptionalTensor& ref_logps, const OptionalTensor& entropy,
                        const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                        const Tensor& advantages, const Tensor& rewards, const Tensor& prompt_ids,
                        const OptionalTensor& sequence_weights, const OptionalTensor& nominal,
                        const OptionalTensor& groups, const OptionalTensor& group_weights,
                        std::int64_t m, std::string_view loss_type,
                        std::string_view importance_level, double clip_low, double clip_high,
                        double kl_beta, bool correct_kl, double max_completion_length,
                        std::string_view kind, double a, double b, double trim) {
  const std::int64_t n = advantages.numel();
  const PolicyOptions options{by_name<PolicyLossType>("loss_type", loss_type, kPolicyLossTypes),
                              importance_level == "sequence",
                              clip_low,
                              clip_high,
                              kl_beta,
                              correct_kl,
                              max_completion_length};
  const Tensor gain = load("rewards", rewards, n), shift = load("advantages", advantages, n);
  const OptionalTensor factors = load("sequence_weights", sequence_weights, n);
  DRRLHF_CHECK_VALUE(prompt_ids.dim() == 1 && prompt_ids.numel() == n,
                     "prompt_ids: expected shape (", n, "), got ", prompt_ids.sizes());
  const Tensor ids = prompt_ids.to(at::kLong).contiguous();
  const auto* id = ids.const_data_ptr<std::int64_t>();
  for (std::int64_t s = 0; s < n; ++s) {
    DRRLHF_CHECK_VALUE(id[s] >= 0 && id[s] < m, "prompt_ids: expected ids in [0, ", m, "), got ",
                       id[s], " at index ", s, "; number the prompts from 0 or raise num_prompts");
  }
  Adversary adversary = load_adversary(nominal, groups, group_weights, m, kind, a, b, trim);
  const double* p = pointer(adversary.nominal);
  Tensor prompts = at::zeros({3, m}, at::kDouble);
  double* loss = prompts.mutable_data_ptr<double>();
  double *q = loss + m, *completions = q + m;
  for (std::int64_t s = 0; s < n; ++s) {
    loss[id[s]] -= gain.const_data_ptr<double>()[s];
    completions[id[s]] += 1;
  }
  std::int64_t present = 0;
  for (std::int64_t i = 0; i < m; ++i) {
    DRRLHF_CHECK_VALUE(completions[i] > 0, "prompt_ids: expected every prompt of 0 to ", m - 1,
                       ", got none of prompt ", i, "; number the prompts without gaps");
    loss[i] /= completions[i];
    present += p == nullptr || p[i] != 0;
  }
  const Solution risk = robust_risk_cpu(loss, m, adversary.arguments, q);

  const PolicySums sums =
      policy_sums({logps, old_logps, ref_logps, entropy, mask, cu_seqlens}, shift, options);
  const double* table = sums.table.const_data_ptr<double>();
  const double *tokens = table + kTokens * n, *surrogate = table + kSurrogate * n,
               *divergence = table + kK3Sum * n;
  double sequences = 0, all_tokens = 0;
  for (std::int64_t s = 0; s < n; ++s) {
    const bool held = p == nullptr || p[id[s]] != 0;
    sequences += held;
    all_tokens += held ? tokens[s] : 0.0;
  }
  Tensor coefficients = at::empty({n}, at::kDouble);
  double* coefficient = coefficients.mutable_data_ptr<double>();
  double value = 0;
  const auto at_least_one = [](double x) { return x > 1 ? x : 1.0; };
  for (std::int64_t s = 0; s < n; ++s) {
    double weight = q[id[s]] * double(present);
    if (factors.has_value()) weight *= pointer(factors)[s];
    double by = at_least_one(all_tokens);
    if (options.loss_type == PolicyLossType::kGrpo) by = sequences * at_least_one(tokens[s]);
    if (options.loss_type == PolicyLossType::kDrGrpo) by = sequences * max_completion_length;
    coefficient[s] = weight == 0 ? 0.0 : weight / by;
    if (coefficient[s] != 0) value += coefficient[s] * (surrogate[s] + kl_beta * divergence[s]);
  }
  const auto dtype = statistics_dtype(logps);
  return {scalar(value, dtype),
          prompts[1].to(dtype, false, true),
          prompts[0].to(dtype, false, true),
          scalar(risk.value, dtype),
          scalar(risk.dual, dtype),
          adversary.group_weights,
          coefficients.to(dtype),
          sums.slopes,
          sums.table.to(dtype)};
}

Tensor token_logprobs_backward(const Tensor& logits, const Tensor& labels,
                               const OptionalTensor& grad, const OptionalTensor& grad_entropy,
                               const Tensor& logp, const Tensor& lse, const Tensor& lse_tail,
                               const Tensor& entropy, std::int64_t ignore_index, double temperature,
                               std::optional<double> softcap) {
  Tensor out = empty_on_huge_pages(logits.sizes(), logits.scalar_type());
  token_logprobs_backward_cpu(logits, labels, grad, grad_entropy, logp, lse, lse_tail, entropy,
                              ignore_index, temperature, softcap, out);
  return out;
}

void token_logprobs_backward_(Tensor logits, const Tensor& labels, const OptionalTensor& grad,
                              const OptionalTensor& grad_entropy, const Tensor& logp,
                              const Tensor& lse, const Tensor& lse_tail, const Tensor& entropy,
                              std::int64_t ignore_index, double temperature,
                              std::optional<double> softcap) {
  Tensor out = logits.contiguous();
  token_logprobs_backward_cpu(logits, labels, grad, grad_entropy, logp, lse, lse_tail, entropy,
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
  return linear_token_logprobs_backward_cpu(hidden, head, labels, grad, grad_entropy, logp, lse,
                                            lse_tail, entropy, kept, static_cast<Keep>(keep),
                                            workspace, need_hidden, need_weight, need_bias);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch_version"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["isa"] = DRRLHF_ISA;
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

TORCH_LIBRARY(drrlhf_cpp, m) { drrlhf::define_ops(m); }

TORCH_LIBRARY_IMPL(drrlhf_cpp, CPU, m) {
  m.impl("robust_risk", &drrlhf::robust_risk);
  m.impl("preference_loss", &drrlhf::preference_loss);
  m.impl("reward_loss", &drrlhf::reward_loss);
  m.impl("sequence_preference_loss", &drrlhf::sequence_preference_loss);
  m.impl("sequence_logprobs", &drrlhf::sequence_logprobs);
  m.impl("sequence_logprobs_backward", &drrlhf::spread_to_tokens);
  m.impl("token_logprobs", &drrlhf::token_logprobs_cpu);
  m.impl("token_logprobs_backward", &drrlhf::token_logprobs_backward);
  m.impl("token_logprobs_backward_", &drrlhf::token_logprobs_backward_);
  m.impl("linear_token_logprobs", &drrlhf::linear_token_logprobs);
  m.impl("linear_token_logprobs_backward", &drrlhf::linear_token_logprobs_backward);
  m.impl("policy_loss", &drrlhf::policy_loss);
  m.impl("policy_loss_backward", &drrlhf::policy_loss_backward);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of drrlhf; importing it registers torch.ops.drrlhf_cpp.";
  m.def("build_info", &drrlhf::build_info, "What this module was built from and for.");
}
