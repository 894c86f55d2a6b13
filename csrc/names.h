// The words by which ops are told what to compute, as numbers that kernels switch on.
#pragma once

#include <array>
#include <string_view>

#include "core/dual_search.h"
#include "message.h"

namespace drrlhf {

inline Kind kind_of(std::string_view name) {
  constexpr std::array<std::string_view, 9> kKinds = {"erm",  "kl_radius",        "kl_temperature",
                                                      "tv",   "chi2_radius",      "chi2_penalty",
                                                      "cvar", "cvar_temperature", "group"};
  for (std::size_t i = 0; i < kKinds.size(); ++i) {
    if (kKinds[i] == name) return static_cast<Kind>(i);
  }
  DRRLHF_CHECK_VALUE(false, "kind: unknown '", name, "'");
}

inline Ambiguity ambiguity(std::string_view kind, double parameter, double temperature, double trim,
                           bool update) {
  return {kind_of(kind), parameter, temperature, trim, update};
}

}  // namespace drrlhf
