// The words by which ops are told what to compute, as numbers that kernels switch on.
#pragma once

#include <array>
#include <string_view>

#include "core/dual_search.h"
#include "core/pair_losses.h"
#include "core/policy_loss.h"
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
inline constexpr std::array<std::string_view, 13> kLossTypes = {
    "sigmoid",  "hinge",    "ipo",       "exo_pair", "robust",   "discopop", "sigmoid_norm",
    "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "simpo"};
inline constexpr std::array<std::string_view, 4> kDivergences = {
    "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"};

inline constexpr std::array<std::string_view, 4> kPolicyLossTypes = {"grpo", "bnpo", "dr_grpo",
                                                                     "dapo"};

}  // namespace drrlhf
