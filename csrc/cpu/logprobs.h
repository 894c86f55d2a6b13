// Token log-probs on the CPU as functions of tensors. Schemas in csrc/ops.cpp, the definition in
// drrlhf/reference/.
#pragma once

#include "../tensors.h"
#include "softmax.h"

namespace drrlhf::cpu {

// Statistics by token, (...) each, as the labels are; 0 where the label is ignored.
class TokenOutputs {
 public:
  TokenOutputs(at::IntArrayRef shape, std::int64_t outputs);
  void set(std::int64_t token, const TokenStatistics& s);
  bool extras() const { return outputs_ != 0; }
  SevenTensors tensors() const;

 private:
  Tensor logp_, lse_, lse_tail_, entropy_, mean_, is_top1_, log_sum_squares_;
  std::int64_t outputs_;
};

Storage storage_of(const char* argument, const Tensor& x);

// Labels (...) as int64; those that are not ignored lie in [0, vocabulary).
Tensor checked_labels(const Tensor& labels, at::IntArrayRef shape, std::int64_t vocabulary,
                      std::int64_t ignore_index);

// x (..., V) with the entries of each row side by side; x itself where they are, however its rows
// lie.
Tensor whole_rows(const Tensor& x);

Transform transform_of(double temperature, std::optional<double> softcap, double logit_scale);

// x (...) as contiguous float32, with as many entries as there are tokens.
Tensor per_token(const char* argument, const Tensor& x, std::int64_t tokens);

SevenTensors token_logprobs_cpu(const Tensor& logits, const Tensor& labels,
                                std::int64_t ignore_index, double temperature,
                                std::optional<double> softcap, std::int64_t outputs);

// What a backward is given, checked, float32 (tokens,); undefined where there is no gradient, and
// then 0.
struct Upstream {
  Tensor grad, grad_entropy, logp, lse, lse_tail, entropy;

  Upstream(const GivenUpstream& given, std::int64_t tokens);

  static float of(const Tensor& x, std::int64_t token) {
    return x.defined() ? x.const_data_ptr<float>()[token] : 0.0f;
  }

  RowCoefficients of(std::int64_t token) const {
    return {of(grad, token), of(grad_entropy, token), of(logp, token),
            of(lse, token),  of(lse_tail, token),     of(entropy, token)};
  }
};

// d/dlogits, written to `out` (whole rows, may be the logits themselves).
void token_logprobs_backward_cpu(const Tensor& logits, const Tensor& labels,
                                 const GivenUpstream& given, std::int64_t ignore_index,
                                 double temperature, std::optional<double> softcap, Tensor& out);

// Of the counted tokens of each sequence, (S,) in float64: the sum of their log-probs, their
// number.
struct SequenceSums {
  Tensor total, count;
};

// Sequences are the rows of padded (B, L) tokens, or segments of packed (T,) ones.
SequenceSums sequence_sums(const Tensor& logps, const Tensor& labels,
                           const OptionalTensor& cu_seqlens, std::int64_t ignore_index);

// Each sequence's number (S,) at its counted tokens, divided by their number for a mean; else 0.
Tensor spread_to_tokens(const Tensor& per_sequence, const Tensor& labels,
                        const OptionalTensor& cu_seqlens, std::int64_t ignore_index, bool mean);

// What the forward of linear_token_logprobs keeps for its backward.
enum class Keep : std::int64_t {
  kNothing,  // the backward computes the logits again
  kHidden,   // d logp / d hidden (tokens, D), unscaled: the backward scales its rows
  kColumns,  // d logp / d logits, transposed: (V, counted tokens), packed at the front of (V,
             // tokens), and in bfloat16 divided as drrlhf/conventions.py says
};

struct Head {
  Tensor weight;        // (V, D)
  OptionalTensor bias;  // (V,)
  std::int64_t ignore_index;
  double temperature;
  std::optional<double> softcap;
  double logit_scale;
};

EightTensors linear_token_logprobs_cpu(const Tensor& hidden, const Head& head, const Tensor& labels,
                                       std::int64_t outputs, Keep keep, std::int64_t workspace);

// Gradients of hidden, weight and bias; empty where not needed.
std::tuple<Tensor, Tensor, Tensor> linear_token_logprobs_backward_cpu(
    const Tensor& hidden, const Head& head, const Tensor& labels, const GivenUpstream& given,
    const Tensor& kept, Keep keep, std::int64_t workspace, bool need_hidden, bool need_weight,
    bool need_bias);

}  // namespace drrlhf::cpu
