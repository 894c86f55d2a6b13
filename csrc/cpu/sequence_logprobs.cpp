#include <ATen/ATen.h>

#include "../message.h"
#include "logprobs.h"
#include "sequences.h"

namespace drrlhf::cpu {

SequenceSums sequence_sums(const Tensor& logps, const Tensor& labels,
                           const OptionalTensor& cu_seqlens, std::int64_t ignore_index) {
  const Sequences sequences("labels", labels, cu_seqlens);
  DRRLHF_CHECK_VALUE(logps.device().is_cpu() && logps.sizes() == labels.sizes(),
                     "labels: expected a CPU tensor of shape ", logps.sizes(), " as logps, got ",
                     labels.sizes());
  const Tensor x = logps.to(at::kDouble).contiguous(), y = labels.to(at::kLong).contiguous();
  SequenceSums sums = {at::zeros({sequences.count}, at::kDouble),
                       at::zeros({sequences.count}, at::kDouble)};
  const double* value = x.const_data_ptr<double>();
  const auto* label = y.const_data_ptr<std::int64_t>();
  for (std::int64_t s = 0; s < sequences.count; ++s) {
    double total = 0, count = 0;
    for (std::int64_t i = sequences.begin(s); i < sequences.begin(s + 1); ++i) {
      if (label[i] == ignore_index) continue;
      total += value[i];
      count += 1;
    }
    sums.total.mutable_data_ptr<double>()[s] = total;
    sums.count.mutable_data_ptr<double>()[s] = count;
  }
  return sums;
}

Tensor spread_to_tokens(const Tensor& per_sequence, const Tensor& labels,
                        const OptionalTensor& cu_seqlens, std::int64_t ignore_index, bool mean) {
  const Sequences sequences("labels", labels, cu_seqlens);
  DRRLHF_CHECK_VALUE(per_sequence.device().is_cpu() && per_sequence.dim() == 1 &&
                         per_sequence.numel() == sequences.count,
                     "grad: expected shape (", sequences.count, "), got ", per_sequence.sizes());
  const Tensor g = per_sequence.to(at::kDouble).contiguous(), y = labels.to(at::kLong).contiguous();
  Tensor result = at::zeros(labels.sizes(), at::kDouble);
  const double* from = g.const_data_ptr<double>();
  const auto* label = y.const_data_ptr<std::int64_t>();
  double* to = result.mutable_data_ptr<double>();
  for (std::int64_t s = 0; s < sequences.count; ++s) {
    std::int64_t count = 0;
    for (std::int64_t i = sequences.begin(s); i < sequences.begin(s + 1); ++i) {
      count += label[i] != ignore_index;
    }
    const double share = mean && count > 0 ? from[s] / count : from[s];
    for (std::int64_t i = sequences.begin(s); i < sequences.begin(s + 1); ++i) {
      if (label[i] != ignore_index) to[i] = share;
    }
  }
  return result.to(per_sequence.scalar_type());
}

}  // namespace drrlhf::cpu
