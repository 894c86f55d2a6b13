// The forward of linear_token_logprobs on the CPU: log-probs and statistics of every token, and
// what its backward is to find.
#include "linear_token_logprobs.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "../message.h"
#include "bf16_product.h"
#include "head_products.h"
#include "logit_tiles.h"
#include "memory.h"
#include "tile_sizes.h"

namespace drrlhf::cpu {

void check_head(const Tensor& hidden, const Head& head, const Tensor& labels) {
  const Tensor& weight = head.weight;
  DRRLHF_CHECK_VALUE(hidden.dim() >= 1 && weight.dim() == 2 && hidden.size(-1) == weight.size(1),
                     "weight: expected shape (V, D) with the D of hidden ", hidden.sizes(),
                     ", got ", weight.sizes());
  DRRLHF_CHECK_VALUE(hidden.scalar_type() == weight.scalar_type() && weight.device().is_cpu(),
                     "weight: expected ", hidden.scalar_type(), " on the CPU as hidden, got ",
                     weight.scalar_type(), " on ", weight.device());
  DRRLHF_CHECK_VALUE(weight.size(0) >= 1 && weight.size(1) >= 1,
                     "weight: expected V >= 1 and D >= 1, got ", weight.sizes());
  DRRLHF_CHECK_VALUE(
      !head.bias.has_value() || (head.bias->dim() == 1 && head.bias->device().is_cpu() &&
                                 head.bias->numel() == weight.size(0)),
      "bias: expected a CPU tensor of shape (", weight.size(0), ")");
}

void check_keep(Keep keep) {
  DRRLHF_CHECK_VALUE(keep == Keep::kNothing || keep == Keep::kHidden || keep == Keep::kColumns,
                     "keep: expected 0, 1 or 2, got ", static_cast<std::int64_t>(keep));
}

bool divides_by_label(at::ScalarType dtype, float logp) {
  constexpr float kImprobable = -31.0f;
  return dtype == at::kBFloat16 && logp >= kImprobable;
}

float divisor(const Transform& t, float logp) {
  return -std::exp(logp) * (t.scale * t.inverse_temperature);
}

Tensor kept_gradient(const Tensor& kept, std::int64_t vocabulary, std::int64_t valid) {
  return kept.view(-1).narrow(0, 0, vocabulary * valid).view({vocabulary, valid});
}

namespace {

// Log-probs of some tokens, and d logp / d logits or d logp / d hidden from the same exponentials:
// they are those of z - reference for a reference that is known beforehand, the label's own z as a
// dot product gives it.
class Ratios {
 public:
  Ratios(const Tokens& tokens, const Head& head, bool extras)
      : tokens_(tokens),
        weight_(head.weight),
        transform_(transform_of(head.temperature, head.softcap, head.logit_scale)),
        threads_(at::get_num_threads()),
        reference_(tokens.columns(), 0.0f),
        sum_(threads_ * tokens.columns(), 0.0f),
        label_z_(tokens.columns(), 0.0f),
        label_slope_(tokens.columns(), 0.0f) {
    if (extras) statistics_.emplace(tokens, true);
    find_references(head);
  }

  // Turns a tile into `out`, as SoftmaxKernels::tile_ratios.
  void turn(const Tile& tile, std::uint16_t* out, std::int64_t out_stride, bool transposed) {
    if (statistics_.has_value()) statistics_->fold(tile);
    const std::int64_t j = tile.column, tokens = std::min(tile.columns, tokens_.count() - j);
    float* sum = sum_.data() + at::get_thread_num() * tokens_.columns();
    softmax_kernels().tile_ratios(
        tile, tokens, tokens_.labels.data() + j, transform_,
        {reference_.data() + j, sum + j, label_z_.data() + j, label_slope_.data() + j}, out,
        out_stride, transposed);
  }

  // The statistics of token j. Where divides_by_label does not hold of its logp, NaN for one, they
  // and its gradient have to be made in another way.
  TokenStatistics finish_token(std::int64_t j) const {
    if (statistics_.has_value()) return statistics_->finish_token(j, weight_.size(0));
    Others others;
    others.reference = reference_[j];
    others.sum = sum(j);
    return finish(others, label_z_[j], tokens_.labels[j], weight_.size(0));
  }

  // The label's own entry of d logp / d logits, divided as the others are by now.
  float label_entry(std::int64_t j) const { return static_cast<float>(-sum(j)) * label_slope_[j]; }

  // d logp / d hidden of token j (D,), whose other entries' products with the head are summed up.
  void gradient(std::int64_t j, const TokenStatistics& s, const HeadSums& sums, float* out) const {
    const double log_factor = static_cast<double>(reference_[j]) - s.lse - s.lse_tail;
    const float scale = transform_.scale * transform_.inverse_temperature;
    sums.read(j, static_cast<float>(-std::exp(log_factor)) * scale, out);
    add_scaled_row(words_of(weight_) + tokens_.labels[j] * weight_.stride(0), weight_.size(1),
                   -std::expm1(s.logp) * label_slope_[j] * scale, out);
  }

 private:
  double sum(std::int64_t j) const {
    double sum = 0;
    for (int t = 0; t < threads_; ++t) sum += sum_[t * tokens_.columns() + j];
    return sum;
  }

  void find_references(const Head& head) {
    const std::uint16_t *rows = words_of(tokens_.hidden), *weight = words_of(weight_);
    const std::int64_t width = weight_.size(1);
    Tensor bias;
    if (head.bias.has_value()) bias = head.bias->to(at::kFloat).contiguous();
    at::parallel_for(0, tokens_.count(), 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t j = begin; j < end; ++j) {
        const std::int64_t y = tokens_.labels[j];
        reference_[j] = dot(rows + j * width, weight + y * weight_.stride(0), width) +
                        (bias.defined() ? bias.const_data_ptr<float>()[y] : 0.0f);
      }
    });
    const std::int64_t columns = tokens_.columns();
    softmax_kernels().transform_tile({{0, 1, 0, columns}, reference_.data(), columns}, nullptr,
                                     transform_);
    for (float& z : reference_) z = std::isfinite(z) ? z : 0.0f;
  }

  const Tokens& tokens_;
  Tensor weight_;
  Transform transform_;
  int threads_;
  std::vector<float> reference_, sum_, label_z_, label_slope_;
  std::optional<ColumnStatistics> statistics_;
};

// One call of the forward. Tokens whose label is not ignored are valid; each has a place in (...)
// and a column, its number among them.
class Forward {
 public:
  Forward(const Tensor& hidden, const Head& head, const Tensor& labels, std::int64_t outputs,
          Keep keep, std::int64_t workspace)
      : hidden_(hidden),
        head_(head),
        keep_(keep),
        workspace_(workspace),
        storage_(storage_of("hidden", hidden)),
        dtype_(hidden.scalar_type()),
        vocabulary_(head.weight.size(0)),
        width_(head.weight.size(1)),
        labels_(checked_labels(labels, hidden.sizes().slice(0, hidden.dim() - 1), vocabulary_,
                               head.ignore_index)),
        tokens_(labels_.numel()),
        result_(labels_.sizes(), outputs) {
    check_keep(keep);
    for (std::int64_t i = 0; i < tokens_; ++i) {
      if (labels_.const_data_ptr<std::int64_t>()[i] != head.ignore_index) places_.push_back(i);
    }
    kept_ = make_kept();
  }

  EightTensors run() {
    std::vector<std::int64_t> left(places_.size());
    std::iota(left.begin(), left.end(), 0);
    if (keep_ != Keep::kNothing && multiplies_packed(head_.weight)) left = by_ratios();
    by_statistics(left);
    return std::tuple_cat(result_.tensors(), std::make_tuple(kept_));
  }

 private:
  std::int64_t valid() const { return static_cast<std::int64_t>(places_.size()); }

  Tensor make_kept() const {
    if (keep_ == Keep::kHidden) {
      return valid() == tokens_ ? empty_on_huge_pages(hidden_.sizes(), dtype_)
                                : at::zeros(hidden_.sizes(), dtype_);
    }
    if (keep_ != Keep::kColumns) return at::empty({0}, dtype_);
    Tensor kept = empty_on_huge_pages({vocabulary_, tokens_}, dtype_);
    const std::int64_t used = vocabulary_ * valid();
    kept.view(-1).narrow(0, used, vocabulary_ * tokens_ - used).zero_();
    return kept;
  }

  // Log-probs and what is kept of all valid tokens, by Ratios. Returns the columns of those that
  // are left to be done in another way.
  std::vector<std::int64_t> by_ratios() {
    std::vector<std::int64_t> left;
    const std::int64_t n = valid();
    if (n == 0) return left;
    const std::int64_t budget = workspace_ / 4 * 3;
    const std::int64_t pass =
        keep_ == Keep::kColumns ? n : HeadSums::tokens_at_once(head_.weight, n, budget);
    for (std::int64_t start = 0; start < n; start += pass) {
      const std::int64_t count = std::min(pass, n - start);
      const Tokens tokens = tokens_at(hidden_, labels_, places_.data() + start, count);
      Ratios ratios(tokens, head_, result_.extras());
      const LogitTiles logits(tokens, head_);
      const auto answered = [&](const TokenStatistics& s) {
        return divides_by_label(at::kBFloat16, s.logp);
      };
      std::vector<TokenStatistics> statistics(count);
      const auto finish_tokens = [&] {
        for (std::int64_t j = 0; j < count; ++j) {
          statistics[j] = ratios.finish_token(j);
          if (answered(statistics[j])) {
            result_.set(tokens.place[j], statistics[j]);
          } else {
            left.push_back(start + j);
          }
        }
      };
      auto* to = kept_.mutable_data_ptr<at::BFloat16>();
      if (keep_ == Keep::kColumns) {
        keep_ratios(logits, ratios);
        finish_tokens();
        for (std::int64_t j = 0; j < count; ++j) {
          if (answered(statistics[j])) to[tokens.labels[j] * n + j] = ratios.label_entry(j);
        }
      } else {
        HeadSums sums(head_.weight, count, budget);
        sum_ratios(logits, ratios, sums);
        finish_tokens();
        write_rows(count, width_, [&](std::int64_t j, float* row) -> at::BFloat16* {
          if (!answered(statistics[j])) return nullptr;
          ratios.gradient(j, statistics[j], sums, row);
          return to + tokens.place[j] * width_;
        });
      }
    }
    return left;
  }

  // Writes the ratios of all valid tokens to what is kept.
  void keep_ratios(const LogitTiles& logits, Ratios& ratios) {
    const std::int64_t n = valid();
    auto* to = reinterpret_cast<std::uint16_t*>(kept_.mutable_data_ptr<at::BFloat16>());
    logits.each(0, vocabulary_, nullptr, 0, [&](const Tile& tile) {
      ratios.turn(tile, to + tile.first * n + tile.column, n, false);
    });
  }

  // Multiplies the ratios by the head, tile by tile.
  static void sum_ratios(const LogitTiles& logits, Ratios& ratios, HeadSums& sums) {
    const std::int64_t stride = stride_for(kTileTokens), size = sums.height() * stride;
    Tensor tiles = at::empty({at::get_num_threads(), size}, at::kFloat);
    std::vector<Tensor> blocks;
    for (int t = 0; t < at::get_num_threads(); ++t) blocks.push_back(logits.block(sums.height()));
    const auto take = [&](std::int64_t first, std::int64_t rows) {
      logits.take(first, rows, blocks[at::get_thread_num()]);
    };
    sums.each(take, [&](Part part, std::uint16_t* out, std::int64_t out_stride) {
      part.columns = round_up(part.columns, kColumnBlock);
      const int t = at::get_thread_num();
      const Tile tile = {part, tiles.mutable_data_ptr<float>() + t * size, stride};
      logits.make(blocks[t], tile);
      ratios.turn(tile, out, out_stride, true);
    });
  }

  // Log-probs and what is kept of the tokens in the columns `left`, from chunks of float32 logits
  // whose statistics are known before their gradient takes their place.
  void by_statistics(const std::vector<std::int64_t>& left) {
    const bool scored = keep_ == Keep::kNothing;
    const auto n = static_cast<std::int64_t>(left.size());
    const std::int64_t pass =
        scored ? kScoredTokens : tokens_per_pass(n, vocabulary_, workspace_, sizeof(float));
    std::vector<std::int64_t> places(n);
    for (std::int64_t j = 0; j < n; ++j) places[j] = places_[left[j]];
    Tensor chunk;
    if (!scored && n > 0) {
      chunk = empty_on_huge_pages({vocabulary_, stride_for(std::min(n, pass))}, at::kFloat);
    }
    for (std::int64_t start = 0; start < n; start += pass) {
      const std::int64_t count = std::min(pass, n - start);
      const Tokens tokens = tokens_at(hidden_, labels_, places.data() + start, count);
      float* z = scored ? nullptr : chunk.mutable_data_ptr<float>();
      Columns columns = find_statistics(tokens, z);
      if (!scored) keep_gradient(tokens, columns, z, left, start);
    }
  }

  // Sets the tokens' results, and returns what their gradient needs to know. z (V, stride) gets
  // their logits, if not null.
  Columns find_statistics(const Tokens& tokens, float* z) {
    const LogitTiles logits(tokens, head_);
    ColumnStatistics statistics(tokens, result_.extras());
    logits.each(0, vocabulary_, z, stride_for(tokens.count()),
                [&](const Tile& tile) { statistics.fold(tile); });
    Columns columns(tokens.columns());
    for (std::int64_t j = 0; j < tokens.count(); ++j) {
      const TokenStatistics s = statistics.finish_token(j, vocabulary_);
      result_.set(tokens.place[j], s);
      columns.logp[j] = s.logp;
      columns.lse[j] = s.lse;
      columns.lse_tail[j] = s.lse_tail;
    }
    return columns;
  }

  // Turns the logits z (V, stride) of the tokens in the columns `left` from `start` on into what is
  // kept of them.
  //
  // The gradient by the logits takes their place, row by row: at the front of each row, or in what
  // is kept if whole column blocks fit there.
  void keep_gradient(const Tokens& tokens, Columns& columns, float* z,
                     const std::vector<std::int64_t>& left, std::int64_t start) {
    const std::int64_t count = tokens.count(), stride = stride_for(count);
    const bool all = left.size() == places_.size();
    const bool direct = keep_ == Keep::kColumns && all && count % kColumnBlock == 0;
    if (keep_ == Keep::kColumns && dtype_ == at::kBFloat16) divide(columns, count);
    const auto product = product_dtype(dtype_);
    const Storage written = direct ? storage_ : storage_of("hidden", at::empty({0}, product));
    const std::int64_t size = at::elementSize(direct ? dtype_ : product);
    char* base = direct ? static_cast<char*>(kept_.mutable_data_ptr()) + start * size
                        : reinterpret_cast<char*>(z);
    const std::int64_t out_stride = direct ? valid() : stride * std::int64_t(sizeof(float)) / size;
    GradientTiles gradient(tokens, columns, head_, written);
    const std::int64_t tiles = (vocabulary_ + kTileRows - 1) / kTileRows;
    at::parallel_for(0, tiles, 1, [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t i = from; i < to; ++i) {
        const std::int64_t first = i * kTileRows, rows = std::min(kTileRows, vocabulary_ - first);
        gradient.write({{first, rows, 0, tokens.columns()}, z + first * stride, stride},
                       base + first * out_stride * size, out_stride);
      }
    });
    if (direct) return;
    const Tensor transposed =
        at::from_blob(base, {vocabulary_, count}, {out_stride, 1}, at::dtype(product));
    if (keep_ == Keep::kColumns) {
      const Tensor to = kept_gradient(kept_, vocabulary_, valid());
      if (all) {
        to.narrow(1, start, count).copy_(transposed);
      } else {
        to.index_copy_(1, as_tensor(left.data() + start, count), transposed.to(dtype_));
      }
    } else if (static_cast<std::int64_t>(left.size()) == tokens_) {
      multiply_by_head(transposed, head_.weight, kept_.view({-1, width_}).narrow(0, start, count),
                       workspace_);
    } else {
      Tensor rows = at::empty({count, width_}, dtype_);
      multiply_by_head(transposed, head_.weight, rows, workspace_);
      kept_.view({-1, width_}).index_copy_(0, as_tensor(tokens.place.data(), count), rows);
    }
  }

  // Sets the factors by which kept gradients are divided by their labels' probability.
  void divide(Columns& columns, std::int64_t count) const {
    const Transform transform = transform_of(head_.temperature, head_.softcap, head_.logit_scale);
    columns.a.assign(columns.logp.size(), 1.0f);
    for (std::int64_t j = 0; j < count; ++j) {
      if (divides_by_label(dtype_, columns.logp[j])) {
        columns.a[j] = 1 / divisor(transform, columns.logp[j]);
      }
    }
  }

  static Tensor as_tensor(const std::int64_t* x, std::int64_t count) {
    return at::from_blob(const_cast<std::int64_t*>(x), {count}, at::dtype(at::kLong));
  }

  const Tensor& hidden_;
  const Head& head_;
  Keep keep_;
  std::int64_t workspace_;
  Storage storage_;
  at::ScalarType dtype_;
  std::int64_t vocabulary_, width_;
  Tensor labels_;
  std::int64_t tokens_;
  TokenOutputs result_;
  std::vector<std::int64_t> places_;  // of the valid tokens
  Tensor kept_;
};

}  // namespace

EightTensors linear_token_logprobs_cpu(const Tensor& hidden, const Head& head, const Tensor& labels,
                                       std::int64_t outputs, Keep keep, std::int64_t workspace) {
  const PlainTensors plain;
  check_head(hidden, head, labels);
  return Forward(hidden, head, labels, outputs, keep, workspace).run();
}

}  // namespace drrlhf::cpu
