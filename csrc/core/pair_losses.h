// The pair loss that is fused with the sums before it and the worst case after it. Definition:
// drrlhf/reference/sequence_preference_loss.py.
#pragma once

#include "math.h"

namespace drrlhf {

struct PairOptions {
  double beta, label_smoothing;
};

struct PairLoss {
  double loss, slope;  // d loss / d h
};

// DPO's loss of h = beta (chosen log-ratio - rejected log-ratio), with label smoothing cDPO's.
DRRLHF_HD PairLoss preference_pair_loss(double h, double label_smoothing) {
  const double eps = label_smoothing;
  return {(1 - eps) * softplus(-h) + eps * softplus(h), eps * sigmoid(h) - (1 - eps) * sigmoid(-h)};
}

}  // namespace drrlhf
