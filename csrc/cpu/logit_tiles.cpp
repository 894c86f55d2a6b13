#include "logit_tiles.h"

#include <cstring>

#include "bf16_product.h"

namespace drrlhf::cpu {
namespace {

// Rows of hidden (..., D) at places of (...); a view where they are all rows in order.
Tensor rows_at(const Tensor& hidden, const std::int64_t* place, std::int64_t count) {
  const std::int64_t width = hidden.size(-1);
  if (count == 0) return at::empty({0, width}, hidden.options());
  if (hidden.is_contiguous() && place[count - 1] - place[0] == count - 1) {
    return hidden.view({-1, width}).narrow(0, place[0], count);
  }
  const Tensor from = hidden.stride(-1) == 1 || width == 1 ? hidden : hidden.contiguous();
  Tensor rows = at::empty({count, width}, hidden.options());
  const std::int64_t size = hidden.element_size();
  const char* source = static_cast<const char*>(from.const_data_ptr());
  char* target = static_cast<char*>(rows.mutable_data_ptr());
  at::parallel_for(0, count, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      std::int64_t rest = place[i], offset = 0;
      for (std::int64_t d = from.dim() - 2; d >= 0; --d) {
        offset += rest % from.size(d) * from.stride(d);
        rest /= from.size(d);
      }
      std::memcpy(target + i * width * size, source + offset * size, width * size);
    }
  });
  return rows;
}

}  // namespace

Tokens tokens_at(const Tensor& hidden, const Tensor& labels, const std::int64_t* place,
                 std::int64_t count) {
  Tokens tokens;
  tokens.place.assign(place, place + count);
  tokens.hidden = rows_at(hidden, place, count);
  tokens.labels.assign(round_up(count, kColumnBlock), -1);
  const auto* y = labels.const_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < count; ++i) tokens.labels[i] = y[place[i]];
  return tokens;
}

LogitTiles::LogitTiles(const Tokens& tokens, const Head& head)
    : tokens_(tokens), weight_(head.weight), width_(head.weight.size(1)) {
  transform_ = transform_of(head.temperature, head.softcap, head.logit_scale);
  if (head.bias.has_value()) bias_ = head.bias->to(at::kFloat).contiguous();
  blocked_ = weight_.scalar_type() == at::kBFloat16 && multiplies_bfloat16() && width_ % 2 == 0 &&
             weight_.stride(1) == 1;
  if (blocked_) {
    pack();
  } else {
    hidden_ = tokens.hidden.to(at::kFloat);
  }
}

Tensor LogitTiles::block(std::int64_t height) const {
  // What lies between the rows must not be NaN.
  return at::zeros({(width_ + kPiece - 1) / kPiece, height, kPieceStride}, at::kBFloat16);
}

void LogitTiles::take(std::int64_t first, std::int64_t rows, Tensor& block) const {
  const auto* from = weight_.const_data_ptr<at::BFloat16>() + first * weight_.stride(0);
  auto* to = block.mutable_data_ptr<at::BFloat16>();
  for (std::int64_t v = 0; v < rows; ++v) {
    for (std::int64_t k = 0; k < width_; k += kPiece) {
      std::memcpy(to + k / kPiece * block.stride(0) + v * kPieceStride,
                  from + v * weight_.stride(0) + k,
                  std::min(kPiece, width_ - k) * sizeof(at::BFloat16));
    }
  }
}

void LogitTiles::make(const Tensor& block, const Tile& tile) const {
  const auto* from = block.const_data_ptr<at::BFloat16>();
  const auto* packed =
      reinterpret_cast<const at::BFloat16*>(packed_.const_data_ptr()) + tile.column * width_;
  for (std::int64_t k = 0; k < width_; k += kPiece) {
    at::native::cpublas::brgemm(tile.rows, tile.columns, std::min(kPiece, width_ - k), kPieceStride,
                                kBlock, tile.stride, k > 0, from + k / kPiece * block.stride(0),
                                packed + k * kBlock, tile.z, true);
  }
  softmax_kernels().transform_tile(tile, bias(tile.first), transform_);
}

void LogitTiles::pack() {
  const std::int64_t n = tokens_.count(), blocks = (n + kBlock - 1) / kBlock;
  packed_ = at::zeros({blocks, width_ / 2, kBlock}, at::kInt);
  const auto* from = static_cast<const char*>(tokens_.hidden.const_data_ptr());
  auto* to = packed_.mutable_data_ptr<std::int32_t>();
  at::parallel_for(0, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      for (std::int64_t j = 0; j < std::min(kBlock, n - b * kBlock); ++j) {
        const char* row = from + (b * kBlock + j) * width_ * 2;
        for (std::int64_t k = 0; k < width_ / 2; ++k) {
          std::memcpy(to + (b * width_ / 2 + k) * kBlock + j, row + 4 * k, 4);
        }
      }
    }
  });
}

ColumnStatistics::ColumnStatistics(const Tokens& tokens, bool extras)
    : tokens_(tokens),
      columns_(tokens.columns()),
      threads_(at::get_num_threads()),
      extras_(extras),
      others_(threads_ * kFields * columns_, 0.0f),
      index_(threads_ * columns_, -1),
      label_z_(columns_, 0.0f) {
  for (int t = 0; t < threads_; ++t) {
    const OthersOfColumns o = of_thread(t);
    std::fill_n(o.reference, columns_, Others().reference);
    if (extras_) std::fill_n(o.top, columns_, Others().top);
  }
}

void ColumnStatistics::fold(const Tile& tile) {
  softmax_kernels().fold_tile(tile, tokens_.labels.data() + tile.column,
                              of_thread(at::get_thread_num(), tile.column),
                              label_z_.data() + tile.column);
}

TokenStatistics ColumnStatistics::finish_token(std::int64_t j, std::int64_t vocabulary) const {
  Others all;
  for (int t = 0; t < threads_; ++t) {
    const OthersOfColumns o = of_thread(t);
    Others one;
    one.reference = o.reference[j];
    one.sum = o.sum[j];
    if (extras_) {
      one.shifted = o.shifted[j];
      one.squares = o.squares[j];
      one.total = o.total[j];
      one.top = o.top[j];
      one.index = o.index[j];
    }
    merge(all, one);
  }
  return finish(all, label_z_[j], tokens_.labels[j], vocabulary);
}

OthersOfColumns ColumnStatistics::of_thread(int t, std::int64_t column) const {
  float* base = const_cast<float*>(others_.data()) + t * kFields * columns_ + column;
  const auto field = [&](int k) { return base + k * columns_; };
  if (!extras_) return {field(0), field(1), nullptr, nullptr, nullptr, nullptr, nullptr};
  return {field(0),
          field(1),
          field(2),
          field(3),
          field(4),
          field(5),
          const_cast<std::int32_t*>(index_.data()) + t * columns_ + column};
}

ColumnCoefficients Columns::coefficients(std::int64_t j) const {
  const auto pointer = [&](const std::vector<float>& x) {
    return x.empty() ? nullptr : x.data() + j;
  };
  return {pointer(a),     pointer(b),          logp.data() + j,
          lse.data() + j, lse_tail.data() + j, pointer(entropy)};
}

GradientTiles::GradientTiles(const Tokens& t, const Columns& c, const Head& head, Storage s)
    : tokens(t),
      columns(c),
      transform(transform_of(head.temperature, head.softcap, head.logit_scale)),
      storage(s),
      scratch(at::get_num_threads() * t.columns()) {}

void GradientTiles::write(const Tile& tile, void* out, std::int64_t out_stride) {
  softmax_kernels().tile_gradient(tile, tokens.labels.data() + tile.column, transform,
                                  columns.coefficients(tile.column), out, out_stride, storage,
                                  scratch.data() + at::get_thread_num() * tokens.columns());
}

}  // namespace drrlhf::cpu
