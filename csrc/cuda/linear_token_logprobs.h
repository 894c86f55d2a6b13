// linear_token_logprobs on a GPU, on the library's products.
#pragma once

#include "tensor_arguments.h"

namespace drrlhf::cuda {

EightTensors linear_token_logprobs(const Tensor& hidden, const Tensor& weight,
                                   const OptionalTensor& bias, const Tensor& labels,
                                   std::int64_t ignore_index, double temperature,
                                   std::optional<double> softcap, double logit_scale,
                                   std::int64_t outputs, std::int64_t keep, std::int64_t workspace);

std::tuple<Tensor, Tensor, Tensor> linear_token_logprobs_backward(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& labels,
    const OptionalTensor& grad, const OptionalTensor& grad_entropy, const Tensor& logp,
    const Tensor& lse, const Tensor& lse_tail, const Tensor& entropy, const Tensor& kept,
    std::int64_t ignore_index, double temperature, std::optional<double> softcap,
    double logit_scale, std::int64_t keep, std::int64_t workspace, bool need_hidden,
    bool need_weight, bool need_bias);

}  // namespace drrlhf::cuda
