// preference_loss and reward_loss: each block makes the losses of some pairs, the last one to
// arrive finds the worst case.
#include "worst_case.h"

namespace drrlhf {
namespace {

// Few pairs a block: exponentials in float64 are slow on one processor.
constexpr int kPairsOfBlock = kThreads / 4;

template <class Pair>
__global__ void __launch_bounds__(kThreads, 1)
    pairs_kernel(Pair pair, std::int64_t n, bool solves, CudaAdversary adversary, SolutionOut out,
                 PairOut pairs, Scratch s) {
  DRRLHF_SHARED(Partials, partials);
  const std::int64_t i = std::int64_t(blockIdx.x) * kPairsOfBlock + threadIdx.x;
  if (threadIdx.x < kPairsOfBlock && i < n) keep_pair(i, pair(i, pairs), pairs, s);
  if (solves && arrives_last(s)) {
    solve_pairs(team_of<false>(n, partials, s), adversary, out, pairs, s);
  }
}

template <class Pair>
Failure launch_pairs(const Pair& pair, std::int64_t n, const CudaAdversary& adversary,
                     const SolutionOut& out, const PairOut& pairs, const Workspace& workspace,
                     Stream stream) {
  const Scratch s(workspace, n, adversary.num_groups);
  const bool solves = n <= kOneBlockPairs;
  const std::int64_t blocks = (n + kPairsOfBlock - 1) / kPairsOfBlock;
  Failure failure =
      solves && blocks > 1 ? clear_cuda(workspace.scratch, kCounters, stream) : nullptr;
  if (failure != nullptr) return failure;
  failure = launch(pairs_kernel<Pair>, blocks, kThreads, stream, pair, n, solves, adversary, out,
                   pairs, s);
  if (failure != nullptr || solves) return failure;
  return solve_many_pairs(n, adversary, out, pairs, workspace, stream);
}

struct PreferencePair {
  PairTensors in;
  PairOptions options;

  __device__ PairLoss operator()(std::int64_t i, const PairOut& out) const {
    double chosen = number_at(in.chosen, i), rejected = number_at(in.rejected, i);
    if (in.ref_chosen.dtype != Dtype::kNone) {
      chosen -= number_at(in.ref_chosen, i);
      rejected -= number_at(in.ref_rejected, i);
    }
    put(out.chosen_rewards, i, options.beta * chosen);
    put(out.rejected_rewards, i, options.beta * rejected);
    return pair_loss(chosen, rejected, number_at(in.chosen_lengths, i),
                     number_at(in.rejected_lengths, i), options);
  }
};

struct RewardPair {
  Numbers chosen, rejected, margin;
  double center;

  __device__ PairLoss operator()(std::int64_t i, const PairOut&) const {
    return reward_pair_loss(number_at(chosen, i), number_at(rejected, i), number_at(margin, i),
                            center);
  }
};

}  // namespace

Failure preference_loss_cuda(const PairTensors& in, std::int64_t n, const PairOptions& options,
                             const CudaAdversary& adversary, const SolutionOut& out,
                             const PairOut& pairs, Workspace workspace, Stream stream) {
  return launch_pairs(PreferencePair{in, options}, n, adversary, out, pairs, workspace, stream);
}

Failure reward_loss_cuda(Numbers chosen, Numbers rejected, Numbers margin, std::int64_t n,
                         double center, const CudaAdversary& adversary, const SolutionOut& out,
                         const PairOut& pairs, Workspace workspace, Stream stream) {
  return launch_pairs(RewardPair{chosen, rejected, margin, center}, n, adversary, out, pairs,
                      workspace, stream);
}

}  // namespace drrlhf
