// What is left between the products of a head: rows times a factor, and memory set to 0.
#include "softmax.h"

namespace drrlhf::cuda {
namespace {

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(const ElementOf<kDtype>* x, std::int64_t columns, Numbers factor,
                      Integers labels, std::int64_t ignore_index, ElementOf<kDtype>* out) {
  const std::int64_t row = blockIdx.x, start = row * columns;
  float by = factor.dtype == Dtype::kNone ? 1.0f : float(number_at(factor, row));
  if (integer_at(labels, row) == ignore_index) by = 0.0f;
  for (std::int64_t i = threadIdx.x; i < columns; i += kThreads) {
    const float scaled = by == 0 ? 0.0f : by * Storage<kDtype>::widen(x[start + i]);
    out[start + i] = Storage<kDtype>::narrow(scaled);
  }
}

}  // namespace

Failure scale_rows_cuda(const void* x, Dtype dtype, std::int64_t rows, std::int64_t columns,
                        Numbers factor, Integers labels, std::int64_t ignore_index, void* out,
                        Stream stream) {
  const auto scale = [&](auto type) {
    using Element = ElementOf<type.value>;
    return launch(scale_rows_kernel<type.value>, rows, kThreads, stream,
                  static_cast<const Element*>(x), columns, factor, labels, ignore_index,
                  static_cast<Element*>(out));
  };
  return with_type(dtype, scale, "expected float32, bfloat16 or float16");
}

Failure clear_cuda(void* data, std::int64_t bytes, Stream stream) {
  return clear_memory(data, bytes, stream);
}

}  // namespace drrlhf::cuda
