#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "../message.h"
#include "logprobs.h"

namespace drrlhf::cpu {

Storage storage_of(const char* argument, const Tensor& x) {
  DRRLHF_CHECK_VALUE(x.device().is_cpu(), argument, ": expected a CPU tensor, got ", x.device());
  switch (x.scalar_type()) {
    case at::kFloat:
      return Storage::kFloat;
    case at::kBFloat16:
      return Storage::kBFloat16;
    case at::kHalf:
      return Storage::kHalf;
    default:
      DRRLHF_CHECK_VALUE(false, argument, ": expected float32, bfloat16 or float16, got ",
                         x.scalar_type());
  }
}

Tensor checked_labels(const Tensor& labels, at::IntArrayRef shape, std::int64_t vocabulary,
                      std::int64_t ignore_index) {
  DRRLHF_CHECK_VALUE(labels.device().is_cpu() && labels.sizes() == shape,
                     "labels: expected a CPU tensor of shape ", shape, ", got ", labels.sizes());
  Tensor checked = labels.to(at::kLong).contiguous();
  const std::int64_t* y = checked.const_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < checked.numel(); ++i) {
    DRRLHF_CHECK_VALUE(y[i] == ignore_index || (y[i] >= 0 && y[i] < vocabulary),
                       "labels: expected values in [0, ", vocabulary,
                       ") or ignore_index=", ignore_index, ", got ", y[i], " at position ", i);
  }
  return checked;
}

Tensor whole_rows(const Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

// Where the rows of a tensor (..., V) begin, in entries: a part of a sequence, say, is not copied.
class RowPlaces {
 public:
  explicit RowPlaces(const Tensor& x)
      : sizes_(x.sizes().slice(0, x.dim() - 1)), strides_(x.strides().slice(0, x.dim() - 1)) {}

  std::int64_t operator()(std::int64_t row) const {
    std::int64_t place = 0;
    for (std::size_t d = sizes_.size(); d-- > 0; row /= sizes_[d]) {
      place += row % sizes_[d] * strides_[d];
    }
    return place;
  }

 private:
  at::IntArrayRef sizes_, strides_;  // of a tensor that outlives this
};

Transform transform_of(double temperature, std::optional<double> softcap, double logit_scale) {
  return {static_cast<float>(logit_scale), static_cast<float>(softcap.value_or(0.0)),
          static_cast<float>(1.0 / temperature)};
}

Tensor per_token(const char* argument, const Tensor& x, std::int64_t tokens) {
  DRRLHF_CHECK_VALUE(x.device().is_cpu() && x.numel() == tokens, argument,
                     ": expected a CPU tensor of ", tokens, " numbers, got ", x.sizes());
  return x.to(at::kFloat).contiguous();
}

Upstream::Upstream(const GivenUpstream& given, std::int64_t tokens) {
  const auto optional = [&](const char* name, const OptionalTensor& g) {
    return g.has_value() ? per_token(name, *g, tokens) : Tensor();
  };
  grad = optional("grad", given.grad);
  grad_entropy = optional("grad_entropy", given.grad_entropy);
  logp = per_token("logp", given.logp, tokens);
  lse = per_token("lse", given.lse, tokens);
  lse_tail = per_token("lse_tail", given.lse_tail, tokens);
  if (grad_entropy.defined()) entropy = per_token("entropy", given.entropy, tokens);
}

TokenOutputs::TokenOutputs(at::IntArrayRef shape, std::int64_t outputs) : outputs_(outputs) {
  const auto asked = [&](Output output, at::ScalarType dtype) {
    return outputs & output ? at::zeros(shape, dtype) : at::empty({0}, dtype);
  };
  logp_ = at::zeros(shape, at::kFloat);
  lse_ = at::zeros(shape, at::kFloat);
  lse_tail_ = at::zeros(shape, at::kFloat);
  entropy_ = asked(kEntropy, at::kFloat);
  mean_ = asked(kMean, at::kFloat);
  is_top1_ = asked(kIsTop1, at::kBool);
  log_sum_squares_ = asked(kLogSumSquares, at::kFloat);
}

void TokenOutputs::set(std::int64_t token, const TokenStatistics& s) {
  logp_.mutable_data_ptr<float>()[token] = s.logp;
  lse_.mutable_data_ptr<float>()[token] = s.lse;
  lse_tail_.mutable_data_ptr<float>()[token] = s.lse_tail;
  if (outputs_ & kEntropy) entropy_.mutable_data_ptr<float>()[token] = s.entropy;
  if (outputs_ & kMean) mean_.mutable_data_ptr<float>()[token] = s.mean;
  if (outputs_ & kIsTop1) is_top1_.mutable_data_ptr<bool>()[token] = s.is_top1;
  if (outputs_ & kLogSumSquares) {
    log_sum_squares_.mutable_data_ptr<float>()[token] = s.log_sum_squares;
  }
}

SevenTensors TokenOutputs::tensors() const {
  return {logp_, lse_, lse_tail_, entropy_, mean_, is_top1_, log_sum_squares_};
}

SevenTensors token_logprobs_cpu(const Tensor& logits, const Tensor& labels,
                                std::int64_t ignore_index, double temperature,
                                std::optional<double> softcap, std::int64_t outputs) {
  const Storage storage = storage_of("logits", logits);
  const std::int64_t vocabulary = logits.size(-1), size = logits.element_size();
  const auto shape = logits.sizes().slice(0, logits.dim() - 1);
  const Tensor y = checked_labels(labels, shape, vocabulary, ignore_index), x = whole_rows(logits);
  const RowPlaces place(x);
  const Transform transform = transform_of(temperature, softcap, 1.0);
  TokenOutputs result(shape, outputs);
  const auto* label = y.const_data_ptr<std::int64_t>();
  const char* rows = static_cast<const char*>(x.const_data_ptr());
  at::parallel_for(0, y.numel(), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      if (label[i] == ignore_index) continue;
      Others others;
      float label_z;
      softmax_kernels().fold_row(rows + place(i) * size, storage, vocabulary, label[i], transform,
                                 result.extras(), others, label_z);
      result.set(i, finish(others, label_z, label[i], vocabulary));
    }
  });
  return result.tensors();
}

void token_logprobs_backward_cpu(const Tensor& logits, const Tensor& labels,
                                 const GivenUpstream& given, std::int64_t ignore_index,
                                 double temperature, std::optional<double> softcap, Tensor& out) {
  const Storage storage = storage_of("logits", logits);
  const std::int64_t vocabulary = logits.size(-1), size = logits.element_size();
  const auto shape = logits.sizes().slice(0, logits.dim() - 1);
  const Tensor y = checked_labels(labels, shape, vocabulary, ignore_index), x = whole_rows(logits);
  const RowPlaces from(x), into(out);
  const std::int64_t n = y.numel();
  const Upstream upstream(given, n);
  const Transform transform = transform_of(temperature, softcap, 1.0);
  const auto* label = y.const_data_ptr<std::int64_t>();
  const char* rows = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, n, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const RowCoefficients c = upstream.of(i);
      if (label[i] == ignore_index || (c.a == 0 && c.b == 0)) {
        std::memset(to + into(i) * size, 0, vocabulary * size);
      } else {
        softmax_kernels().row_gradient(rows + from(i) * size, to + into(i) * size, storage,
                                       vocabulary, label[i], transform, c);
      }
    }
  });
}

}  // namespace drrlhf::cpu
