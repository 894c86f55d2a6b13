// The CUDA kernels as functions of raw pointers and a stream; no torch here. csrc/ops_cuda.cpp
// checks, allocates and calls. Each returns null, or why it could not launch; none synchronises.
#pragma once

#include "../core/dual_search.h"
#include "../core/pair_losses.h"

namespace drrlhf::cuda {

// A cudaStream_t, for those who have no CUDA header.
using Stream = void*;
using Failure = const char*;

enum class Dtype : int { kNone, kFloat, kDouble, kBFloat16, kHalf };

// n numbers of a dtype that is known at run time; kNone where there are none.
struct Numbers {
  const void* data;
  Dtype dtype;
};

struct NumbersOut {
  void* data;
  Dtype dtype;
};

// int64 where `wide`, else int32; null where there are none.
struct Integers {
  const void* data;
  bool wide;
};

// What every robust loss takes besides its losses. before, after (num_groups,) for Kind::kGroup.
struct CudaAdversary {
  Ambiguity set;
  Numbers nominal;
  Integers groups;
  const double* before;
  double* after;
  int num_groups;
};

struct SolutionOut {
  NumbersOut value, weights, dual;
};

// Up to this many pairs one block searches for the worst case; above, the whole GPU does, in a
// cooperative launch.
constexpr std::int64_t kOneBlockPairs = 16384;

// How many blocks a cooperative search may have on the current device; 0 where it cannot be asked.
int cooperative_blocks();

// Bytes of scratch for n pairs.
std::int64_t scratch_bytes(std::int64_t n, int num_groups, int blocks);

struct Workspace {
  void* scratch;
  int blocks;  // as cooperative_blocks() says
};

Failure robust_risk_cuda(Numbers losses, std::int64_t n, const CudaAdversary& adversary,
                         const SolutionOut& out, Workspace workspace, Stream stream);

// Sequences are rows of `length` tokens, or with boundaries (S+1,) segments of packed ones.
// Boundaries that leave [0, tokens] or decrease give NaN.
struct Sequences {
  Integers labels, boundaries;
  std::int64_t count, length, tokens, ignore_index;
};

Failure sequence_logprobs_cuda(Numbers logps, const Sequences& sequences, bool mean, NumbersOut out,
                               Stream stream);

// out (tokens,) = each sequence's number at its counted tokens, 0 elsewhere.
Failure sequence_logprobs_backward_cuda(Numbers grad, const Sequences& sequences, bool mean,
                                        NumbersOut out, Stream stream);

// By pair (n,) losses and rewards; by sequence (2n,) sums and the gradient.
struct PairOut {
  NumbersOut losses, chosen_rewards, rejected_rewards, sums, d_sums;
};

// Sequences are stacked [chosen..., rejected...].
Failure sequence_preference_loss_cuda(Numbers logps, const Sequences& sequences, Numbers ref_logps,
                                      std::int64_t n, const PairOptions& options,
                                      const CudaAdversary& adversary, const SolutionOut& out,
                                      const PairOut& pairs, Workspace workspace, Stream stream);

// Logits (rows, vocabulary) with neighbouring entries, `stride` entries from row to row. Entry 0 is
// entry `first` of the vocabulary that the labels mean.
struct Logits {
  const void* data;
  Dtype dtype;
  std::int64_t rows, vocabulary, stride, first;
};

// z = softcap tanh(scale x / softcap) inverse_temperature, without the tanh where softcap is 0.
struct LogitTransform {
  float scale, softcap, inverse_temperature;
};

// (rows,) each; entropy, mean, log_sum_squares and is_top1 may be null.
struct TokenOut {
  float *logp, *lse, *lse_tail, *entropy, *mean, *log_sum_squares;
  bool* is_top1;
};

Failure token_logprobs_cuda(const Logits& logits, Integers labels, std::int64_t ignore_index,
                            const LogitTransform& transform, const TokenOut& out, Stream stream);

// Upstream gradients and statistics (rows,); grad, grad_entropy may be kNone, entropy null.
struct TokenGrad {
  Numbers grad, grad_entropy;
  const float *logp, *lse, *lse_tail, *entropy;
};

// out (rows, vocabulary) with rows `out_stride` entries apart; may be the logits.
Failure token_logprobs_backward_cuda(const Logits& logits, Integers labels,
                                     std::int64_t ignore_index, const LogitTransform& transform,
                                     const TokenGrad& grad, void* out, std::int64_t out_stride,
                                     Stream stream);

// Where a chunk of gradients goes, rows `stride` entries apart: over the logits, in whose rows the
// narrower dtypes have room, or elsewhere.
struct ChunkOut {
  void* data;
  Dtype dtype;
  std::int64_t stride;
};

// token_logprobs of a chunk of float32 logits, and d logp / d logits; 0 where the label is ignored
// or logp is NaN.
Failure softmax_chunk_cuda(const Logits& logits, Integers labels, std::int64_t ignore_index,
                           const LogitTransform& transform, const TokenOut& out,
                           const ChunkOut& chunk, Stream stream);

// token_logprobs_backward of a chunk of float32 logits.
Failure chunk_gradient_cuda(const Logits& logits, Integers labels, std::int64_t ignore_index,
                            const LogitTransform& transform, const TokenGrad& grad,
                            const ChunkOut& chunk, Stream stream);

// out (rows, columns) = factor (rows,) x, exactly 0 where the factor is or the label is ignored;
// both contiguous and of one dtype. factor may be kNone, which is 1.
Failure scale_rows_cuda(const void* x, Dtype dtype, std::int64_t rows, std::int64_t columns,
                        Numbers factor, Integers labels, std::int64_t ignore_index, void* out,
                        Stream stream);

// Sets bytes to 0 in the order of the stream.
Failure clear_cuda(void* data, std::int64_t bytes, Stream stream);

}  // namespace drrlhf::cuda
