// sequence_logprobs: sums or means of token log-probs by sequence, and back to the tokens.
#include "sequence_sums.h"

namespace drrlhf::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    sequence_logprobs_kernel(Numbers logps, Sequences q, bool mean, int warps, NumbersOut out) {
  DRRLHF_SHARED(WarpSums, shared);
  const int of_block = kWarps / warps, members = warps * kLanes;
  const std::int64_t s = std::int64_t(blockIdx.x) * of_block + threadIdx.x / members;
  const SequenceSum sum = sequence_sum(logps, q, s, warps, shared);
  if (threadIdx.x % members == 0 && s < q.count) {
    put(out, s, mean ? sum.total / (sum.count < 1 ? 1.0 : sum.count) : sum.total);
  }
}

__global__ void __launch_bounds__(kThreads)
    sequence_logprobs_backward_kernel(Numbers grad, Sequences q, bool mean, NumbersOut out) {
  DRRLHF_SHARED(WarpSums, shared);
  const std::int64_t s = blockIdx.x;
  double share = number_at(grad, s);
  if (mean) {
    const SequenceSum sum = sequence_sum({nullptr, Dtype::kNone}, q, s, kWarps, shared);
    share /= sum.count < 1 ? 1.0 : sum.count;
  }
  Span span = span_of(q, s);
  if (!span.legal) {  // what it means is unknown: every token that it could mean is told so
    span = {0, q.tokens, false};
    share = kNan;
  }
  for (std::int64_t i = span.begin + threadIdx.x; i < span.end; i += kThreads) {
    put(out, i, integer_at(q.labels, i) == q.ignore_index ? 0.0 : share);
  }
}

}  // namespace

Failure sequence_logprobs_cuda(Numbers logps, const Sequences& sequences, bool mean, NumbersOut out,
                               Stream stream) {
  const int warps = warps_for(sequences.count, 1), of_block = kWarps / warps;
  return launch(sequence_logprobs_kernel, (sequences.count + of_block - 1) / of_block, kThreads,
                stream, logps, sequences, mean, warps, out);
}

Failure sequence_logprobs_backward_cuda(Numbers grad, const Sequences& sequences, bool mean,
                                        NumbersOut out, Stream stream) {
  return launch(sequence_logprobs_backward_kernel, sequences.count, kThreads, stream, grad,
                sequences, mean, out);
}

}  // namespace drrlhf::cuda
