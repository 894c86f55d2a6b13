// Products of bfloat16 matrices with float32 sums, by at::native::cpublas::brgemm: whether there
// are any here, how the second factor is packed, and the small vector loops around them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace drrlhf::cpu {

// Whether this processor multiplies bfloat16 into float32 by itself, and this torch offers it.
bool multiplies_bfloat16();

// Whether matrix products are taken in this dtype as it is, or in float32.
bool multiplies(at::ScalarType dtype);

// The dtype that they are taken in.
at::ScalarType product_dtype(at::ScalarType dtype);

// Whether the head (V, D) is multiplied by the functions below.
bool multiplies_packed(const at::Tensor& weight);

// bfloat16 rows (count, width) as the blocked product wants its second operand: by blocks of
// kProductBlock columns, neighbouring rows interleaved; an odd last row is paired with zeros.
inline constexpr std::int64_t kProductBlock = 64;
void pack_pairs(const at::BFloat16* rows, std::int64_t stride, std::int64_t count,
                std::int64_t width, at::BFloat16* out);

// c (rows, width) (+)= a (rows, depth) b, b packed as above with `depth` rows, which is even.
void multiply_packed(const at::BFloat16* a, std::int64_t stride, std::int64_t rows,
                     std::int64_t depth, const at::BFloat16* b, std::int64_t width, float* c,
                     std::int64_t c_stride, bool add);

// The bits of a bfloat16 tensor.
const std::uint16_t* words_of(const at::Tensor& x);

// The sum of a b, both bfloat16; n is a multiple of 16.
float dot(const std::uint16_t* a, const std::uint16_t* b, std::int64_t n);

// out += factor x, x in float32 or in bfloat16.
void add_scaled(const float* x, std::int64_t n, float factor, float* out);
void add_scaled_row(const std::uint16_t* x, std::int64_t n, float factor, float* out);

}  // namespace drrlhf::cpu
