// The CPU kernels, on raw pointers and in float64. Launched by csrc/ops.cpp, which checks.
#pragma once

#include "../core/dual_search.h"
#include "../core/pair_losses.h"

namespace drrlhf {

// What every robust loss takes besides its losses. nominal (n,) or null for uniform; groups (n,)
// and group_weights (num_groups,) for Kind::kGroup alone, where the weights are stepped in place.
struct AdversaryArguments {
  Ambiguity set;
  const double* nominal;
  const std::int64_t* groups;
  double* group_weights;
  int num_groups;
};

// Worst-case value and dual of losses l (n,), any of them possibly non-finite; writes q (n,).
Solution robust_risk_cpu(const double* l, std::int64_t n, const AdversaryArguments& adversary,
                         double* q);

// Per-pair losses (n,) and derivatives (n,) of log-ratios; lengths may be null where unused.
void pair_losses_cpu(const double* chosen, const double* rejected, const double* chosen_lengths,
                     const double* rejected_lengths, std::int64_t n, const PairOptions& options,
                     double* loss, double* d_chosen, double* d_rejected);

// The same for rewards; margin may be null.
void reward_losses_cpu(const double* chosen, const double* rejected, const double* margin,
                       std::int64_t n, double center, double* loss, double* d_chosen,
                       double* d_rejected);

// d *= q, exactly 0 where q is 0 whatever d holds.
void weigh_cpu(const double* q, std::int64_t n, double* d);

}  // namespace drrlhf
