#include <vector>

#include "losses.h"

namespace drrlhf {
namespace {

struct Audit {
  double total;    // nominal mass before normalising
  bool finite;     // of the unmasked losses
  double carried;  // sum p l over unmasked pairs: non-finite where one of them is
};

// Copies losses to l, with 0 for masked pairs, and normalised nominal weights to p.
DRRLHF_MULTIVERSION Audit load(const double* losses, std::int64_t n, const double* nominal,
                               double* l, double* p) {
  const SerialTeam team{n};
  double total = double(n);
  if (nominal != nullptr) {
    total = team.sum<1>([=](std::int64_t i) { return Sums<1>{{nominal[i]}}; }).v[0];
  }
  if (!(total > 0)) return {0.0, true, 0.0};
  const double uniform = 1.0 / total;
  team.each([=](std::int64_t i) {
    p[i] = nominal == nullptr ? uniform : nominal[i] / total;
    l[i] = p[i] > 0 ? losses[i] : 0.0;
  });
  const Sums<2> sums = team.sum<2>(
      [=](std::int64_t i) { return Sums<2>{{l[i] - l[i] == 0 ? 0.0 : 1.0, p[i] * l[i]}}; });
  return {total, sums.v[0] == 0, sums.v[1]};
}

DRRLHF_MULTIVERSION Solution solve(const Problem& problem, std::int64_t n, Ambiguity set) {
  return worst_case(SerialTeam{n}, problem, set);
}

Solution solve_group(const Problem& problem, std::int64_t n, const AdversaryArguments& adversary) {
  const SerialTeam team{n};
  trim_top(team, problem.p, problem.l, adversary.set.trim);
  std::vector<double> scratch(2 * adversary.num_groups);
  return group_step(team, problem, adversary.groups, adversary.group_weights, adversary.num_groups,
                    adversary.set.a, adversary.set.b != 0, scratch.data(),
                    scratch.data() + adversary.num_groups);
}

}  // namespace

Solution robust_risk_cpu(const double* losses, std::int64_t n, const AdversaryArguments& adversary,
                         double* q) {
  std::vector<double> scratch(3 * n);
  double *l = scratch.data(), *p = l + n, *d = p + n;
  const Audit audit = load(losses, n, adversary.nominal, l, p);
  if (!(audit.total > 0)) {  // empty or fully masked
    for (std::int64_t i = 0; i < n; ++i) q[i] = 0;
    return {0.0, 0.0};
  }
  if (!audit.finite) {  // must be seen: in the value, and in every weight
    for (std::int64_t i = 0; i < n; ++i) q[i] = p[i] > 0 ? __builtin_nan("") : 0.0;
    return {audit.carried, __builtin_nan("")};
  }
  const Problem problem{l, p, d, q};
  return adversary.set.kind == Kind::kGroup ? solve_group(problem, n, adversary)
                                            : solve(problem, n, adversary.set);
}

}  // namespace drrlhf
