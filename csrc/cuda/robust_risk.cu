// robust_risk: losses to worst-case value and weights, by one block, or by a grid where there are
// more than kOneBlockPairs.
#include "worst_case.h"

namespace drrlhf::cuda {
namespace {

template <bool kGrid>
__global__ void __launch_bounds__(kThreads, 1)
    robust_risk_kernel(Numbers losses, std::int64_t n, CudaAdversary adversary, SolutionOut out,
                       Scratch s) {
  DRRLHF_SHARED(Partials, partials);
  const auto team = team_of<kGrid>(n, partials, s);
  solve(team, [&](std::int64_t i) { return number_at(losses, i); }, adversary, out, s);
}

__global__ void __launch_bounds__(kThreads, 1)
    solve_pairs_kernel(std::int64_t n, CudaAdversary adversary, SolutionOut out, PairOut pairs,
                       Scratch s) {
  DRRLHF_SHARED(Partials, partials);
  solve_pairs(team_of<true>(n, partials, s), adversary, out, pairs, s);
}

// Blocks that are worth their barriers.
int blocks_for(std::int64_t n, const Workspace& workspace) {
  const std::int64_t wanted = (n + 4 * kThreads - 1) / (4 * kThreads);
  return static_cast<int>(wanted < workspace.blocks ? wanted : workspace.blocks);
}

}  // namespace

int cooperative_blocks() {
  const int risk = blocks_at_once(robust_risk_kernel<true>, kThreads);
  const int pairs = blocks_at_once(solve_pairs_kernel, kThreads);
  return risk < pairs ? risk : pairs;
}

std::int64_t scratch_bytes(std::int64_t n, int num_groups, int blocks) {
  const std::int64_t doubles =
      2 * std::int64_t(blocks) * kMostSums + 6 * n + 2 * std::int64_t(num_groups);
  return kCounters + doubles * static_cast<std::int64_t>(sizeof(double));
}

Failure solve_many_pairs(std::int64_t n, const CudaAdversary& adversary, const SolutionOut& out,
                         const PairOut& pairs, const Workspace& workspace, Stream stream) {
  const Scratch s(workspace, n, adversary.num_groups);
  if (const Failure failure = clear_cuda(workspace.scratch, kCounters, stream)) return failure;
  return launch_cooperative(solve_pairs_kernel, blocks_for(n, workspace), kThreads, stream, n,
                            adversary, out, pairs, s);
}

Failure robust_risk_cuda(Numbers losses, std::int64_t n, const CudaAdversary& adversary,
                         const SolutionOut& out, Workspace workspace, Stream stream) {
  const Scratch s(workspace, n, adversary.num_groups);
  if (n <= kOneBlockPairs) {
    return launch(robust_risk_kernel<false>, 1, kThreads, stream, losses, n, adversary, out, s);
  }
  if (const Failure failure = clear_cuda(workspace.scratch, kCounters, stream)) return failure;
  return launch_cooperative(robust_risk_kernel<true>, blocks_for(n, workspace), kThreads, stream,
                            losses, n, adversary, out, s);
}

}  // namespace drrlhf::cuda
