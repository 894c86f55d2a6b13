// What every robust kernel ends with: the search by one block or by a grid, and its answer written.
#pragma once

#include "../core/robust_risk.h"
#include "device_team.h"

namespace drrlhf::cuda {

// Bytes at the front of the scratch by which blocks count each other; 0 before a launch.
constexpr std::int64_t kCounters = 16;

// Views of the workspace; loss and slope (n,) are what the pairs' kernels leave there.
struct Scratch {
  GridBarrier* barrier;
  unsigned* arrived;
  double *grid_partials, *loss, *slope, *l, *p, *d, *q, *masses, *group_losses;

  Scratch(const Workspace& workspace, std::int64_t n, int num_groups) {
    barrier = static_cast<GridBarrier*>(workspace.scratch);
    arrived = reinterpret_cast<unsigned*>(barrier + 1);
    double* next = reinterpret_cast<double*>(static_cast<char*>(workspace.scratch) + kCounters);
    const auto take = [&](std::int64_t count) { return (next += count) - count; };
    grid_partials = take(2 * std::int64_t(workspace.blocks) * kMostSums);
    for (double** array : {&loss, &slope, &l, &p, &d, &q}) *array = take(n);
    masses = take(num_groups);
    group_losses = take(num_groups);
  }
};

struct NominalOf {
  Numbers weights;
  __device__ double operator()(std::int64_t i) const { return number_at(weights, i); }
};

struct GroupOf {
  Integers ids;
  __device__ std::int64_t operator()(std::int64_t i) const { return integer_at(ids, i); }
};

template <bool kGrid>
__device__ inline DeviceTeam<kGrid> team_of(std::int64_t n, Partials& partials, const Scratch& s) {
  return {n, {&partials, 0}, s.barrier, s.grid_partials, 0, 0};
}

// `loss`: i -> loss. Writes the answer but for what is by pair, which q in the scratch tells.
template <class Team, class Loss>
__device__ void solve(const Team& team, Loss loss, const CudaAdversary& adversary,
                      const SolutionOut& out, const Scratch& s) {
  if (adversary.set.kind == Kind::kGroup) {
    team.one([&] {
      for (int g = 0; g < adversary.num_groups; ++g) adversary.after[g] = adversary.before[g];
    });
  }
  const AdversaryOf<NominalOf, GroupOf> solver = {
      adversary.set,       adversary.nominal.dtype == Dtype::kNone,
      {adversary.nominal}, {adversary.groups},
      adversary.after,     s.masses,
      s.group_losses,      adversary.num_groups};
  const Solution found = robust_risk(team, loss, solver, s.l, s.p, s.d, s.q);
  if (team.rank() == 0) {
    put(out.value, 0, found.value);
    put(out.dual, 0, found.dual);
  }
  team.each([&](std::int64_t i) { put(out.weights, i, s.q[i]); });
}

// The losses and slopes that lie in the scratch: worst case, and the gradient of the sums.
template <class Team>
__device__ void solve_pairs(const Team& team, const CudaAdversary& adversary,
                            const SolutionOut& out, const PairOut& pairs, const Scratch& s) {
  // Other blocks may have written them: not by way of this processor's cache.
  solve(team, [&](std::int64_t i) { return from_others(s.loss + i); }, adversary, out, s);
  team.each([&](std::int64_t i) {
    const double q = s.q[i];
    // Exactly 0 where the weight is, whatever the derivative.
    const double d = q == 0 ? 0.0 : q * from_others(s.slope + i);
    put(pairs.d_sums, i, d);
    put(pairs.d_sums, team.n + i, -d);
  });
}

// Whether this block is the last of the grid to get here; it then sees what all have written.
__device__ inline bool arrives_last(const Scratch& s) {
  DRRLHF_SHARED(bool, last);
  __threadfence();
  __syncthreads();
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) {
    last = atomicAdd(s.arrived, 1u) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Of pairs whose losses lie in the scratch, when there are too many for one block.
Failure solve_many_pairs(std::int64_t n, const CudaAdversary& adversary, const SolutionOut& out,
                         const PairOut& pairs, const Workspace& workspace, Stream stream);

}  // namespace drrlhf::cuda
