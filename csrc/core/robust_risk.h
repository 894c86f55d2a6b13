// From losses as they come to worst-case weights: nominal weights normalised, masked losses put
// aside, and what has no answer kept visible. Definition: drrlhf/reference/robust_risk.py.
#pragma once

#include "dual_search.h"

namespace drrlhf {

// What an adversary takes besides the losses. `nominal`: i -> weight >= 0, read where not
// `uniform`. `group`: i -> id, for Kind::kGroup alone, where weights (size,) are stepped in place
// and masses, group_losses (size,) are scratch.
template <class Nominal, class Group>
struct AdversaryOf {
  Ambiguity set;
  bool uniform;
  Nominal nominal;
  Group group;
  double *weights, *masses, *group_losses;
  int size;
};

// l, p, d: scratch (n,). `loss`: i -> loss of pair i, any of them possibly not finite. Writes q
// (n,). A nominal weight that is negative or not finite, or an out-of-range group id, gives NaN.
template <class Team, class Loss, class Adversary>
DRRLHF_HD Solution robust_risk(const Team& team, Loss loss, const Adversary& adversary, double* l,
                               double* p, double* d, double* q) {
  const auto fill = [&](double value, double masked) {
    team.each([=](std::int64_t i) { q[i] = p[i] > 0 ? value : masked; });
  };
  double total = double(team.n);
  bool legal = true;
  if (!adversary.uniform) {
    const auto nominal = adversary.nominal;
    const Sums<2> m = team.template sum<2>([=](std::int64_t i) {
      const double x = nominal(i);
      return Sums<2>{{x, x >= 0 && x < kInfinity ? 0.0 : 1.0}};
    });
    total = m.v[0];
    legal = m.v[1] == 0;
  }
  if (adversary.set.kind == Kind::kGroup) {
    const auto group = adversary.group;
    const int size = adversary.size;
    const Sums<1> outside = team.template sum<1>([=](std::int64_t i) {
      const std::int64_t g = group(i);
      return Sums<1>{{g >= 0 && g < size ? 0.0 : 1.0}};
    });
    legal = legal && outside.v[0] == 0;
  }
  if (!legal || !(total > 0)) {  // without losses or weights: 0
    team.each([=](std::int64_t i) { q[i] = legal ? 0.0 : kNan; });
    return legal ? Solution{0.0, 0.0} : Solution{kNan, kNan};
  }
  const bool uniform = adversary.uniform;
  const double share = 1.0 / total;
  const auto nominal = adversary.nominal;
  team.each([=](std::int64_t i) {
    p[i] = uniform ? share : nominal(i) / total;
    l[i] = p[i] > 0 ? loss(i) : 0.0;
  });
  const Sums<2> carried = team.template sum<2>(
      [=](std::int64_t i) { return Sums<2>{{l[i] - l[i] == 0 ? 0.0 : 1.0, p[i] * l[i]}}; });
  if (carried.v[0] != 0) {  // must be seen: in the value, and in every weight
    fill(kNan, 0.0);
    return {carried.v[1], kNan};
  }
  const Problem problem{l, p, d, q};
  if (adversary.set.kind != Kind::kGroup) return worst_case(team, problem, adversary.set);
  trim_top(team, p, l, adversary.set.trim);
  return group_step(team, problem, adversary.group, adversary.weights, adversary.size,
                    adversary.set.parameter, adversary.set.update, adversary.masses,
                    adversary.group_losses);
}

}  // namespace drrlhf
