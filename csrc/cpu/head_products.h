// The products that the head's gradients are made of: gradients of logits by the head's rows, which
// are summed up by token, and by hidden states, which are summed up by row of the head. In bfloat16
// a product is taken block by block, of what is made of a block while that is in the cache.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

#include "bf16_product.h"
#include "logprobs.h"
#include "tile_sizes.h"

namespace drrlhf::cpu {

// Sums by token (tokens, D) of factors times the head's rows: sums = P head for P (tokens, V) that
// is made piece by piece. The head is taken block by block, each block packed once, and every
// thread multiplies what it makes of a block while that is in its cache.
class HeadSums {
 public:
  // `workspace` bounds the threads' sums: with many threads, several share the sums of a part of
  // the vocabulary and take a chunk of the tokens each.
  HeadSums(const Tensor& weight, std::int64_t tokens, std::int64_t workspace);

  // Tokens whose sums fit in the workspace, all at best.
  static std::int64_t tokens_at_once(const Tensor& weight, std::int64_t tokens,
                                     std::int64_t workspace);

  std::int64_t height() const { return height_; }

  // For each block of the head's rows [first, first + rows): begin_block(first, rows), then
  // f(part, out, stride) writes the factors of these rows and of kTileTokens tokens at most: out
  // (columns, rows), with 0 behind the rows up to a multiple of 32.
  template <class Begin, class F>
  void each(const Begin& begin_block, const F& f) {
    at::parallel_for(0, parts_ * chunks_, 1, [&](std::int64_t from, std::int64_t to) {
      const std::int64_t stride = height_ + 32;
      Tensor packed = at::empty({height_ * width_}, at::kBFloat16);
      Tensor factors = at::empty({kTokens * stride}, at::kBFloat16);
      auto* p = factors.mutable_data_ptr<at::BFloat16>();
      for (std::int64_t i = from; i < to; ++i) {
        const std::int64_t part = i / chunks_, token = i % chunks_ * chunk_;
        const std::int64_t end = std::min(token + chunk_, tokens_);
        float* sums = sums_.mutable_data_ptr<float>() + part * tokens_ * stride_;
        const std::int64_t begin = part * blocks_ / parts_, last = (part + 1) * blocks_ / parts_;
        for (std::int64_t b = begin; b < last; ++b) {
          const std::int64_t first = b * height_, rows = std::min(height_, vocabulary_ - first);
          pack_pairs(weight_.const_data_ptr<at::BFloat16>() + first * weight_.stride(0),
                     weight_.stride(0), rows, width_, packed.mutable_data_ptr<at::BFloat16>());
          begin_block(first, rows);
          for (std::int64_t j = token; j < end; j += kTokens) {
            const std::int64_t count = std::min(kTokens, end - j);
            for (std::int64_t k = 0; k < count; k += kTileTokens) {
              f(Part{first, rows, j + k, std::min(kTileTokens, count - k)},
                reinterpret_cast<std::uint16_t*>(p + k * stride), stride);
            }
            multiply_packed(p, stride, count, round_up(rows, 2),
                            packed.const_data_ptr<at::BFloat16>(), width_, sums + j * stride_,
                            stride_, b > begin);
          }
        }
      }
      at::native::cpublas::brgemm_release();
    });
  }

  // The sums of token j (D,), added up over the parts, times a factor.
  void read(std::int64_t j, float factor, float* out) const;

 private:
  static constexpr std::int64_t kTokens = 2 * kTileTokens;  // multiplied at a time

  Tensor weight_, sums_;
  std::int64_t vocabulary_, width_, tokens_, stride_, height_, blocks_, parts_, chunk_, chunks_;
};

// d weight (rows, D) = gradient (rows, tokens) hidden, block by block.
class WeightGradient {
 public:
  // Tokens that are multiplied at a time where the gradient is made for this.
  static constexpr std::int64_t kDepth = 512;

  WeightGradient(const Tensor& hidden, std::int64_t height);

  // Adds the products of the tokens [token, token + count), which come in order, all but the last
  // count even, to the sums of `rows` rows. gradient (rows, count rounded up to a multiple of 2):
  // an entry beyond the last token counts for nothing, but must be finite.
  void add(const at::BFloat16* gradient, std::int64_t stride, std::int64_t rows, std::int64_t token,
           std::int64_t count);

  // Rounds the sums.
  void write(std::int64_t rows, Tensor& d_weight, std::int64_t first);

 private:
  float* sums() {
    return sums_.mutable_data_ptr<float>() + at::get_thread_num() * height_ * stride_for(width_);
  }

  std::int64_t depth_, width_, height_;
  Tensor packed_, sums_;
};

// Rows (count, D) in bfloat16 at `result`, each as f(row, out) makes it in float32.
template <class F>
void write_rows(std::int64_t count, std::int64_t width, const F& f) {
  at::parallel_for(0, count, 16, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(width);
    for (std::int64_t j = begin; j < end; ++j) {
      at::BFloat16* out = f(j, row.data());
      if (out != nullptr) {
        softmax_kernels().narrow_row(row.data(), out, Storage::kBFloat16, width);
      }
    }
  });
}

// (tokens, D) = gradient^T weight, for a transposed gradient (V, tokens); in the weight's dtype.
void multiply_by_head(const Tensor& gradient, const Tensor& weight, Tensor result,
                      std::int64_t workspace);

// result (rows, D) = gradient hidden, for a transposed gradient (rows, tokens).
void multiply_by_hidden(const Tensor& gradient, const Tensor& hidden, Tensor result);

// The sum of gradient (tokens,) times factor (tokens,), if not null.
template <class T>
double sum_of(const T* gradient, std::int64_t tokens, const float* factor) {
  double sum = 0;
  for (std::int64_t j = 0; j < tokens; ++j) {
    const double g = static_cast<float>(gradient[j]);
    sum += factor == nullptr ? g : g * factor[j];
  }
  return sum;
}

// bias (rows,) = sum over tokens of gradient (rows, tokens) times factor (tokens,), if not empty.
void sum_tokens(const Tensor& gradient, const std::vector<float>& factor, Tensor bias);

// Memory for transposed gradients (rows, tokens), 0 behind the last token. Products that read whole
// registers multiply what lies there by 0, oneDNN's on AMX for one; 0 times NaN would be NaN.
Tensor gradient_buffer(std::int64_t rows, std::int64_t tokens, at::ScalarType dtype);

// d weight (V, D), and d bias (V,) if not null, from gradients of blocks of the head's rows that
// are multiplied by `hidden` (tokens, D) while they are in the cache: begin(first, rows) starts a
// block, f(part, out, stride) writes its gradients out (rows, columns), and finite numbers behind
// them up to a multiple of kColumnBlock. `factor` (tokens,) as in sum_tokens.
template <class Begin, class F>
void weight_gradient(const Tensor& hidden, const std::vector<float>& factor, Tensor& d_weight,
                     Tensor* d_bias, const Begin& begin_block, const F& f) {
  constexpr std::int64_t kDepth = WeightGradient::kDepth;
  const std::int64_t vocabulary = d_weight.size(0), n = hidden.size(0);
  const std::int64_t height = block_rows(vocabulary, d_weight.size(1));
  WeightGradient product(hidden, height);
  Tensor sums = at::empty({d_bias == nullptr ? 0 : vocabulary}, at::kFloat);
  const std::int64_t blocks = (vocabulary + height - 1) / height;
  at::parallel_for(0, blocks, 1, [&](std::int64_t from, std::int64_t to) {
    Tensor gradient = gradient_buffer(height, round_up(std::min(kDepth, n), 32), at::kBFloat16);
    const std::int64_t stride = gradient.stride(0);
    auto* g = gradient.mutable_data_ptr<at::BFloat16>();
    std::vector<double> bias(height);
    for (std::int64_t i = from; i < to; ++i) {
      const std::int64_t first = i * height, rows = std::min(height, vocabulary - first);
      begin_block(first, rows);
      std::fill(bias.begin(), bias.end(), 0.0);
      for (std::int64_t token = 0; token < n; token += kDepth) {
        const std::int64_t count = std::min(kDepth, n - token);
        f(Part{first, rows, token, count}, g, stride);
        // What a whole step of the product may read: of an earlier token it might be NaN.
        for (std::int64_t j = round_up(count, kColumnBlock); j < round_up(count, 32); ++j) {
          for (std::int64_t v = 0; v < rows; ++v) g[v * stride + j] = 0;
        }
        product.add(g, stride, rows, token, count);
        for (std::int64_t v = 0; d_bias != nullptr && v < rows; ++v) {
          bias[v] +=
              sum_of(g + v * stride, count, factor.empty() ? nullptr : factor.data() + token);
        }
      }
      product.write(rows, d_weight, first);
      for (std::int64_t v = 0; d_bias != nullptr && v < rows; ++v) {
        sums.mutable_data_ptr<float>()[first + v] = static_cast<float>(bias[v]);
      }
    }
    at::native::cpublas::brgemm_release();
  });
  if (d_bias != nullptr) d_bias->copy_(sums);
}

}  // namespace drrlhf::cpu
