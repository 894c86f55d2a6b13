// Per-pair preference losses with their derivatives by the two log-ratios. Formulas and sources:
// drrlhf/reference.py, pair_losses.
#pragma once

#include "math.h"

namespace drrlhf {

enum class LossType : int {
  kSigmoid,
  kHinge,
  kIpo,
  kExoPair,
  kRobust,
  kDiscopop,
  kSigmoidNorm,
  kNcaPair,
  kBcoPair,
  kSppoHard,
  kApoZero,
  kApoDown,
  kSimpo,
};

enum class Divergence : int { kReverseKl, kForwardKl, kJs, kAlpha };

struct PairOptions {
  LossType type;
  double beta, eps, gamma, tau;
  Divergence divergence;
  double alpha, exponent_limit;
};

struct PairLoss {
  double loss, d_chosen, d_rejected;
};

struct Score {
  double value, slope;
};

// f'(exp(u)) up to a constant, and its derivative by u.
DRRLHF_HD Score divergence_score(double u, const PairOptions& o) {
  if (o.divergence == Divergence::kForwardKl) return {1 - exp(-u), exp(-u)};
  if (o.divergence == Divergence::kJs) return {0.69314718055994530942 - softplus(-u), sigmoid(-u)};
  const double k = o.alpha - 1;
  if (o.divergence == Divergence::kAlpha && fabs(k) >= 1e-6) {
    const double x = k * u;
    const bool cut = x > o.exponent_limit;
    return {expm1(cut ? o.exponent_limit : x) / k, cut ? 0.0 : exp(x)};
  }
  return {u, 1.0};
}

// chosen, rejected: log-ratios (log-probs for simpo). chosen_length, rejected_length: tokens, used
// by ipo, sigmoid_norm and simpo.
DRRLHF_HD PairLoss pair_loss(double chosen, double rejected, double chosen_length,
                             double rejected_length, const PairOptions& o) {
  const double beta = o.beta, eps = o.eps;
  const Score sc = divergence_score(chosen, o), sr = divergence_score(rejected, o);
  // Losses of h = beta (score difference): loss and d loss / d h.
  const double h = beta * (sc.value - sr.value);
  double loss = 0.0, slope = 0.0;
  switch (o.type) {
    case LossType::kSigmoid:
      loss = (1 - eps) * softplus(-h) + eps * softplus(h);
      slope = eps * sigmoid(h) - (1 - eps) * sigmoid(-h);
      break;
    case LossType::kHinge:
      loss = h < 1 ? 1 - h : (h == h ? 0.0 : h);
      slope = h < 1 ? -1.0 : 0.0;
      break;
    case LossType::kExoPair: {
      const double win = -softplus(-h), lose = -softplus(h);
      const double pw = sigmoid(h), pl = sigmoid(-h);
      const double a = win - log1p(-eps), b = lose - log(eps);
      loss = pw * a + pl * b;
      slope = pw * pl * (a - b);
      break;
    }
    case LossType::kRobust:
      loss = ((1 - eps) * softplus(-h) - eps * softplus(h)) / (1 - 2 * eps);
      slope = -((1 - eps) * sigmoid(-h) + eps * sigmoid(h)) / (1 - 2 * eps);
      break;
    case LossType::kDiscopop: {
      // exp(-h) gate as one exponential: apart, they overflow and underflow to inf * 0.
      const double x = h / o.tau, gate = sigmoid(x), off = sigmoid(-x);
      const double gated = exp(-h - softplus(-x));
      loss = softplus(-h) * off + gated;
      slope = -sigmoid(-h) * off - gated + (gated - softplus(-h) * gate) * off / o.tau;
      break;
    }
    case LossType::kIpo:
    case LossType::kSigmoidNorm:
    case LossType::kSimpo: {
      const double lc = chosen_length < 1 ? 1.0 : chosen_length;
      const double lr = rejected_length < 1 ? 1.0 : rejected_length;
      const double mean = sc.value / lc - sr.value / lr;
      if (o.type == LossType::kIpo) {
        const double miss = mean - 1 / (2 * beta);
        loss = miss * miss;
        slope = 2 * miss;
      } else {
        const double x = beta * mean - (o.type == LossType::kSimpo ? o.gamma : 0.0);
        loss = softplus(-x);
        slope = -beta * sigmoid(-x);
      }
      return {loss, slope * sc.slope / lc, -slope * sr.slope / lr};
    }
    case LossType::kNcaPair: {
      const double gc = beta * chosen, gr = beta * rejected;
      return {softplus(-gc) + 0.5 * softplus(gc) + 0.5 * softplus(gr),
              beta * (0.5 * sigmoid(gc) - sigmoid(-gc)), beta * 0.5 * sigmoid(gr)};
    }
    case LossType::kBcoPair: {
      const double gc = beta * chosen, gr = beta * rejected;
      return {softplus(-gc) + softplus(gr), -beta * sigmoid(-gc), beta * sigmoid(gr)};
    }
    case LossType::kSppoHard: {
      const double win = chosen - 0.5 / beta, lose = rejected + 0.5 / beta;
      return {win * win + lose * lose, 2 * win, 2 * lose};
    }
    case LossType::kApoZero: {
      const double gc = beta * chosen, gr = beta * rejected;
      const double pc = sigmoid(-gc), pr = sigmoid(gr);
      return {pc + pr, -beta * pc * sigmoid(gc), beta * pr * sigmoid(-gr)};
    }
    case LossType::kApoDown: {
      const double gc = beta * chosen, gd = beta * (rejected - chosen);
      const double pc = sigmoid(gc), pd = sigmoid(gd);
      const double dc = beta * pc * sigmoid(-gc), dd = beta * pd * sigmoid(-gd);
      return {pc + pd, dc - dd, dd};
    }
  }
  return {loss, slope * beta * sc.slope, -slope * beta * sr.slope};
}

// -log sigmoid(r+ - r- - margin) + center (r+ + r-)^2.
DRRLHF_HD PairLoss reward_pair_loss(double chosen, double rejected, double margin, double center) {
  const double x = chosen - rejected - margin, total = chosen + rejected;
  const double slope = -sigmoid(-x), pull = 2 * center * total;
  return {softplus(-x) + center * total * total, slope + pull, -slope + pull};
}

}  // namespace drrlhf
