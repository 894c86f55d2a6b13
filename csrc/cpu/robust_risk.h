// robust_risk on the CPU, on raw pointers and in float64. Launched by csrc/ops.cpp, which checks.
#pragma once

#include "../core/dual_search.h"

namespace drrlhf::cpu {

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

}  // namespace drrlhf::cpu
