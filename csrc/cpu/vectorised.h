// A hot loop is compiled once for each width of vectors and runs in the widest that the processor
// has and torch allows (ATEN_CPU_CAPABILITY). So a build serves machines older and newer than its
// builder, and what the narrower ones run can be tested on a wider one.
#pragma once

#include <type_traits>

#include "../core/platform.h"

namespace drrlhf::cpu {

enum class Vectors { kBaseline, kAvx2, kAvx512 };

Vectors widest_vectors();
const char* name(Vectors vectors);

// How many numbers of type double a vector holds; at most kMostLanes.
template <int kLanes>
using Width = std::integral_constant<int, kLanes>;
constexpr int kMostLanes = 8;

// f(), or f(Width<kLanes>{}) where it asks for that.
template <int kLanes, class F>
DRRLHF_HD auto told(const F& f) {
  if constexpr (std::is_invocable_v<F>) {
    return f();
  } else {
    return f(Width<kLanes>{});
  }
}

template <class F>
__attribute__((flatten, noinline)) auto with_baseline(F f) {
  return told<2>(f);
}

#ifdef DRRLHF_MULTIVERSIONED
template <class F>
__attribute__((target("arch=x86-64-v3"), flatten, noinline)) auto with_avx2(F f) {
  return told<4>(f);
}

template <class F>
__attribute__((target("arch=x86-64-v4"), flatten, noinline)) auto with_avx512(F f) {
  return told<kMostLanes>(f);
}
#endif

// `told` f, whose loops are inlined whole. It holds copies: through references the compiler would
// have to read its sizes and factors again for every element that it writes.
template <class F>
auto vectorised(F f) {
#ifdef DRRLHF_MULTIVERSIONED
  switch (widest_vectors()) {
    case Vectors::kAvx512:
      return with_avx512(f);
    case Vectors::kAvx2:
      return with_avx2(f);
    case Vectors::kBaseline:
      break;
  }
#endif
  return with_baseline(f);
}

// out = factor x.
template <class T>
void scaled(const T* x, std::int64_t n, T factor, T* out) {
  vectorised([=] {
    for (std::int64_t i = 0; i < n; ++i) out[i] = factor * x[i];
  });
}

}  // namespace drrlhf::cpu
