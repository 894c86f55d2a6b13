// The words by which ops are told what to compute, as numbers that kernels switch on.
#pragma once

#include <array>
#include <string_view>

#include "core/dual_search.h"
#include "message.h"

namespace drrlhf {

template <class Enum, std::size_t N>
Enum by_name(const char* argument, std::string_view name,
             const std::array<std::string_view, N>& names) {
  for (std::size_t i = 0; i < N; ++i) {
    if (names[i] == name) return static_cast<Enum>(i);
  }
  DRRLHF_CHECK_VALUE(false, argument, ": unknown '", name, "'");
}

inline constexpr std::array<std::string_view, 9> kKinds = {
    "erm",          "kl_radius", "kl_temperature",   "tv",   "chi2_radius",
    "chi2_penalty", "cvar",      "cvar_temperature", "group"};

inline Ambiguity ambiguity(std::string_view kind, double parameter, double temperature, double trim,
                           bool update) {
  return {by_name<Kind>("kind", kind, kKinds), parameter, temperature, trim, update};
}

}  // namespace drrlhf
