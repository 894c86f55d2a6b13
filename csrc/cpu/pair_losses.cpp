#include "losses.h"

namespace drrlhf {

void pair_losses_cpu(const double* chosen, const double* rejected, const double* chosen_lengths,
                     const double* rejected_lengths, std::int64_t n, const PairOptions& options,
                     double* loss, double* d_chosen, double* d_rejected) {
  for (std::int64_t i = 0; i < n; ++i) {
    const double lc = chosen_lengths == nullptr ? 1.0 : chosen_lengths[i];
    const double lr = rejected_lengths == nullptr ? 1.0 : rejected_lengths[i];
    const PairLoss pair = pair_loss(chosen[i], rejected[i], lc, lr, options);
    loss[i] = pair.loss;
    d_chosen[i] = pair.d_chosen;
    d_rejected[i] = pair.d_rejected;
  }
}

void reward_losses_cpu(const double* chosen, const double* rejected, const double* margin,
                       std::int64_t n, double center, double* loss, double* d_chosen,
                       double* d_rejected) {
  for (std::int64_t i = 0; i < n; ++i) {
    const double m = margin == nullptr ? 0.0 : margin[i];
    const PairLoss pair = reward_pair_loss(chosen[i], rejected[i], m, center);
    loss[i] = pair.loss;
    d_chosen[i] = pair.d_chosen;
    d_rejected[i] = pair.d_rejected;
  }
}

void weigh_cpu(const double* q, std::int64_t n, double* d) {
  for (std::int64_t i = 0; i < n; ++i) d[i] = q[i] == 0 ? 0.0 : q[i] * d[i];
}

}  // namespace drrlhf
