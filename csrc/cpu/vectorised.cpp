#include "vectorised.h"

#include <ATen/Version.h>

#include <string>

namespace drrlhf::cpu {

Vectors widest_vectors() {
#ifdef DRRLHF_MULTIVERSIONED
  static const Vectors widest = [] {
    const std::string allowed = at::get_cpu_capability();
    const bool wide = allowed == "AVX512";
    if (wide && __builtin_cpu_supports("x86-64-v4")) return Vectors::kAvx512;
    const bool middle = wide || allowed == "AVX2";
    return middle && __builtin_cpu_supports("x86-64-v3") ? Vectors::kAvx2 : Vectors::kBaseline;
  }();
  return widest;
#else
  return Vectors::kBaseline;
#endif
}

const char* name(Vectors vectors) {
#ifdef DRRLHF_MULTIVERSIONED
  switch (vectors) {
    case Vectors::kAvx512:
      return "x86-64-v4";
    case Vectors::kAvx2:
      return "x86-64-v3";
    case Vectors::kBaseline:
      return "x86-64";
  }
#endif
  return "the compiler's default";
}

}  // namespace drrlhf::cpu
