// Tensors as the kernels take them: checks that need no answer from the device, outputs, and what
// must live until a launch. For csrc/ops_cuda.cpp and what stands in this folder of the host's
// side.
#pragma once

#include <ATen/ATen.h>
#include <ATen/TensorUtils.h>

#include <array>
#include <deque>
#include <vector>

#include "../message.h"
#include "../tensors.h"
#include "kernels.h"

#if !defined(DRRLHF_EMULATED)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace drrlhf::cuda {

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    default:
      return Dtype::kNone;
  }
}

inline NumbersOut out_of(const Tensor& x) {
  return {x.mutable_data_ptr(), dtype_of(x.scalar_type())};
}

// One call of an op: the device of its first tensor, the stream, and what must live until the
// launch. The allocator hands memory out in the order of the stream, so not longer.
class Call {
 public:
  Call(const char* op, const Tensor& first)
      : op_(op),
        device_(first.device()),
#if defined(DRRLHF_EMULATED)
        stream_(nullptr) {
  }
#else
        guard_(first.device()),
        stream_(c10::cuda::getCurrentCUDAStream(first.device().index()).stream()) {
  }
#endif

  Stream stream() const { return stream_; }

  void check(Failure failure) const {
    DRRLHF_CHECK(failure == nullptr, op_, ": the kernel could not be launched: ", failure);
  }

  const Tensor& contiguous(const char* name, const Tensor& x) {
    DRRLHF_CHECK_VALUE(x.device() == device_, name, ": expected it on ", device_, ", got ",
                       x.device());
    return held_.emplace_back(x.contiguous());
  }

  // n numbers of a floating dtype; others are converted.
  Numbers numbers(const char* name, const Tensor& x, std::int64_t n) {
    DRRLHF_CHECK_VALUE(x.numel() == n, name, ": expected ", n, " numbers, got shape ", x.sizes());
    const bool known = dtype_of(x.scalar_type()) != Dtype::kNone;
    const Tensor& held = contiguous(name, known ? x : x.to(at::kDouble));
    return {held.const_data_ptr(), dtype_of(held.scalar_type())};
  }

  Numbers numbers(const char* name, const OptionalTensor& x, std::int64_t n) {
    return x.has_value() ? numbers(name, *x, n) : Numbers{nullptr, Dtype::kNone};
  }

  Integers integers(const char* name, const Tensor& x, std::int64_t n) {
    DRRLHF_CHECK_VALUE(x.numel() == n, name, ": expected ", n, " integers, got shape ", x.sizes());
    const bool known = x.scalar_type() == at::kLong || x.scalar_type() == at::kInt;
    const Tensor& held = contiguous(name, known ? x : x.to(at::kLong));
    return {held.const_data_ptr(), held.scalar_type() == at::kLong};
  }

  // float32 (n,) contiguous.
  const float* floats(const char* name, const Tensor& x, std::int64_t n) {
    DRRLHF_CHECK_VALUE(x.numel() == n, name, ": expected ", n, " numbers, got shape ", x.sizes());
    return contiguous(name, x.to(at::kFloat)).const_data_ptr<float>();
  }

 private:
  const char* op_;
  at::Device device_;
#if !defined(DRRLHF_EMULATED)
  c10::cuda::CUDAGuard guard_;
#endif
  Stream stream_;
  std::deque<Tensor> held_;
  // Kernels run on plain tensors: no graph is recorded, and autocast must not narrow a product.
  at::AutoDispatchBelowAutograd below_autograd_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

// Statistics by token, (...) each, as the labels are; empty where not asked for.
struct TokenTensors {
  Tensor logp, lse, lse_tail, entropy, mean, is_top1, log_sum_squares;

  TokenTensors(const Tensor& labels, std::int64_t outputs) {
    const auto floats = labels.options().dtype(at::kFloat);
    const auto asked = [&](Output output, at::ScalarType dtype = at::kFloat) {
      const auto options = labels.options().dtype(dtype);
      return outputs & output ? at::empty(labels.sizes(), options) : at::empty({0}, options);
    };
    logp = at::empty(labels.sizes(), floats);
    lse = at::empty(labels.sizes(), floats);
    lse_tail = at::empty(labels.sizes(), floats);
    entropy = asked(kEntropy);
    mean = asked(kMean);
    is_top1 = asked(kIsTop1, at::kBool);
    log_sum_squares = asked(kLogSumSquares);
  }

  // From token `first` on.
  TokenOut from(std::int64_t first) const {
    const auto at = [&](const Tensor& x) {
      return x.numel() > 0 ? x.mutable_data_ptr<float>() + first : nullptr;
    };
    return {at(logp),
            at(lse),
            at(lse_tail),
            at(entropy),
            at(mean),
            at(log_sum_squares),
            is_top1.numel() > 0 ? is_top1.mutable_data_ptr<bool>() + first : nullptr};
  }

  SevenTensors tensors() const {
    return {logp, lse, lse_tail, entropy, mean, is_top1, log_sum_squares};
  }
};

inline LogitTransform transform_of(double temperature, std::optional<double> softcap,
                                   double scale) {
  return {static_cast<float>(scale), static_cast<float>(softcap.value_or(0.0)),
          static_cast<float>(1.0 / temperature)};
}

// x (..., V), V >= 1, as (n, V) with neighbouring entries; a view where there is one.
inline Tensor as_rows(const char* name, const Tensor& x) {
  DRRLHF_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, name,
                     ": expected a last dimension of at least 1, got ", x.sizes());
  const Tensor rows = x.reshape({-1, x.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

// Some rows (n, V) of a tensor, the part of it that they are of, and which row comes first.
struct RowBlock {
  Tensor rows, of;
  std::int64_t first;
};

// x (..., V) as rows, in blocks where no one view holds all, as in x[:, :-1]: a launch for each of
// them takes less than a copy if it has some rows. Other layouts are copied.
inline std::vector<RowBlock> row_blocks(const char* name, const Tensor& x, std::int64_t first = 0) {
  constexpr std::int64_t kLeastRows = 16;
  const std::int64_t n = x.numel(), width = x.dim() > 0 ? x.size(-1) : 0;
  if (n == 0 || x.dim() < 3 || x.stride(-1) != 1 || n / x.size(0) < kLeastRows * width ||
      at::detail::computeStride(x.sizes(), x.strides(), at::IntArrayRef({n / width, width}))) {
    return {{as_rows(name, x), x, first}};
  }
  std::vector<RowBlock> blocks;
  for (const Tensor& part : x.unbind(0)) {
    for (const RowBlock& block : row_blocks(name, part, first)) blocks.push_back(block);
    first += part.numel() / width;
  }
  return blocks;
}

inline Logits logits_of(const Tensor& rows, std::int64_t first = 0) {
  const Dtype dtype = dtype_of(rows.scalar_type());
  DRRLHF_CHECK_VALUE(dtype != Dtype::kNone && dtype != Dtype::kDouble,
                     "logits: expected float32, bfloat16 or float16, got ", rows.scalar_type());
  DRRLHF_CHECK_VALUE(rows.size(0) < std::int64_t(1) << 31,
                     "logits: expected fewer than 2^31 rows, ", "got ", rows.size(0),
                     "; split the batch");
  return {rows.const_data_ptr(), dtype, rows.size(0), rows.size(1), rows.stride(0), first};
}

// Upstream gradients and statistics of all tokens.
struct Upstream {
  Numbers grad, grad_entropy;
  const float *logp, *lse, *lse_tail, *entropy;

  Upstream(Call& call, std::int64_t n, const GivenUpstream& given)
      : grad(call.numbers("grad", given.grad, n)),
        grad_entropy(call.numbers("grad_entropy", given.grad_entropy, n)),
        logp(call.floats("logp", given.logp, n)),
        lse(call.floats("lse", given.lse, n)),
        lse_tail(call.floats("lse_tail", given.lse_tail, n)),
        entropy(given.grad_entropy.has_value() ? call.floats("entropy", given.entropy, n)
                                               : nullptr) {}

  // From token `first` on.
  TokenGrad from(std::int64_t first) const {
    return {after(grad, first), after(grad_entropy, first),
            logp + first,       lse + first,
            lse_tail + first,   entropy == nullptr ? nullptr : entropy + first};
  }

  static Numbers after(const Numbers& x, std::int64_t first) {
    constexpr std::array<std::int64_t, 5> kBytes = {0, 4, 8, 2, 2};
    const auto bytes = first * kBytes[static_cast<std::size_t>(x.dtype)];
    return {static_cast<const char*>(x.data) + bytes, x.dtype};
  }
};

inline Integers after(const Integers& x, std::int64_t first) {
  return {static_cast<const char*>(x.data) + first * (x.wide ? 8 : 4), x.wide};
}

}  // namespace drrlhf::cuda
