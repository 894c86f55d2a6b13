// token_logprobs: one read of the logits forward; one read and one write backward, in place on
// request; and both at once for a chunk of logits that a matrix product has just left.
#include "softmax.h"

namespace drrlhf::cuda {
namespace {

template <Dtype kDtype, bool kExtras, bool kCapped>
__global__ void __launch_bounds__(kThreads)
    token_logprobs_kernel(Logits logits, Integers labels, std::int64_t ignore_index,
                          LogitTransform t, TokenOut out) {
  DRRLHF_SHARED(Partials, partials);
  const std::int64_t row = blockIdx.x;
  const auto* x = static_cast<const ElementOf<kDtype>*>(logits.data) + row * logits.stride;
  const OwnEntry own = own_entry<kDtype, kCapped>(x, logits, labels, row, ignore_index, t);
  RowStatistics found = {};
  if (own.counted) {
    found = read_row<kDtype, kExtras, kCapped, kDtype == Dtype::kFloat>({&partials, 0}, x,
                                                                        logits.vocabulary, own, t);
  }
  if (threadIdx.x == 0) put_row(out, row, found);
}

template <bool kByEntropy>
__device__ RowCoefficients coefficients(const TokenGrad& grad, std::int64_t row) {
  return {float(number_at(grad.grad, row)),
          float(number_at(grad.grad_entropy, row)),
          float(-expm1(double(grad.logp[row]))),
          grad.lse[row],
          grad.lse_tail[row],
          kByEntropy ? grad.entropy[row] : 0.0f};
}

// Loads of a row that one block of the backward takes.
constexpr std::int64_t kLoadsOfBlock = 8 * kThreads;

template <Dtype kDtype, bool kByEntropy, bool kCapped>
__global__ void __launch_bounds__(kThreads)
    token_logprobs_backward_kernel(Logits logits, Integers labels, std::int64_t ignore_index,
                                   LogitTransform t, TokenGrad grad, void* to,
                                   std::int64_t out_stride, std::int64_t blocks_of_row) {
  using Element = ElementOf<kDtype>;
  const std::int64_t row = blockIdx.x / blocks_of_row, part = blockIdx.x % blocks_of_row;
  const Element* x = static_cast<const Element*>(logits.data) + row * logits.stride;
  Element* out = static_cast<Element*>(to) + row * out_stride;
  const std::int64_t label = integer_at(labels, row);
  const RowCoefficients c = coefficients<kByEntropy>(grad, row);
  const std::int64_t from = part * kLoadsOfBlock, until = from + kLoadsOfBlock;
  if (label != ignore_index && (c.a != 0 || c.b != 0)) {
    write_row<kDtype, kDtype, kByEntropy, kCapped>(x, out, logits.vocabulary, label - logits.first,
                                                   from, until, part == 0, c, t);
    return;
  }
  // Nobody asked about this row: whatever is in it does not matter.
  const std::int64_t each = kVector<kDtype>;
  for (std::int64_t i = from * each + threadIdx.x; i < until * each && i < logits.vocabulary;
       i += kThreads) {
    out[i] = Element(0);
  }
}

template <Dtype kOut>
__device__ void clear_row(ElementOf<kOut>* out, std::int64_t vocabulary) {
  for (std::int64_t i = threadIdx.x; i < vocabulary; i += kThreads) out[i] = ElementOf<kOut>(0);
}

// float32 logits in, statistics and d logp / d logits in kOut out, where the logits are or not.
template <Dtype kOut, bool kExtras, bool kCapped>
__global__ void __launch_bounds__(kThreads)
    softmax_chunk_kernel(Logits logits, Integers labels, std::int64_t ignore_index,
                         LogitTransform t, TokenOut out, void* to, std::int64_t out_stride) {
  DRRLHF_SHARED(Partials, partials);
  const std::int64_t row = blockIdx.x;
  const float* x = static_cast<const float*>(logits.data) + row * logits.stride;
  auto* d = static_cast<ElementOf<kOut>*>(to) + row * out_stride;
  const OwnEntry own = own_entry<Dtype::kFloat, kCapped>(x, logits, labels, row, ignore_index, t);
  RowStatistics found = {};
  if (own.counted) {
    found = read_row<Dtype::kFloat, kExtras, kCapped, kOut == Dtype::kFloat>(
        {&partials, 0}, x, logits.vocabulary, own, t);
  }
  if (threadIdx.x == 0) put_row(out, row, found);
  // A row without an answer is 0 here, lest it spoil the products of others; its log-prob tells.
  if (!own.counted || found.logp != found.logp) {
    __syncthreads();
    clear_row<kOut>(d, logits.vocabulary);
    return;
  }
  const RowCoefficients c = {1.0f,      0.0f,           float(-expm1(double(found.logp))),
                             found.lse, found.lse_tail, 0.0f};
  write_row<Dtype::kFloat, kOut, false, kCapped>(x, d, logits.vocabulary, own.label, 0,
                                                 logits.vocabulary, true, c, t);
}

// The same where statistics and upstream gradients are known.
template <Dtype kOut, bool kByEntropy, bool kCapped>
__global__ void __launch_bounds__(kThreads)
    chunk_gradient_kernel(Logits logits, Integers labels, std::int64_t ignore_index,
                          LogitTransform t, TokenGrad grad, void* to, std::int64_t out_stride) {
  const std::int64_t row = blockIdx.x;
  const float* x = static_cast<const float*>(logits.data) + row * logits.stride;
  auto* d = static_cast<ElementOf<kOut>*>(to) + row * out_stride;
  const std::int64_t label = integer_at(labels, row);
  const RowCoefficients c = coefficients<kByEntropy>(grad, row);
  if (label == ignore_index || (c.a == 0 && c.b == 0)) {
    clear_row<kOut>(d, logits.vocabulary);
    return;
  }
  write_row<Dtype::kFloat, kOut, kByEntropy, kCapped>(x, d, logits.vocabulary, label - logits.first,
                                                      0, logits.vocabulary, true, c, t);
}

bool wants_extras(const TokenOut& out) {
  return out.entropy != nullptr || out.mean != nullptr || out.log_sum_squares != nullptr ||
         out.is_top1 != nullptr;
}

}  // namespace

Failure token_logprobs_cuda(const Logits& logits, Integers labels, std::int64_t ignore_index,
                            const LogitTransform& transform, const TokenOut& out, Stream stream) {
  return with_types(logits.dtype, wants_extras(out), transform.softcap != 0,
                    [&](auto type, auto extras, auto capped) {
                      return launch(token_logprobs_kernel<type.value, extras.value, capped.value>,
                                    logits.rows, kThreads, stream, logits, labels, ignore_index,
                                    transform, out);
                    });
}

Failure token_logprobs_backward_cuda(const Logits& logits, Integers labels,
                                     std::int64_t ignore_index, const LogitTransform& transform,
                                     const TokenGrad& grad, void* out, std::int64_t out_stride,
                                     Stream stream) {
  return with_types(
      logits.dtype, grad.grad_entropy.dtype != Dtype::kNone, transform.softcap != 0,
      [&](auto type, auto by_entropy, auto capped) {
        const std::int64_t entries = kLoadsOfBlock * kVector<type.value>;
        const std::int64_t blocks = (logits.vocabulary + entries - 1) / entries;
        if (logits.rows * blocks >= std::int64_t(1) << 31) return "more blocks than a grid holds";
        return launch(token_logprobs_backward_kernel<type.value, by_entropy.value, capped.value>,
                      logits.rows * blocks, kThreads, stream, logits, labels, ignore_index,
                      transform, grad, out, out_stride, blocks);
      });
}

Failure softmax_chunk_cuda(const Logits& logits, Integers labels, std::int64_t ignore_index,
                           const LogitTransform& transform, const TokenOut& out,
                           const ChunkOut& chunk, Stream stream) {
  return with_types(chunk.dtype, wants_extras(out), transform.softcap != 0,
                    [&](auto type, auto extras, auto capped) {
                      return launch(softmax_chunk_kernel<type.value, extras.value, capped.value>,
                                    logits.rows, kThreads, stream, logits, labels, ignore_index,
                                    transform, out, chunk.data, chunk.stride);
                    });
}

Failure chunk_gradient_cuda(const Logits& logits, Integers labels, std::int64_t ignore_index,
                            const LogitTransform& transform, const TokenGrad& grad,
                            const ChunkOut& chunk, Stream stream) {
  return with_types(chunk.dtype, grad.grad_entropy.dtype != Dtype::kNone, transform.softcap != 0,
                    [&](auto type, auto by_entropy, auto capped) {
                      return launch(
                          chunk_gradient_kernel<type.value, by_entropy.value, capped.value>,
                          logits.rows, kThreads, stream, logits, labels, ignore_index, transform,
                          grad, chunk.data, chunk.stride);
                    });
}

}  // namespace drrlhf::cuda
