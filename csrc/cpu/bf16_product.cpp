#include "bf16_product.h"

#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <vector>

#include "softmax.h"
#include "vectorised.h"

namespace drrlhf::cpu {

bool multiplies_bfloat16() {
#ifdef DRRLHF_MULTIVERSIONED
  // Asked at every call, as PyTorch does: who turns oneDNN off for a while may turn it on again.
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool answer = [] {
    if (softmax_kernels().lanes != 16 || !__builtin_cpu_supports("avx512bf16")) return false;
    const at::BFloat16 a[2] = {1, 2}, b[32] = {};
    float c[16];
    try {
      at::native::cpublas::brgemm(1, 16, 2, 2, 16, 16, false, a, b, c, true);
      at::native::cpublas::brgemm_release();
      return true;
    } catch (const std::exception&) {  // torch or oneDNN was built without, or told to do without
      return false;
    }
  }();
  return answer;
#else
  return false;
#endif
}

bool multiplies(at::ScalarType dtype) {
  return dtype == at::kFloat || (dtype == at::kBFloat16 && multiplies_bfloat16());
}

at::ScalarType product_dtype(at::ScalarType dtype) {
  return multiplies(dtype) ? dtype : at::kFloat;
}

bool multiplies_packed(const at::Tensor& weight) {
  return weight.scalar_type() == at::kBFloat16 && multiplies_bfloat16() &&
         weight.size(1) % kColumnBlock == 0 && weight.stride(1) == 1;
}

namespace {

void interleave(const std::uint16_t* one, const std::uint16_t* two, std::int64_t n,
                std::uint32_t* out) {
  vectorised([=] {
    for (std::int64_t i = 0; i < n; ++i) out[i] = one[i] | std::uint32_t(two[i]) << 16;
  });
}

DRRLHF_HD float wide(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

}  // namespace

void pack_pairs(const at::BFloat16* rows, std::int64_t stride, std::int64_t count,
                std::int64_t width, at::BFloat16* out) {
  const std::vector<std::uint16_t> zeros(count % 2 == 0 ? 0 : width, 0);
  const auto* from = reinterpret_cast<const std::uint16_t*>(rows);
  auto* to = reinterpret_cast<std::uint32_t*>(out);
  const std::int64_t pairs = (count + 1) / 2;
  for (std::int64_t k = 0; k < pairs; ++k) {
    const std::uint16_t* one = from + 2 * k * stride;
    const std::uint16_t* two = 2 * k + 1 < count ? one + stride : zeros.data();
    for (std::int64_t d = 0; d < width; d += kProductBlock) {
      const std::int64_t block = std::min(kProductBlock, width - d);
      // Blocks lie at their columns, whatever the width of the last one.
      interleave(one + d, two + d, block, to + d * pairs + k * block);
    }
  }
}

void multiply_packed(const at::BFloat16* a, std::int64_t stride, std::int64_t rows,
                     std::int64_t depth, const at::BFloat16* b, std::int64_t width, float* c,
                     std::int64_t c_stride, bool add) {
  for (std::int64_t d = 0; d < width; d += kProductBlock) {
    const std::int64_t block = std::min(kProductBlock, width - d);
    at::native::cpublas::brgemm(rows, block, depth, stride, block, c_stride, add, a, b + d * depth,
                                c + d, true);
  }
}

const std::uint16_t* words_of(const at::Tensor& x) {
  return reinterpret_cast<const std::uint16_t*>(x.const_data_ptr<at::BFloat16>());
}

float dot(const std::uint16_t* a, const std::uint16_t* b, std::int64_t n) {
  return vectorised([=] {
    constexpr int kLanes = 16;
    float sums[kLanes] = {};
    for (std::int64_t i = 0; i < n; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) sums[k] += wide(a[i + k]) * wide(b[i + k]);
    }
    float sum = 0;
    for (const float x : sums) sum += x;
    return sum;
  });
}

void add_scaled(const float* x, std::int64_t n, float factor, float* out) {
  vectorised([=] {
    for (std::int64_t i = 0; i < n; ++i) out[i] += factor * x[i];
  });
}

void add_scaled_row(const std::uint16_t* x, std::int64_t n, float factor, float* out) {
  vectorised([=] {
    for (std::int64_t i = 0; i < n; ++i) out[i] += factor * wide(x[i]);
  });
}

}  // namespace drrlhf::cpu
