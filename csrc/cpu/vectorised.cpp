#include "vectorised.h"

#include <ATen/Version.h>

#include <string>

namespace drrlhf::cpu {

#ifdef DRRLHF_MULTIVERSIONED
namespace {

// The levels by their features, for GCC 11 compiles for a level and cannot ask for one by its name.
// A feature counts where the system keeps its registers.
bool has_level_3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("lzcnt") &&
         __builtin_cpu_supports("movbe");
}

bool has_level_4() {
  return has_level_3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

}  // namespace
#endif

Vectors widest_vectors() {
#ifdef DRRLHF_MULTIVERSIONED
  static const Vectors widest = [] {
    const std::string allowed = at::get_cpu_capability();
    const bool wide = allowed == "AVX512";
    if (wide && has_level_4()) return Vectors::kAvx512;
    const bool middle = wide || allowed == "AVX2";
    return middle && has_level_3() ? Vectors::kAvx2 : Vectors::kBaseline;
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
