// The backward of linear_token_logprobs on the CPU: gradients of hidden states, head and bias from
// what the forward kept, or from logits that are made again.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "../message.h"
#include "bf16_product.h"
#include "head_products.h"
#include "linear_token_logprobs.h"
#include "logit_tiles.h"
#include "memory.h"
#include "tile_sizes.h"

namespace drrlhf::cpu {
namespace {

// Copies the columns `place` of a kept gradient (V, valid tokens) to rows of
// `out_stride` entries: those of [begin, end) of the vocabulary.
void gather_columns(const Tensor& kept, std::int64_t begin, std::int64_t end,
                    const std::vector<std::int64_t>& place, void* out, std::int64_t out_stride) {
  const auto copy = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const T* from = static_cast<const T*>(kept.const_data_ptr());
    const std::int64_t stride = kept.stride(0);
    at::parallel_for(begin, end, 64, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t v = first; v < last; ++v) {
        const T* row = from + v * stride;
        T* target = to + (v - begin) * out_stride;
        for (std::size_t j = 0; j < place.size(); ++j) target[j] = row[place[j]];
      }
    });
  };
  if (kept.element_size() == 4) {
    copy(static_cast<std::uint32_t*>(out));
  } else {
    copy(static_cast<std::uint16_t*>(out));
  }
}

// d weight (V, D), and d bias (V,) if not null, from the logits, made anew.
void weight_gradient_of_logits(const Tokens& tokens, const Head& head, GradientTiles& tiles,
                               Tensor& d_weight, Tensor* d_bias) {
  const std::int64_t height = block_rows(head.weight.size(0), head.weight.size(1));
  const std::int64_t stride = stride_for(kTileTokens);
  const LogitTiles logits(tokens, head);
  Tensor z = at::empty({at::get_num_threads(), height, stride}, at::kFloat);
  std::vector<Tensor> blocks;
  for (int t = 0; t < at::get_num_threads(); ++t) blocks.push_back(logits.block(height));
  weight_gradient(
      tokens.hidden, {}, d_weight, d_bias,
      [&](std::int64_t first, std::int64_t rows) {
        logits.take(first, rows, blocks[at::get_thread_num()]);
      },
      [&](const Part& part, at::BFloat16* out, std::int64_t out_stride) {
        const int t = at::get_thread_num();
        Tile tile = {part, z.mutable_data_ptr<float>() + t * height * stride, stride};
        for (std::int64_t j = 0; j < part.columns; j += kTileTokens) {
          tile.column = part.column + j;
          tile.columns = round_up(std::min(kTileTokens, part.columns - j), kColumnBlock);
          logits.make(blocks[t], tile);
          tiles.write(tile, out + j, out_stride);
        }
      });
}

// The same from a kept gradient (V, valid tokens) and its columns `place`, all if `whole`; `hidden`
// has the tokens' coefficients in it.
void weight_gradient_of_kept(const Tensor& kept, const std::vector<std::int64_t>& place, bool whole,
                             const Tensor& hidden, const std::vector<float>& factor,
                             Tensor& d_weight, Tensor* d_bias) {
  const std::uint16_t* from = words_of(kept);
  const std::int64_t step = kept.stride(0);
  weight_gradient(
      hidden, factor, d_weight, d_bias, [](std::int64_t, std::int64_t) {},
      [&](const Part& part, at::BFloat16* out, std::int64_t stride) {
        const std::int64_t token = part.column, count = part.columns;
        for (std::int64_t v = 0; v < part.rows; ++v) {
          const std::uint16_t* row = from + (part.first + v) * step;
          auto* to = reinterpret_cast<std::uint16_t*>(out + v * stride);
          if (whole) {
            std::memcpy(to, row + token, count * sizeof *to);
          } else {
            for (std::int64_t j = 0; j < count; ++j) to[j] = row[place[token + j]];
          }
          std::fill(to + count, to + round_up(count, kColumnBlock), 0);
        }
      });
}

// One call of the backward. Tokens whose label is not ignored are valid, and have the columns of a
// kept gradient; those of them with an upstream gradient are active, and only they take part.
class Backward {
 public:
  Backward(const Tensor& hidden, const Head& head, const Tensor& labels, const Upstream& upstream,
           const Tensor& kept, Keep keep, std::int64_t workspace)
      : hidden_(hidden),
        head_(head),
        labels_(labels),
        upstream_(upstream),
        kept_(kept),
        keep_(keep),
        workspace_(workspace),
        storage_(storage_of("hidden", hidden)),
        dtype_(hidden.scalar_type()),
        vocabulary_(head.weight.size(0)),
        width_(head.weight.size(1)),
        by_entropy_(upstream.grad_entropy.defined()),
        transform_(transform_of(head.temperature, head.softcap, head.logit_scale)) {
    std::int64_t valid = 0;
    for (std::int64_t i = 0; i < tokens(); ++i) {
      if (labels_.const_data_ptr<std::int64_t>()[i] == head.ignore_index) continue;
      if (Upstream::of(upstream_.grad, i) != 0 || Upstream::of(upstream_.grad_entropy, i) != 0) {
        active_.push_back(i);
        column_.push_back(valid);
      }
      ++valid;
    }
    whole_ = active() == valid;
    has_gradient_ = keep == Keep::kColumns && !by_entropy_;
    if (has_gradient_) gradient_ = kept_gradient(kept, vocabulary_, valid);
    made_ = has_gradient_ ? dtype_ : product_dtype(dtype_);
  }

  Tensor d_hidden() const {
    if (keep_ == Keep::kHidden && !by_entropy_) return scaled_rows();
    return multiplied_rows();
  }

  // Writes d weight (V, D) and d bias (V,), either of which may be null.
  void head_gradients(Tensor* d_weight, Tensor* d_bias) const {
    if (d_weight == nullptr && d_bias == nullptr) return;
    if (active() == 0) {
      if (d_weight != nullptr) d_weight->zero_();
      if (d_bias != nullptr) d_bias->zero_();
      return;
    }
    const Tokens tokens = tokens_at(hidden_, labels_, active_.data(), active());
    Columns columns = columns_of(tokens);
    Tensor rows = tokens.hidden;
    if (has_gradient_) {
      for (std::int64_t j = 0; j < active(); ++j) columns.a[j] = coefficient(active_[j]);
      if (d_weight != nullptr) {
        rows = at::empty({active(), width_}, dtype_);
        for (std::int64_t j = 0; j < active(); ++j) {
          scale_to(tokens.hidden, j, rows, j, columns.a[j]);
        }
      }
    }
    GradientTiles tiles(tokens, columns, head_, storage_made());
    const std::vector<float> factor = has_gradient_ ? columns.a : std::vector<float>();
    if (d_weight == nullptr || !multiplies_packed(head_.weight)) {
      multiplied_head(tokens, tiles, rows, factor, d_weight, d_bias);
    } else if (has_gradient_) {
      weight_gradient_of_kept(gradient_, column_, whole_, rows, factor, *d_weight, d_bias);
    } else {
      weight_gradient_of_logits(tokens, head_, tiles, *d_weight, d_bias);
    }
  }

 private:
  std::int64_t tokens() const { return labels_.numel(); }
  std::int64_t active() const { return static_cast<std::int64_t>(active_.size()); }
  Storage storage_made() const { return storage_of("hidden", at::empty({0}, made_)); }

  // The coefficient of a token's column of the kept gradient.
  float coefficient(std::int64_t token) const {
    const float logp = Upstream::of(upstream_.logp, token);
    return Upstream::of(upstream_.grad, token) *
           (divides_by_label(dtype_, logp) ? divisor(transform_, logp) : 1.0f);
  }

  Columns columns_of(const Tokens& tokens) const {
    Columns c(tokens.columns());
    c.a.assign(tokens.columns(), 0.0f);
    if (by_entropy_) {
      c.b.assign(tokens.columns(), 0.0f);
      c.entropy.assign(tokens.columns(), 0.0f);
    }
    for (std::int64_t j = 0; j < tokens.count(); ++j) {
      const RowCoefficients row = upstream_.of(tokens.place[j]);
      c.a[j] = row.a;
      c.logp[j] = row.logp;
      c.lse[j] = row.lse;
      c.lse_tail[j] = row.lse_tail;
      if (by_entropy_) {
        c.b[j] = row.b;
        c.entropy[j] = row.entropy;
      }
    }
    return c;
  }

  // The transposed gradient of tokens by the logits [begin, end), made anew, coefficients included.
  static Tensor recompute(const Tokens& tokens, const LogitTiles& logits, GradientTiles& gradient,
                          std::int64_t begin, std::int64_t end, Tensor out) {
    const std::int64_t out_stride = out.stride(0), size = out.element_size();
    char* to = static_cast<char*>(out.mutable_data_ptr());
    logits.each(begin, end, nullptr, stride_for(tokens.count()), [&](const Tile& tile) {
      const std::int64_t at = (tile.first - begin) * out_stride + tile.column;
      gradient.write(tile, to + at * size, out_stride);
    });
    return out.narrow(0, 0, end - begin).narrow(1, 0, tokens.count());
  }

  // The row `place` of `to` (..., D) = factor times a row of `rows`.
  void scale_to(const Tensor& rows, std::int64_t row, Tensor& to, std::int64_t place,
                float factor) const {
    const std::int64_t bytes = width_ * to.element_size();
    softmax_kernels().scale_row(static_cast<const char*>(rows.const_data_ptr()) + row * bytes,
                                static_cast<char*>(to.mutable_data_ptr()) + place * bytes, storage_,
                                width_, factor);
  }

  // d hidden where the forward kept d logp / d hidden.
  Tensor scaled_rows() const {
    Tensor d_hidden = empty_on_huge_pages(hidden_.sizes(), dtype_);
    std::vector<float> factor(tokens(), 0.0f);
    for (const std::int64_t i : active_) factor[i] = Upstream::of(upstream_.grad, i);
    at::parallel_for(0, tokens(), 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        if (factor[i] == 0) {
          const std::int64_t bytes = width_ * d_hidden.element_size();
          std::memset(static_cast<char*>(d_hidden.mutable_data_ptr()) + i * bytes, 0, bytes);
        } else {
          scale_to(kept_, i, d_hidden, i, factor[i]);
        }
      }
    });
    return d_hidden;
  }

  // d hidden by products with the head.
  Tensor multiplied_rows() const {
    const std::int64_t n = active();
    Tensor d_hidden = n == tokens() ? empty_on_huge_pages(hidden_.sizes(), dtype_)
                                    : at::zeros(hidden_.sizes(), dtype_);
    const bool in_one = has_gradient_ && whole_;
    const std::int64_t pass =
        in_one ? std::max<std::int64_t>(1, n)
               : tokens_per_pass(n, vocabulary_, workspace_, at::elementSize(made_));
    Tensor buffer;
    if (!in_one && n > 0) buffer = gradient_buffer(vocabulary_, std::min(n, pass), made_);
    for (std::int64_t start = 0; start < n; start += pass) {
      const std::int64_t count = std::min(pass, n - start);
      const Tensor gradient = in_one ? gradient_ : gradient_of(start, count, buffer);
      Tensor rows = at::empty({count, width_}, dtype_);
      multiply_by_head(gradient, head_.weight, rows, workspace_ / 4 * 3);
      for (std::int64_t j = 0; j < count; ++j) {
        const std::int64_t i = active_[start + j];
        scale_to(rows, j, d_hidden, i, has_gradient_ ? coefficient(i) : 1.0f);
      }
    }
    return d_hidden;
  }

  // The transposed gradient of `count` active tokens by all logits, in the buffer.
  Tensor gradient_of(std::int64_t start, std::int64_t count, Tensor& buffer) const {
    if (has_gradient_) {
      const std::vector<std::int64_t> place(column_.begin() + start,
                                            column_.begin() + start + count);
      gather_columns(gradient_, 0, vocabulary_, place, buffer.mutable_data_ptr(), buffer.stride(0));
      return buffer.narrow(1, 0, count);
    }
    const Tokens tokens = tokens_at(hidden_, labels_, active_.data() + start, count);
    const Columns columns = columns_of(tokens);
    const LogitTiles logits(tokens, head_);
    GradientTiles tiles(tokens, columns, head_, storage_made());
    return recompute(tokens, logits, tiles, 0, vocabulary_, buffer);
  }

  // The head's gradients by products of torch's, and by sums where that of the bias is all.
  void multiplied_head(const Tokens& tokens, GradientTiles& tiles, const Tensor& rows,
                       const std::vector<float>& factor, Tensor* d_weight, Tensor* d_bias) const {
    const std::int64_t n = active(), stride = stride_for(n);
    const std::int64_t fit = workspace_ / (stride * at::elementSize(made_)) / kTileRows * kTileRows;
    const bool in_one = has_gradient_ && whole_;
    const std::int64_t block =
        in_one ? vocabulary_ : std::min(vocabulary_, std::max(fit, kTileRows));
    Tensor buffer;
    if (!in_one) buffer = gradient_buffer(block, n, made_);
    std::optional<LogitTiles> logits;
    if (!has_gradient_) logits.emplace(tokens, head_);
    for (std::int64_t begin = 0; begin < vocabulary_; begin += block) {
      const std::int64_t count = std::min(block, vocabulary_ - begin);
      Tensor gradient = gradient_;
      if (has_gradient_ && !whole_) {
        gather_columns(gradient_, begin, begin + count, column_, buffer.mutable_data_ptr(), stride);
        gradient = buffer.narrow(0, 0, count).narrow(1, 0, n);
      } else if (!has_gradient_) {
        gradient = recompute(tokens, *logits, tiles, begin, begin + count, buffer);
      }
      if (d_weight != nullptr) {
        multiply_by_hidden(gradient, rows, d_weight->narrow(0, begin, count));
      }
      if (d_bias != nullptr) sum_tokens(gradient, factor, d_bias->narrow(0, begin, count));
    }
  }

  const Tensor& hidden_;
  const Head& head_;
  const Tensor& labels_;
  const Upstream& upstream_;
  const Tensor& kept_;
  Keep keep_;
  std::int64_t workspace_;
  Storage storage_;
  at::ScalarType dtype_;
  std::int64_t vocabulary_, width_;
  bool by_entropy_;
  Transform transform_;
  std::vector<std::int64_t> active_, column_;  // places, and columns of a kept gradient
  bool whole_;                                 // whether every valid token is active
  bool has_gradient_;                          // whether the forward's answers what is asked
  Tensor gradient_;                            // (V, valid tokens)
  at::ScalarType made_;                        // in which gradients by the logits are
};

void check_kept(const Tensor& kept, Keep keep, at::ScalarType dtype, std::int64_t expected) {
  check_keep(keep);
  DRRLHF_CHECK_VALUE(
      keep == Keep::kNothing || (kept.scalar_type() == dtype && kept.is_contiguous() &&
                                 kept.device().is_cpu() && kept.numel() == expected),
      "kept: expected what the forward kept, got ", kept.sizes(), " of ", kept.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_token_logprobs_backward_cpu(
    const Tensor& hidden, const Head& head, const Tensor& labels, const GivenUpstream& given,
    const Tensor& kept, Keep keep, std::int64_t workspace, bool need_hidden, bool need_weight,
    bool need_bias) {
  const PlainTensors plain;
  check_head(hidden, head, labels);
  storage_of("hidden", hidden);
  const auto dtype = hidden.scalar_type();
  const std::int64_t vocabulary = head.weight.size(0), width = head.weight.size(1);
  const auto shape = hidden.sizes().slice(0, hidden.dim() - 1);
  const Tensor y = checked_labels(labels, shape, vocabulary, head.ignore_index);
  const std::int64_t total = y.numel();
  check_kept(kept, keep, dtype, total * (keep == Keep::kHidden ? width : vocabulary));
  const Upstream upstream(given, total);
  const Backward backward(hidden, head, y, upstream, kept, keep, workspace);

  Tensor d_hidden = at::empty({0}, dtype), d_weight = at::empty({0}, head.weight.options());
  Tensor d_bias = at::empty({0}, head.bias.has_value() ? head.bias->options() : d_weight.options());
  if (need_hidden) d_hidden = backward.d_hidden();
  if (need_weight) d_weight = empty_on_huge_pages({vocabulary, width}, dtype);
  if (need_bias) d_bias = at::empty({vocabulary}, d_bias.options());
  backward.head_gradients(need_weight ? &d_weight : nullptr, need_bias ? &d_bias : nullptr);
  return {d_hidden, d_weight, d_bias};
}

}  // namespace drrlhf::cpu
