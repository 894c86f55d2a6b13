// Tiles of logits, and what is read from and written over them. Logits are made transposed, (V,
// tokens): the head's rows are read as they lie, a tile's statistics run down its columns, and the
// matrix product of the next step takes the transpose as it is.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

#include "logprobs.h"
#include "tile_sizes.h"

namespace drrlhf::cpu {

// Some tokens: their places in (...), their rows of hidden, and their labels.
struct Tokens {
  std::vector<std::int64_t> place;
  Tensor hidden;                     // (n, D), contiguous
  std::vector<std::int64_t> labels;  // padded with -1 to whole column blocks

  std::int64_t count() const { return static_cast<std::int64_t>(place.size()); }
  std::int64_t columns() const { return static_cast<std::int64_t>(labels.size()); }
};

// The tokens at `count` places of (...).
Tokens tokens_at(const Tensor& hidden, const Tensor& labels, const std::int64_t* place,
                 std::int64_t count);

// Transposed logits of some tokens, tile by tile.
class LogitTiles {
 public:
  LogitTiles(const Tokens& tokens, const Head& head);

  // f(tile) for the tiles of all tokens and the head's rows [begin, end), in parallel. They are
  // parts of `chunk` (end - begin, stride), or lie in the cache until f returns if null.
  template <class F>
  void each(std::int64_t begin, std::int64_t end, float* chunk, std::int64_t stride,
            const F& f) const {
    if (blocked_) {
      each_blocked(begin, end, chunk, stride, f);
    } else {
      each_multiplied(begin, end, chunk, stride, f);
    }
  }

  // A block of the head's rows as products want their first factor: in pieces of kPiece columns,
  // whose rows lie close together, but not a power of two apart.
  Tensor block(std::int64_t height) const;

  // Copies the head's rows [first, first + rows) to `block`.
  void take(std::int64_t first, std::int64_t rows, Tensor& block) const;

  // Makes z of a tile of kTileTokens tokens at most, from a multiple of these on; `block` holds
  // the head's rows.
  void make(const Tensor& block, const Tile& tile) const;

 private:
  // The layout that the blocked product wants of its second operand: by blocks of kBlock tokens,
  // pairs of neighbouring entries of D together.
  static constexpr std::int64_t kBlock = kTileTokens;
  static constexpr std::int64_t kPiece = 512, kPieceStride = kPiece + 32;

  void pack();

  const float* bias(std::int64_t first) const {
    return bias_.defined() ? bias_.const_data_ptr<float>() + first : nullptr;
  }

  template <class F>
  void each_blocked(std::int64_t begin, std::int64_t end, float* chunk, std::int64_t stride,
                    const F& f) const {
    const std::int64_t columns = tokens_.columns(), height = block_rows(end - begin, width_),
                       blocks = (end - begin + height - 1) / height;
    Tensor buffer;
    if (chunk == nullptr) {
      buffer = at::empty({at::get_num_threads(), height, stride_for(kTileTokens)}, at::kFloat);
    }
    at::parallel_for(0, blocks, 1, [&](std::int64_t from, std::int64_t to) {
      Tensor head = block(height);
      for (std::int64_t i = from; i < to; ++i) {
        const std::int64_t first = begin + i * height, rows = std::min(height, end - first);
        take(first, rows, head);
        for (std::int64_t j = 0; j < columns; j += kTileTokens) {
          float* z = chunk != nullptr ? chunk + (first - begin) * stride + j
                                      : buffer.mutable_data_ptr<float>() +
                                            at::get_thread_num() * height * stride_for(kTileTokens);
          const std::int64_t step = chunk != nullptr ? stride : stride_for(kTileTokens);
          const Tile tile = {{first, rows, j, std::min(kTileTokens, columns - j)}, z, step};
          make(head, tile);
          f(tile);
        }
      }
      at::native::cpublas::brgemm_release();
    });
  }

  template <class F>
  void each_multiplied(std::int64_t begin, std::int64_t end, float* chunk, std::int64_t stride,
                       const F& f) const {
    const std::int64_t columns = tokens_.columns(), n = tokens_.count();
    Tensor buffer;
    if (chunk == nullptr)
      buffer = at::empty({std::min(kWidenedRows, end - begin), stride}, at::kFloat);
    for (std::int64_t start = begin; start < end; start += kWidenedRows) {
      const std::int64_t count = std::min(kWidenedRows, end - start);
      float* block =
          chunk != nullptr ? chunk + (start - begin) * stride : buffer.mutable_data_ptr<float>();
      Tensor product = at::from_blob(block, {count, n}, {stride, 1}, at::kFloat);
      at::mm_out(product, weight_.narrow(0, start, count).to(at::kFloat), hidden_.t());
      const std::int64_t tiles = (count + kTileRows - 1) / kTileRows;
      at::parallel_for(0, tiles, 1, [&](std::int64_t from, std::int64_t to) {
        for (std::int64_t i = from; i < to; ++i) {
          const std::int64_t first = i * kTileRows, rows = std::min(kTileRows, count - first);
          const Tile tile = {{start + first, rows, 0, columns}, block + first * stride, stride};
          for (std::int64_t v = 0; v < rows; ++v) {
            std::fill(tile.z + v * stride + n, tile.z + v * stride + columns, 0.0f);
          }
          softmax_kernels().transform_tile(tile, bias(tile.first), transform_);
          f(tile);
        }
      });
    }
  }

  const Tokens& tokens_;
  Tensor weight_, bias_, hidden_, packed_;
  std::int64_t width_;
  Transform transform_;
  bool blocked_;
};

// Statistics of some tokens, gathered by the threads that see their tiles.
class ColumnStatistics {
 public:
  ColumnStatistics(const Tokens& tokens, bool extras);

  void fold(const Tile& tile);

  TokenStatistics finish_token(std::int64_t j, std::int64_t vocabulary) const;

 private:
  static constexpr int kFields = 6;

  OthersOfColumns of_thread(int t, std::int64_t column = 0) const;

  const Tokens& tokens_;
  std::int64_t columns_;
  int threads_;
  bool extras_;
  std::vector<float> others_;
  std::vector<std::int32_t> index_;
  std::vector<float> label_z_;
};

// What a tile's gradient needs to know of its columns.
struct Columns {
  std::vector<float> a, b, logp, lse, lse_tail, entropy;

  // Columns beyond the last token have probability 0 everywhere: with a logit of their own, a large
  // bias for one, the exponential could overflow, and 0 times that is not 0.
  explicit Columns(std::int64_t columns)
      : logp(columns, 0.0f), lse(columns, FLT_MAX), lse_tail(columns, 0.0f) {}

  // Those of the columns from j on.
  ColumnCoefficients coefficients(std::int64_t j = 0) const;
};

// A transposed gradient (rows, tokens) in the dtype that its products are taken in.
struct GradientTiles {
  const Tokens& tokens;
  const Columns& columns;
  Transform transform;
  Storage storage;
  std::vector<float> scratch;  // per thread

  GradientTiles(const Tokens& tokens, const Columns& columns, const Head& head, Storage storage);

  // Of the tile's tokens.
  void write(const Tile& tile, void* out, std::int64_t out_stride);
};

}  // namespace drrlhf::cpu
