// The schemas of the compiled ops, whichever device serves them. What they mean:
// drrlhf/reference.py.
#pragma once

#include <torch/library.h>

namespace drrlhf {

inline void define_ops(torch::Library& m) {
  m.def(
      "robust_risk(Tensor losses, Tensor? nominal, Tensor? groups, Tensor? group_weights, "
      "str kind, float a, float b, float trim) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "preference_loss(Tensor chosen_logps, Tensor rejected_logps, Tensor? ref_chosen_logps, "
      "Tensor? ref_rejected_logps, Tensor? chosen_lengths, Tensor? rejected_lengths, "
      "Tensor? nominal, Tensor? groups, Tensor? group_weights, str loss_type, float beta, "
      "float label_smoothing, float simpo_gamma, float discopop_tau, str f_divergence, "
      "float f_alpha, str kind, float a, float b, float trim) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "reward_loss(Tensor chosen_rewards, Tensor rejected_rewards, Tensor? margin, "
      "Tensor? nominal, Tensor? groups, Tensor? group_weights, float center_coefficient, "
      "str kind, float a, float b, float trim) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sequence_preference_loss(Tensor logps, Tensor labels, Tensor? cu_seqlens, "
      "Tensor? ref_logps, Tensor? nominal, Tensor? groups, Tensor? group_weights, "
      "int ignore_index, str loss_type, float beta, float label_smoothing, float simpo_gamma, "
      "float discopop_tau, str f_divergence, float f_alpha, str kind, float a, float b, "
      "float trim) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sequence_logprobs(Tensor logps, Tensor labels, Tensor? cu_seqlens, int ignore_index, "
      "bool mean) -> Tensor");
  m.def(
      "sequence_logprobs_backward(Tensor grad, Tensor labels, Tensor? cu_seqlens, "
      "int ignore_index, bool mean) -> Tensor");
  m.def(
      "token_logprobs(Tensor logits, Tensor labels, int ignore_index, float temperature, "
      "float? softcap, int outputs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "token_logprobs_backward(Tensor logits, Tensor labels, Tensor? grad, Tensor? grad_entropy, "
      "Tensor logp, Tensor lse, Tensor lse_tail, Tensor entropy, int ignore_index, "
      "float temperature, float? softcap) -> Tensor");
  m.def(
      "token_logprobs_backward_(Tensor(a!) logits, Tensor labels, Tensor? grad, "
      "Tensor? grad_entropy, Tensor logp, Tensor lse, Tensor lse_tail, Tensor entropy, "
      "int ignore_index, float temperature, float? softcap) -> ()");
  m.def(
      "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
      "int ignore_index, float temperature, float? softcap, float logit_scale, int outputs, "
      "int keep, int workspace) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_token_logprobs_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
      "Tensor? grad, Tensor? grad_entropy, Tensor logp, Tensor lse, Tensor lse_tail, "
      "Tensor entropy, Tensor kept, int ignore_index, float temperature, float? softcap, "
      "float logit_scale, int keep, int workspace, bool need_hidden, bool need_weight, "
      "bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "policy_loss(Tensor logps, Tensor? old_logps, Tensor? ref_logps, Tensor? entropy, "
      "Tensor? mask, Tensor? cu_seqlens, Tensor advantages, Tensor rewards, Tensor prompt_ids, "
      "Tensor? sequence_weights, Tensor? nominal, Tensor? groups, Tensor? group_weights, "
      "int num_prompts, str loss_type, str importance_level, float clip_low, float clip_high, "
      "float kl_beta, bool correct_kl, float max_completion_length, str kind, float a, float b, "
      "float trim) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "policy_loss_backward(Tensor grad, Tensor slopes, Tensor coefficients, "
      "Tensor? cu_seqlens) -> Tensor");
}

}  // namespace drrlhf
