#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace drrlhf::cpu {

at::Tensor empty_on_huge_pages(at::IntArrayRef shape, at::ScalarType dtype) {
  at::Tensor result = at::empty(shape, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::size_t kWorthwhile = std::size_t(4) << 20;
  if (result.nbytes() >= kWorthwhile) {
    const std::size_t page = sysconf(_SC_PAGESIZE);
    const auto begin = reinterpret_cast<std::uintptr_t>(result.mutable_data_ptr());
    const auto first = (begin + page - 1) / page * page;
    // Advice only: where it is refused, the memory is as good, and slower to touch.
    (void)madvise(reinterpret_cast<void*>(first), begin + result.nbytes() - first, MADV_HUGEPAGE);
  }
#endif
  return result;
}

}  // namespace drrlhf::cpu
