// What the host's side of the ops calls tensors and tuples of them, for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace drrlhf {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Bits of `outputs`: which statistics are wanted besides the log-prob; drrlhf/conventions.py.
enum Output : std::int64_t { kEntropy = 1, kMean = 2, kIsTop1 = 4, kLogSumSquares = 8 };

// logp, lse, lse_tail, entropy, mean, is_top1, log_sum_squares; empty where not asked for.
using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using NineTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a backward is given of its tokens, as the schemas have it.
struct GivenUpstream {
  const OptionalTensor &grad, &grad_entropy;
  const Tensor &logp, &lse, &lse_tail, &entropy;
};

inline at::ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace drrlhf
