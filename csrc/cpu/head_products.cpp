#include "head_products.h"

#include "memory.h"
#include "vectorised.h"

namespace drrlhf::cpu {

HeadSums::HeadSums(const Tensor& weight, std::int64_t tokens, std::int64_t workspace)
    : weight_(weight),
      vocabulary_(weight.size(0)),
      width_(weight.size(1)),
      tokens_(tokens),
      stride_(stride_for(width_)),
      height_(block_rows(vocabulary_, width_)),
      blocks_((vocabulary_ + height_ - 1) / height_) {
  const std::int64_t threads = at::get_num_threads();
  const std::int64_t fit = workspace / (tokens * stride_ * std::int64_t(sizeof(float)));
  parts_ = std::clamp<std::int64_t>(std::min(fit, blocks_), 1, threads);
  chunk_ = round_up((tokens + threads / parts_ - 1) / (threads / parts_), kTileTokens);
  chunks_ = (tokens + chunk_ - 1) / chunk_;
  sums_ = empty_on_huge_pages({parts_, tokens, stride_}, at::kFloat);
}

std::int64_t HeadSums::tokens_at_once(const Tensor& weight, std::int64_t tokens,
                                      std::int64_t workspace) {
  const std::int64_t bytes = stride_for(weight.size(1)) * std::int64_t(sizeof(float));
  const std::int64_t threads = at::get_num_threads();
  const std::int64_t fit =
      std::max(kTileTokens, workspace / (bytes * threads) / kTileTokens * kTileTokens);
  // Threads beyond those whose sums fit share: more tokens at a time are worth more.
  const std::int64_t shared =
      std::min<std::int64_t>(workspace / bytes, 1024) / kTileTokens * kTileTokens;
  const std::int64_t most = std::max(fit, shared);
  const std::int64_t passes = (tokens + most - 1) / most;
  return std::min(most, round_up((tokens + passes - 1) / passes, kTileTokens));
}

void HeadSums::read(std::int64_t j, float factor, float* out) const {
  const float* from = sums_.const_data_ptr<float>() + j * stride_;
  scaled(from, width_, factor, out);
  for (std::int64_t part = 1; part < parts_; ++part) {
    add_scaled(from + part * tokens_ * stride_, width_, factor, out);
  }
}

WeightGradient::WeightGradient(const Tensor& hidden, std::int64_t height)
    : depth_(round_up(hidden.size(0), 2)),
      width_(hidden.size(1)),
      height_(height),
      packed_(at::empty({depth_ * width_}, at::kBFloat16)),
      sums_(at::empty({at::get_num_threads(), height, stride_for(width_)}, at::kFloat)) {
  pack_pairs(hidden.const_data_ptr<at::BFloat16>(), hidden.stride(0), hidden.size(0), width_,
             packed_.mutable_data_ptr<at::BFloat16>());
}

void WeightGradient::add(const at::BFloat16* gradient, std::int64_t stride, std::int64_t rows,
                         std::int64_t token, std::int64_t count) {
  const std::int64_t depth = round_up(count, 2);
  const auto* packed = packed_.const_data_ptr<at::BFloat16>();
  for (std::int64_t d = 0; d < width_; d += kProductBlock) {
    const std::int64_t block = std::min(kProductBlock, width_ - d);
    at::native::cpublas::brgemm(rows, block, depth, stride, block, stride_for(width_), token > 0,
                                gradient, packed + d * depth_ + token * block, sums() + d, true);
  }
}

void WeightGradient::write(std::int64_t rows, Tensor& d_weight, std::int64_t first) {
  at::BFloat16* out = d_weight.mutable_data_ptr<at::BFloat16>() + first * width_;
  for (std::int64_t v = 0; v < rows; ++v) {
    softmax_kernels().narrow_row(sums() + v * stride_for(width_), out + v * width_,
                                 Storage::kBFloat16, width_);
  }
}

void multiply_by_head(const Tensor& gradient, const Tensor& weight, Tensor result,
                      std::int64_t workspace) {
  if (multiplies_packed(weight)) {
    const std::int64_t n = gradient.size(1), step = gradient.stride(0), width = weight.size(1);
    const std::int64_t pass = HeadSums::tokens_at_once(weight, n, workspace);
    for (std::int64_t start = 0; start < n; start += pass) {
      const std::int64_t count = std::min(pass, n - start);
      const std::uint16_t* from = words_of(gradient) + start;
      HeadSums sums(weight, count, workspace);
      sums.each([](std::int64_t, std::int64_t) {},
                [&](const Part& part, std::uint16_t* out, std::int64_t stride) {
                  softmax_kernels().transpose(from + part.first * step + part.column, step,
                                              part.rows, part.columns, out, stride);
                });
      auto* to = result.mutable_data_ptr<at::BFloat16>() + start * width;
      write_rows(count, width, [&](std::int64_t j, float* row) {
        sums.read(j, 1.0f, row);
        return to + j * width;
      });
    }
    return;
  }
  if (multiplies(weight.scalar_type())) {
    at::mm_out(result, gradient.t(), weight);
    return;
  }
  Tensor sum = at::zeros(result.sizes(), at::kFloat);
  for (std::int64_t v = 0; v < weight.size(0); v += kWidenedRows) {
    const std::int64_t rows = std::min(kWidenedRows, weight.size(0) - v);
    sum.addmm_(gradient.narrow(0, v, rows).to(at::kFloat).t(),
               weight.narrow(0, v, rows).to(at::kFloat));
  }
  result.copy_(sum);
}

void multiply_by_hidden(const Tensor& gradient, const Tensor& hidden, Tensor result) {
  if (multiplies(hidden.scalar_type())) {
    at::mm_out(result, gradient, hidden);
    return;
  }
  const Tensor wide = hidden.to(at::kFloat);
  for (std::int64_t v = 0; v < gradient.size(0); v += kWidenedRows) {
    const std::int64_t rows = std::min(kWidenedRows, gradient.size(0) - v);
    result.narrow(0, v, rows).copy_(at::mm(gradient.narrow(0, v, rows).to(at::kFloat), wide));
  }
}

void sum_tokens(const Tensor& gradient, const std::vector<float>& factor, Tensor bias) {
  const std::int64_t n = gradient.size(1), stride = gradient.stride(0);
  Tensor sums = at::empty({gradient.size(0)}, at::kFloat);
  float* to = sums.mutable_data_ptr<float>();
  const auto sum = [&](const auto* from) {
    at::parallel_for(0, gradient.size(0), 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t v = begin; v < end; ++v) {
        to[v] = static_cast<float>(
            sum_of(from + v * stride, n, factor.empty() ? nullptr : factor.data()));
      }
    });
  };
  if (gradient.scalar_type() == at::kBFloat16) {
    sum(gradient.const_data_ptr<at::BFloat16>());
  } else if (gradient.scalar_type() == at::kHalf) {
    sum(gradient.const_data_ptr<at::Half>());
  } else {
    sum(gradient.const_data_ptr<float>());
  }
  bias.copy_(sums);
}

Tensor gradient_buffer(std::int64_t rows, std::int64_t tokens, at::ScalarType dtype) {
  const std::int64_t stride = stride_for(tokens);
  Tensor buffer = empty_on_huge_pages({rows, stride}, dtype);
  buffer.narrow(1, tokens, stride - tokens).zero_();
  return buffer;
}

}  // namespace drrlhf::cpu
