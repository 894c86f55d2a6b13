// Worst-case weights of every ambiguity set, by searches that only reduce and never sort, so that
// one text serves a host thread, a CUDA block and a cluster. Formulas: drrlhf/ambiguity.py; an
// independent solution by sorting: drrlhf/reference/.
//
// Everything is float64. Losses enter shifted and scaled, d = (max - l) / (max - min) in [0, 1],
// so that neither their size nor their offset costs digits.
#pragma once

#include "team.h"

namespace drrlhf {

enum class Kind : int {
  kErm,
  kKlRadius,
  kKlTemperature,
  kTv,
  kChiSquareRadius,
  kChiSquarePenalty,
  kCvar,
  kCvarTemperature,
  kGroup,
};

// The set and its parameters, as drrlhf.ambiguity.Encoded names them.
struct Ambiguity {
  Kind kind;
  double parameter, temperature, trim;
  bool update;
};

// l: losses. p: nominal weights, sum 1, at least one > 0; trimming changes them. d: scratch, then
// the shifted losses. q: worst-case weights, written.
struct Problem {
  const double* l;
  double* p;
  double* d;
  double* q;
};

struct Solution {
  double value, dual;
};

constexpr int kMaxSteps = 200;
constexpr double kMassRounding = 1e-14;

// Fractions of each value that belong to the largest `mass` of p: all above the threshold, `share`
// of those equal to it.
struct Tail {
  double threshold, share;
  DRRLHF_HD double kept(double l) const {
    return l > threshold ? 1.0 : l == threshold ? share : 0.0;
  }
};

DRRLHF_HD double midpoint_of_bits(double low, double high) {
  // Order-preserving integers of doubles: halving between them finds any scale in 64 steps.
  const auto key = [](double x) {
    const std::uint64_t bits = double_to_bits(x);
    return bits >> 63 ? ~bits : bits | (std::uint64_t(1) << 63);
  };
  const std::uint64_t a = key(low), b = key(high);
  const std::uint64_t middle = a + (b - a) / 2;
  return bits_to_double(middle >> 63 ? middle & ~(std::uint64_t(1) << 63) : ~middle);
}

// The value v with p(l > v) < mass <= p(l >= v), and the share of its ties. mass in (0, 1].
// First real-valued pivots close in on it, one sum each; then the bracket snaps to the data.
template <class Team>
DRRLHF_HD Tail upper_tail(const Team& team, const double* l, const double* p, double mass,
                          double bottom, double top) {
  struct Above {
    double mass, count;
  };
  const auto above = [&](double pivot) {
    const Sums<2> m = team.template sum<2>([=](std::int64_t i) {
      return Sums<2>{{select(l[i] > pivot, p[i], 0.0), l[i] > pivot ? 1.0 : 0.0}};
    });
    return Above{m.v[0], m.v[1]};
  };
  // Invariant: p(l > high) < mass <= p(l >= low), so the threshold lies in [low, high].
  double low = bottom, high = top;
  double excess_low = 1 - mass, excess_high = -mass, count_low = kInfinity, count_high = 0;
  int side = 0;  // which end the last pivot replaced
  for (int step = 0; step < 40 && low < high && count_low - count_high > 3; ++step) {
    // Regula falsi; the Illinois rule and every fourth step a halving keep it from creeping.
    const double line = low + (high - low) * (excess_low / (excess_low - excess_high));
    const double pivot = step % 8 == 7   ? midpoint_of_bits(low, high)
                         : step % 4 == 3 ? low + 0.5 * (high - low)
                                         : line;
    if (!(pivot > low && pivot < high)) break;
    const Above at = above(pivot);
    if (at.mass >= mass) {
      low = pivot;
      excess_low = at.mass - mass;
      count_low = at.count;
      if (side == 1) excess_high *= 0.5;
      side = 1;
    } else {
      high = pivot;
      excess_high = at.mass - mass;
      count_high = at.count;
      if (side == -1) excess_low *= 0.5;
      side = -1;
    }
  }
  // The data values next to a pivot: the smallest above it and the largest not above it.
  const auto neighbours = [&](double pivot) {
    const Sums<2> m = team.template max<2>([=](std::int64_t i) {
      const double x = p[i] > 0 ? l[i] : -kInfinity, minus = p[i] > 0 ? -l[i] : -kInfinity;
      return Sums<2>{{l[i] > pivot ? minus : -kInfinity, l[i] > pivot ? -kInfinity : x}};
    });
    return Sums<2>{{-m.v[0], m.v[1]}};
  };
  if (low < high) high = neighbours(high).v[1];
  if (low < high && count_low < kInfinity) low = neighbours(low).v[0];
  while (low < high) {
    double pivot = midpoint_of_bits(low, high);
    pivot = pivot < high ? pivot : low;
    const Sums<2> next = neighbours(pivot);
    if (above(pivot).mass >= mass) {
      low = next.v[0];
    } else {
      high = next.v[1];
    }
  }
  const Sums<2> masses = team.template sum<2>([=](std::int64_t i) {
    return Sums<2>{{select(l[i] > high, p[i], 0.0), select(l[i] == high, p[i], 0.0)}};
  });
  // A part below the rounding of the masses is none: trimming must not leave 1e-17 of a loss behind
  // for the adversary to find.
  const double part = mass - masses.v[0];
  const double share = part < kMassRounding                 ? 0.0
                       : masses.v[1] - part < kMassRounding ? 1.0
                                                            : part / masses.v[1];
  return {high, share};
}

// The sum of f(i), one number each.
template <class Team, class F>
DRRLHF_HD double total(const Team& team, F f) {
  return team.template sum<1>([=](std::int64_t i) { return Sums<1>{{f(i)}}; }).v[0];
}

struct Bounds {
  double bottom, top;
};

// The smallest and the largest unmasked loss.
template <class Team>
DRRLHF_HD Bounds loss_bounds(const Team& team, const double* l, const double* p) {
  const Sums<2> m = team.template max<2>([=](std::int64_t i) {
    const bool in = p[i] > 0;
    return Sums<2>{{in ? l[i] : -kInfinity, in ? -l[i] : -kInfinity}};
  });
  return {-m.v[1], m.v[0]};
}

// sum q l as max - span * sum q d, from the weights as written.
template <class Team>
DRRLHF_HD double expected_loss(const Team& team, const Problem& problem, double top, double span) {
  const double *q = problem.q, *d = problem.d;
  return top - span * total(team, [=](std::int64_t i) { return q[i] * d[i]; });
}

struct Moments {  // of d under p exp(-s d): log of the normaliser, mean, variance
  double log_z, mean, variance;
};

// Inverse temperature in units of the span; finite, so that -s * 0 stays 0.
DRRLHF_HD double inverse_temperature(double span, double t) {
  const double s = span / t;
  return s < 1e300 ? s : 1e300;
}

template <class Team>
DRRLHF_HD Moments tilted_moments(const Team& team, const double* d, const double* p, double s) {
  // log1p keeps the digits of a normaliser close to 1.
  const bool small = s < 0.34;
  const Sums<4> m = team.template sum<4>([=](std::int64_t i) {
    const double x = -s * d[i];
    const double e = p[i] * exp_nonpositive(x);
    return Sums<4>{{e, e * d[i], e * d[i] * d[i], small ? p[i] * expm1_small(x) : 0.0}};
  });
  const double mean = m.v[1] / m.v[0];
  const double variance = m.v[2] / m.v[0] - mean * mean;
  return {small ? log1p(m.v[3]) : log(m.v[0]), mean, variance > 0 ? variance : 0.0};
}

template <class Team>
DRRLHF_HD void write_tilted(const Team& team, const Problem& problem, double s, double log_z) {
  const double *d = problem.d, *p = problem.p;
  double* q = problem.q;
  const double scale = exp(-log_z);
  team.each([=](std::int64_t i) { q[i] = p[i] * exp_nonpositive(-s * d[i]) * scale; });
}

// KL(q||p) = r: Newton on sqrt(2 KL), which is nearly linear in the inverse temperature s, inside
// a bracket that halves on a log scale whenever Newton leaves it.
template <class Team>
DRRLHF_HD double solve_kl_radius(const Team& team, const Problem& problem, double r) {
  const double target = sqrt(2 * r);
  double low = 0.0, high = kInfinity;
  // KL(s) <= s^2 / 8 on [0, 1] (Hoeffding), so this start is never past the solution.
  double s = 2 * target, log_z = 0.0;
  for (int step = 0; step < kMaxSteps; ++step) {
    const Moments m = tilted_moments(team, problem.d, problem.p, s);
    log_z = m.log_z;
    // For tiny s the difference of the two terms has no digits left, its series has.
    double kl = s < 1e-7 ? 0.5 * s * s * m.variance : -s * m.mean - m.log_z;
    kl = kl > 0 ? kl : 0.0;
    const double g = sqrt(2 * kl);
    (kl < r ? low : high) = s;
    const double error = g - target, noise = 1e-13 * r + 1e-15 * s * m.mean;
    if ((kl > r ? kl - r : r - kl) <= noise || high <= low * (1 + 1e-15)) break;
    double next = s - error * g / (s * m.variance);
    const double ceiling = high < kInfinity ? high : 64 * s;
    if (!(next > low && next < ceiling)) {
      next = high < kInfinity ? (low > 0 ? sqrt(low) * sqrt(high) : 0.5 * high) : ceiling;
    }
    s = next;
  }
  write_tilted(team, problem, s, log_z);
  return s;
}

// Active-set search for q ~ p (eta - d)_+. `root` gives eta for the moments m0, m1, m2 of the set
// {d < eta}, or infinity where that set is too small to have one. A bracket guards it.
template <class Team, class Root>
DRRLHF_HD double solve_active_set(const Team& team, const Problem& problem, double start,
                                  Root root) {
  const double *d = problem.d, *p = problem.p;
  double low = 0.0, high = start, eta = start, count = -1.0;
  for (int step = 0; step < kMaxSteps; ++step) {
    const double at = eta;
    const Sums<4> m = team.template sum<4>([=](std::int64_t i) {
      const double w = select(d[i] < at, p[i], 0.0);
      return Sums<4>{{w, w * d[i], w * d[i] * d[i], w > 0 ? 1.0 : 0.0}};
    });
    const double candidate = root(m.v[0], m.v[1], m.v[2]);
    // Sets {d < eta} are nested: the same count is the same set, whose root is already eta.
    if (m.v[3] == count) return eta;
    count = m.v[3];
    (candidate < eta ? high : low) = eta;
    if (candidate == eta) return eta;
    const bool inside = candidate > low && candidate <= high;
    if (!inside) count = -1.0;
    eta = inside ? candidate : 0.5 * (low + high);
    if (!(low < high)) break;
  }
  return eta;
}

template <class Team>
DRRLHF_HD void write_linear(const Team& team, const Problem& problem, double eta) {
  const double *d = problem.d, *p = problem.p;
  double* q = problem.q;
  const double mass =
      total(team, [=](std::int64_t i) { return select(d[i] < eta, p[i] * (eta - d[i]), 0.0); });
  team.each([=](std::int64_t i) { q[i] = d[i] < eta ? p[i] * ((eta - d[i]) / mass) : 0.0; });
}

// q = p min(y exp((l - v)/t), 1/alpha), any v, y > 0 such that q sums to 1.
template <class Team>
DRRLHF_HD Solution solve_cvar_temperature(const Team& team, const Problem& problem, double alpha,
                                          double t, double bottom, double top) {
  const double *d = problem.d, *p = problem.p, *l = problem.l;
  double* q = problem.q;
  const double s = inverse_temperature(top - bottom, t);
  const Moments m = tilted_moments(team, d, p, s);
  if (m.log_z >= log(alpha)) {  // the cap binds nowhere
    write_tilted(team, problem, s, m.log_z);
    const double value = top + t * m.log_z;
    return {value, value};
  }
  // h = log(alpha y): the exponent (l - v)/t + h is cut at 0. From any y below the solution,
  // Newton on the concave sum climbs to it.
  double* x = problem.d;
  double v = top, h = log(alpha) - m.log_z;
  if (s > 16) {
    // From the uncapped y the climb would cap the losses level by level. The threshold of the
    // alpha-tail is close: anchored there, y lies in [rest / p(l <= v), 1 / alpha], and what is
    // free never underflows.
    v = upper_tail(team, l, p, alpha, bottom, top).threshold;
    const double anchor = v;
    const Sums<2> masses = team.template sum<2>([=](std::int64_t i) {
      return Sums<2>{{select(l[i] > anchor, p[i], 0.0), select(l[i] <= anchor, p[i], 0.0)}};
    });
    const double rest = 1 - masses.v[0] / alpha;
    h = log((rest > 1e-300 ? rest : 1e-300) / masses.v[1] * alpha);
  }
  const double anchor = v;
  team.each([=](std::int64_t i) { x[i] = (l[i] - anchor) / t; });
  for (int step = 0; step < kMaxSteps; ++step) {
    const double at = h;
    const Sums<2> m2 = team.template sum<2>([=](std::int64_t i) {
      const double z = x[i] + at;
      const double e = p[i] * exp_nonpositive(z < 0 ? z : 0.0);
      return Sums<2>{{select(z >= 0, p[i], 0.0), z >= 0 ? 0.0 : e}};
    });
    const double growth = (alpha - m2.v[0]) / m2.v[1];
    if (!(growth > 1 + 1e-15)) break;
    h += log(growth);
  }
  team.each([=](std::int64_t i) {
    const double z = x[i] + h;
    q[i] = p[i] * exp_nonpositive(z < 0 ? z : 0.0) / alpha;
  });
  // sum q (l - v - t log(q/p)): a constant where free, l - v + t log(alpha) where capped.
  const double free = -t * (h - log(alpha)), capped = t * log(alpha);
  const double value = total(
      team, [=](std::int64_t i) { return q[i] * select(x[i] + h < 0, free, l[i] - v + capped); });
  return {v + value, v + free};
}

// Sets the top `trim` of nominal mass aside; none at 0.
template <class Team>
DRRLHF_HD void trim_top(const Team& team, double* p, const double* l, double trim) {
  if (!(trim > 0)) return;
  const Bounds bound = loss_bounds(team, l, p);
  const Tail tail = upper_tail(team, l, p, trim, bound.bottom, bound.top);
  const double left = total(team, [=](std::int64_t i) { return p[i] * (1 - tail.kept(l[i])); });
  team.each([=](std::int64_t i) { p[i] = p[i] * (1 - tail.kept(l[i])) / left; });
}

DRRLHF_HD bool holds_nominal_alone(Ambiguity set) {
  switch (set.kind) {
    case Kind::kErm:
      return true;
    case Kind::kKlRadius:
    case Kind::kChiSquareRadius:
    case Kind::kTv:
      return set.parameter == 0;
    case Kind::kCvar:
    case Kind::kCvarTemperature:
      return set.parameter == 1;
    default:
      return false;
  }
}

// Worst-case weights and value of a problem whose unmasked losses are finite. Writes q (and d).
template <class Team>
DRRLHF_HD Solution worst_case(const Team& team, const Problem& problem, Ambiguity set) {
  const double* l = problem.l;
  double *p = problem.p, *d = problem.d, *q = problem.q;
  trim_top(team, p, l, set.trim);
  const Bounds bound = loss_bounds(team, l, p);
  const double top = bound.top, bottom = bound.bottom;
  const double span = top > bottom ? top - bottom : 1.0;
  const double a = set.parameter;
  const auto keep_nominal = [&] { team.each([=](std::int64_t i) { q[i] = p[i]; }); };

  // The optimistic side is measured from the smallest loss, everything else from the largest.
  const bool optimistic = set.kind == Kind::kKlTemperature && a < 0;
  const double anchor = optimistic ? bottom : top;
  team.each([=](std::int64_t i) { d[i] = p[i] > 0 ? fabs(l[i] - anchor) / span : 0.0; });
  if (set.kind == Kind::kKlTemperature) {
    const double s = inverse_temperature(top - bottom, fabs(a));
    const Moments m = tilted_moments(team, d, p, s);
    write_tilted(team, problem, s, m.log_z);
    return {anchor + a * m.log_z, a};
  }
  if (holds_nominal_alone(set)) {
    keep_nominal();
    const double dual = set.kind == Kind::kErm               ? 0.0
                        : set.kind == Kind::kKlRadius        ? kInfinity
                        : set.kind == Kind::kChiSquareRadius ? -kInfinity
                                                             : bottom;
    return {expected_loss(team, problem, top, span), dual};
  }
  if (set.kind == Kind::kCvarTemperature) {
    return solve_cvar_temperature(team, problem, a, set.temperature, bottom, top);
  }
  const double at_top = total(team, [=](std::int64_t i) { return select(l[i] == top, p[i], 0.0); });
  double dual = 0.0, penalty = 0.0;
  if ((set.kind == Kind::kKlRadius && a >= -log(at_top)) ||
      (set.kind == Kind::kChiSquareRadius && a >= (1 / at_top - 1) / 2)) {
    // The ball holds the adversary's best answer: all mass on the largest losses.
    team.each([=](std::int64_t i) { q[i] = l[i] == top ? p[i] / at_top : 0.0; });
    dual = set.kind == Kind::kKlRadius ? 0.0 : top;
  } else if (set.kind == Kind::kKlRadius) {
    dual = span / solve_kl_radius(team, problem, a);
  } else if (set.kind == Kind::kTv) {
    Tail tail{top, 0.0};
    if (a < 1) tail = upper_tail(team, l, p, 1 - a, bottom, top);
    team.each([=](std::int64_t i) {
      q[i] = p[i] * (tail.kept(l[i]) + (l[i] == top ? a / at_top : 0.0));
    });
    dual = tail.threshold;
  } else if (set.kind == Kind::kChiSquareRadius) {
    const double spread = 1 + 2 * a;
    const auto root = [=](double m0, double m1, double m2) {
      const double mean = m1 / m0, slack = spread * m0 - 1;
      const double variance = m2 / m0 - mean * mean;
      // Without slack the set is too small for the radius: eta must grow.
      return slack > 0 ? mean + sqrt((variance > 0 ? variance : 0.0) / slack) : kInfinity;
    };
    const Sums<2> m = team.template sum<2>(
        [=](std::int64_t i) { return Sums<2>{{p[i] * d[i], p[i] * d[i] * d[i]}}; });
    const double eta = solve_active_set(team, problem, root(1.0, m.v[0], m.v[1]), root);
    write_linear(team, problem, eta);
    dual = top - span * eta;
  } else if (set.kind == Kind::kChiSquarePenalty) {
    const double c = a / span;
    const auto root = [=](double m0, double m1, double) { return (m1 + c) / m0; };
    const double mean = total(team, [=](std::int64_t i) { return p[i] * d[i]; });
    const double eta = solve_active_set(team, problem, mean + c, root);
    write_linear(team, problem, eta);
    dual = top - span * eta;
    penalty = 0.5 * a * total(team, [=](std::int64_t i) {
                const double excess = select(p[i] > 0, q[i] / p[i] - 1, 0.0);
                return p[i] * excess * excess;
              });
  } else {  // CVaR
    const Tail tail = upper_tail(team, l, p, a, bottom, top);
    team.each([=](std::int64_t i) { q[i] = p[i] * tail.kept(l[i]) / a; });
    dual = tail.threshold;
  }
  if (!(top > bottom)) {  // equal losses: no answer pays more than q = p
    keep_nominal();
    penalty = 0.0;
  }
  return {expected_loss(team, problem, top, span) - penalty, dual};
}

// One step of multiplicative group weights w (size,), in place when `update`; see Group. group:
// i -> id. mass, loss: scratch (size,).
template <class Team, class Group>
DRRLHF_HD Solution group_step(const Team& team, const Problem& problem, Group group, double* w,
                              int size, double step_size, bool update, double* mass, double* loss) {
  const double *l = problem.l, *p = problem.p;
  double* q = problem.q;
  team.scatter(mass, size, group, [=](std::int64_t i) { return p[i]; });
  team.scatter(loss, size, group, [=](std::int64_t i) { return p[i] > 0 ? p[i] * l[i] : 0.0; });
  if (update) {
    team.one([=] {
      double held = 0.0, best = -kInfinity, stepped = 0.0;
      for (int g = 0; g < size; ++g) {
        if (mass[g] > 0) {
          held += w[g];
          loss[g] = step_size * (loss[g] / mass[g]);  // from here on the gain of the group
          best = loss[g] > best ? loss[g] : best;
        }
      }
      for (int g = 0; g < size; ++g) {
        if (mass[g] > 0) stepped += w[g] * exp(loss[g] - best);
      }
      for (int g = 0; g < size; ++g) {
        if (mass[g] > 0) {
          w[g] *= exp(loss[g] - best) * (held / stepped);
          // A weight that underflowed to 0 could never come back.
          w[g] = w[g] < 2.2250738585072014e-308 ? 2.2250738585072014e-308 : w[g];
        }
      }
    });
  }
  double held = 0.0;
  for (int g = 0; g < size; ++g) held += mass[g] > 0 ? w[g] : 0.0;
  team.each(
      [=](std::int64_t i) { q[i] = p[i] > 0 ? w[group(i)] / held / mass[group(i)] * p[i] : 0.0; });
  const double value =
      total(team, [=](std::int64_t i) { return select(p[i] > 0, q[i] * l[i], 0.0); });
  return {value, 0.0};
}

}  // namespace drrlhf
