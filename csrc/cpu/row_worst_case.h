// The worst case of each row of a table of losses on the CPU.
#pragma once

#include <string_view>

#include "../tensors.h"

namespace drrlhf::cpu {

// table (n, K); mask (n, K) bool; nominal (K,). Values (n,) and weights (n, K), as the definition
// in drrlhf/reference/row_worst_case.py has them.
std::tuple<Tensor, Tensor> row_worst_case(const Tensor& table, const OptionalTensor& mask,
                                          const OptionalTensor& nominal, std::string_view kind,
                                          double parameter);

}  // namespace drrlhf::cpu
