// Attention over a row of blocks: its gradients. The forward is PyTorch's own kernel
// (drrlhf/layouts/attention_cpu.py).
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace drrlhf::cpu {

// Gradients of queries (H, T, D), keys and values (K, T, D) of a row, H a multiple of K, from the
// gradient of the result (T, H, D); `norms` (H, T, 1) are the log-sum-exps of scores. `blocks`
// (B, 6) int64: tokens start to stop see themselves, causally, and two pieces of the row before
// them, in order, either of which may be empty; a block that sees none begins a group, and groups
// share nothing. `window` is the number of tokens up to its own that a token sees.
std::tuple<at::Tensor, at::Tensor, at::Tensor> row_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& norms, const at::Tensor& blocks, std::int64_t window,
    double scale);

}  // namespace drrlhf::cpu
