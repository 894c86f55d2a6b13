// Where each sequence begins and ends among tokens in memory order.
#pragma once

#include <ATen/ATen.h>

#include "../message.h"
#include "logprobs.h"

namespace drrlhf::cpu {

struct Sequences {
  std::int64_t count, length;
  Tensor boundaries;

  // `name` and `tokens`: a tensor of tokens, padded (B, L), or packed (T,) with cu_seqlens (S+1,).
  Sequences(const char* name, const Tensor& tokens, const OptionalTensor& cu_seqlens) {
    if (!cu_seqlens.has_value()) {
      DRRLHF_CHECK_VALUE(tokens.dim() == 2, name, ": expected padded (B, L), got ", tokens.sizes(),
                         "; packed (T,) needs cu_seqlens");
      count = tokens.size(0);
      length = tokens.size(1);
      return;
    }
    DRRLHF_CHECK_VALUE(cu_seqlens->device().is_cpu() && cu_seqlens->dim() == 1 &&
                           cu_seqlens->numel() >= 1 && tokens.dim() == 1,
                       "cu_seqlens: expected shape (S+1,) and ", name, " (T,), got ",
                       cu_seqlens->sizes(), " and ", tokens.sizes());
    boundaries = cu_seqlens->to(at::kLong).contiguous();
    count = boundaries.numel() - 1;
    DRRLHF_CHECK_VALUE(begin(0) == 0 && begin(count) == tokens.numel(),
                       "cu_seqlens: expected boundaries from 0 to ", tokens.numel(), ", got ",
                       begin(0), " and ", begin(count));
    for (std::int64_t s = 0; s < count; ++s) {
      DRRLHF_CHECK_VALUE(begin(s) <= begin(s + 1),
                         "cu_seqlens: expected boundaries that do not decrease, got ", begin(s),
                         " and then ", begin(s + 1));
    }
  }

  std::int64_t begin(std::int64_t s) const {
    return boundaries.defined() ? boundaries.const_data_ptr<std::int64_t>()[s] : s * length;
  }
};

}  // namespace drrlhf::cpu
