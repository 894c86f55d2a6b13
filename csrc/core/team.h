// The small collective concept on which the dual search is written once for host and device.
//
// A team owns the indices 0 .. n-1 of one problem. It provides
//
//   template <int K, class F> Sums<K> sum(F f)    per k: sum over i of f(i)[k]
//   template <int K, class F> Sums<K> max(F f)    per k: max over i of f(i)[k]
//   template <class F> void each(F f)             f(i) for every i, once
//   template <class S, class F> void scatter(double* out, int size, S slot, F f)
//                                                 out[g] = sum of f(i) over slot(i) == g
//   template <class F> void one(F f)              f() by one member; the others see what it wrote
//
// f(i) returns Sums<K> and has no side effects (each and one excepted). A member that reads at i
// what `each` wrote reads what it wrote itself: every call hands i to the same member. Every member
// of the team gets the result, and calls are collective: all members make the same calls in the
// same order. Sums are taken in an order that depends on n alone, so results are equal run to run
// and, on the host, machine to machine.
#pragma once

#include "math.h"

namespace drrlhf {

template <int K>
struct Sums {
  double v[K];
};

// One host thread. Eight independent chains let the compiler vectorise each sum at any width up
// to 512 bits without changing its order.
struct SerialTeam {
  static constexpr int kLanes = 8;
  std::int64_t n;

  template <int K, class F>
  DRRLHF_HD Sums<K> sum(F f) const {
    double lanes[K][kLanes] = {};
    std::int64_t i = 0;
    const auto add = [&](int j) {
      const Sums<K> term = f(i + j);
      for (int k = 0; k < K; ++k) lanes[k][j] += term.v[k];
    };
    for (; i + kLanes <= n; i += kLanes) {
      if constexpr (K == 1) {
        for (int j = 0; j < kLanes; ++j) add(j);
      } else {
        // Unrolled early, GCC leaves several sums at once scalar; one alone it does not.
        DRRLHF_NO_UNROLL
        for (int j = 0; j < kLanes; ++j) add(j);
      }
    }
    for (int j = 0; i < n; ++i, ++j) {
      const Sums<K> term = f(i);
      for (int k = 0; k < K; ++k) lanes[k][j] += term.v[k];
    }
    Sums<K> total;
    for (int k = 0; k < K; ++k) {
      const double* l = lanes[k];
      total.v[k] = ((l[0] + l[4]) + (l[1] + l[5])) + ((l[2] + l[6]) + (l[3] + l[7]));
    }
    return total;
  }

  template <int K, class F>
  DRRLHF_HD Sums<K> max(F f) const {
    double lanes[K][kLanes];
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < kLanes; ++j) lanes[k][j] = -kInfinity;
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      // Unrolled early, GCC leaves these comparisons scalar.
      DRRLHF_NO_UNROLL
      for (int j = 0; j < kLanes; ++j) {
        const Sums<K> term = f(i + j);
        for (int k = 0; k < K; ++k) lanes[k][j] = lanes[k][j] < term.v[k] ? term.v[k] : lanes[k][j];
      }
    }
    for (; i < n; ++i) {
      const Sums<K> term = f(i);
      for (int k = 0; k < K; ++k) lanes[k][0] = term.v[k] > lanes[k][0] ? term.v[k] : lanes[k][0];
    }
    Sums<K> top;
    for (int k = 0; k < K; ++k) {
      top.v[k] = lanes[k][0];
      for (int j = 1; j < kLanes; ++j) top.v[k] = lanes[k][j] > top.v[k] ? lanes[k][j] : top.v[k];
    }
    return top;
  }

  template <class F>
  DRRLHF_HD void each(F f) const {
    for (std::int64_t i = 0; i < n; ++i) f(i);
  }

  template <class S, class F>
  DRRLHF_HD void scatter(double* out, int size, S slot, F f) const {
    for (int g = 0; g < size; ++g) out[g] = 0;
    for (std::int64_t i = 0; i < n; ++i) out[slot(i)] += f(i);
  }

  template <class F>
  DRRLHF_HD void one(F f) const {
    f();
  }
};

}  // namespace drrlhf
