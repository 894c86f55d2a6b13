// What the forward and the backward of linear_token_logprobs share.
#pragma once

#include <ATen/ATen.h>

#include "logprobs.h"

namespace drrlhf::cpu {

// Kernels run on plain tensors: no graph is recorded, and autocast must not narrow a product.
struct PlainTensors {
  at::AutoDispatchBelowAutograd below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCPU};
};

void check_head(const Tensor& hidden, const Head& head, const Tensor& labels);
void check_keep(Keep keep);

// Whether a kept gradient's column is divided by -p[label] scale / temperature: what the reference
// says of it (drrlhf/conventions.py). Of less probable labels ratios, and sums of them, might
// overflow.
bool divides_by_label(at::ScalarType dtype, float logp);

// By what such a column was divided.
float divisor(const Transform& t, float logp);

// d logp / d logits (V, valid tokens) at the front of what the forward kept with Keep::kColumns.
Tensor kept_gradient(const Tensor& kept, std::int64_t vocabulary, std::int64_t valid);

}  // namespace drrlhf::cpu
