// Large fresh tensors.
#pragma once

#include <ATen/ATen.h>

namespace drrlhf::cpu {

// at::empty, on huge pages where the system grants them on request: touching fresh memory page by
// page costs more than the kernels that write to it.
at::Tensor empty_on_huge_pages(at::IntArrayRef shape, at::ScalarType dtype);

}  // namespace drrlhf::cpu
