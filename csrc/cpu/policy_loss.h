// The token side of `policy_loss` on the CPU: what every sequence sums to, and every token's slope.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/policy_loss.h"
#include "logprobs.h"

namespace drrlhf::cpu {

// Tensors of tokens are shaped as logps, (S, L) or (T,) with cu_seqlens (S+1,).
struct PolicyTokens {
  Tensor logps;
  OptionalTensor old_logps, ref_logps, entropy, mask, cu_seqlens;
};

struct PolicySums {
  Tensor table;   // (kSequenceSums, S), float64
  Tensor slopes;  // as logps: d (sum of a sequence's loss) / d logp
};

// advantages (S,) float64.
PolicySums policy_sums(const PolicyTokens& tokens, const Tensor& advantages,
                       const PolicyOptions& options);

// grad (S,) times the slopes of each sequence's tokens.
Tensor policy_loss_backward(const Tensor& grad, const Tensor& slopes,
                            const OptionalTensor& cu_seqlens);

}  // namespace drrlhf::cpu
