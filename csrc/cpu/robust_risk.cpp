#include "../core/robust_risk.h"

#include <vector>

#include "robust_risk.h"
#include "vectorised.h"

namespace drrlhf::cpu {
namespace {

struct Nominal {
  const double* weights;
  double operator()(std::int64_t i) const { return weights[i]; }
};

struct Group {
  const std::int64_t* ids;
  std::int64_t operator()(std::int64_t i) const { return ids[i]; }
};

}  // namespace

Solution robust_risk_cpu(const double* losses, std::int64_t n, const AdversaryArguments& a,
                         double* q) {
  std::vector<double> room(3 * n + 2 * a.num_groups);
  double *scratch = room.data(), *groups = scratch + 3 * n;
  const AdversaryOf<Nominal, Group> adversary = {
      a.set,  a.nominal == nullptr,  {a.nominal}, {a.groups}, a.group_weights,
      groups, groups + a.num_groups, a.num_groups};
  return vectorised([=] {
    return robust_risk(
        SerialTeam{n}, [=](std::int64_t i) { return losses[i]; }, adversary, scratch, scratch + n,
        scratch + 2 * n, q);
  });
}

}  // namespace drrlhf::cpu
