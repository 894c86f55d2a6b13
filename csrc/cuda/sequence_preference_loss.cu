// sequence_preference_loss: token log-probs to robust loss and gradients by sequence. Some warps
// sum each sequence of a pair, one thread makes the pair's loss, and the last block to arrive finds
// the worst case: one launch up to kOneBlockPairs pairs, two above.
#include "sequence_sums.h"
#include "worst_case.h"

namespace drrlhf::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 1)
    sequence_preference_loss_kernel(Numbers logps, Sequences q, Numbers ref_logps, std::int64_t n,
                                    int warps, PairOptions options, bool solves,
                                    CudaAdversary adversary, SolutionOut out, PairOut pairs,
                                    Scratch s) {
  DRRLHF_SHARED(Partials, partials);
  DRRLHF_SHARED(WarpSums, shared);
  // The first half of the block's groups of warps takes the chosen sequences.
  const int pairs_of_block = kWarps / warps / 2, members = warps * kLanes;
  const int group = threadIdx.x / members, pair = group % pairs_of_block;
  const bool is_rejected = group >= pairs_of_block;
  const std::int64_t i = std::int64_t(blockIdx.x) * pairs_of_block + pair;
  const std::int64_t sequence = i < n ? i + (is_rejected ? n : 0) : -1;
  const SequenceSum mine = sequence_sum(logps, q, sequence, warps, shared);
  DRRLHF_SHARED(WarpSums, ratios);
  if (threadIdx.x % members == 0 && sequence >= 0) {
    put(pairs.sums, sequence, mine.total);
    ratios.of[group] = {mine.total - number_at(ref_logps, sequence), mine.count};
  }
  __syncthreads();
  if (!is_rejected && threadIdx.x % members == 0 && sequence >= 0) {
    const double chosen = options.beta * ratios.of[pair].total;
    const double rejected = options.beta * ratios.of[pair + pairs_of_block].total;
    const PairLoss found = preference_pair_loss(chosen - rejected, options.label_smoothing);
    put(pairs.chosen_rewards, i, chosen);
    put(pairs.rejected_rewards, i, rejected);
    put(pairs.losses, i, found.loss);
    s.loss[i] = found.loss;
    s.slope[i] = options.beta * found.slope;
  }
  if (solves && arrives_last(s)) {
    solve_pairs(team_of<false>(n, partials, s), adversary, out, pairs, s);
  }
}

}  // namespace

Failure sequence_preference_loss_cuda(Numbers logps, const Sequences& sequences, Numbers ref_logps,
                                      std::int64_t n, const PairOptions& options,
                                      const CudaAdversary& adversary, const SolutionOut& out,
                                      const PairOut& pairs, Workspace workspace, Stream stream) {
  const Scratch s(workspace, n, adversary.num_groups);
  const bool solves = n <= kOneBlockPairs;
  const int warps = warps_for(2 * n, 2), of_block = kWarps / warps / 2;
  const std::int64_t blocks = (n + of_block - 1) / of_block;
  Failure failure =
      solves && blocks > 1 ? clear_cuda(workspace.scratch, kCounters, stream) : nullptr;
  if (failure != nullptr) return failure;
  failure = launch(sequence_preference_loss_kernel, blocks, kThreads, stream, logps, sequences,
                   ref_logps, n, warps, options, solves, adversary, out, pairs, s);
  if (failure != nullptr || solves) return failure;
  return solve_many_pairs(n, adversary, out, pairs, workspace, stream);
}

}  // namespace drrlhf::cuda
