// Logits are made transposed, (V, tokens): the head's rows are read as they lie, a tile's
// statistics run down its columns, and the matrix product of the next step takes the transpose as
// it is.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <numeric>
#include <optional>
#include <vector>

#include "../core/platform.h"
#include "../message.h"
#include "logprobs.h"
#include "memory.h"

namespace drrlhf {
namespace {

// Rows of the head in a tile of logits that no blocked product makes.
constexpr std::int64_t kTileRows = 64;
// Tokens of a tile that a blocked product makes; a tile is worked on while it is in the cache.
constexpr std::int64_t kGroup = 64;
// Tokens whose logits are made together where none are kept.
constexpr std::int64_t kScoredTokens = 1024;
// Rows of the head that are widened to float32 at a time where the dtype has no products here.
constexpr std::int64_t kWidenedRows = 1024;

// Kernels run on plain tensors: no graph is recorded, and autocast must not narrow a product.
struct PlainTensors {
  at::AutoDispatchBelowAutograd below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCPU};
};

// Whether this processor multiplies bfloat16 into float32 by itself, and this torch offers it.
bool multiplies_bfloat16() {
#ifdef DRRLHF_MULTIVERSIONED
  static const bool answer = [] {
    if (softmax_kernels().lanes != 16 || !__builtin_cpu_supports("avx512bf16") ||
        !at::globalContext().userEnabledMkldnn()) {
      return false;
    }
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

// Whether matrix products are taken in this dtype as it is, or in float32.
bool multiplies(at::ScalarType dtype) {
  return dtype == at::kFloat || (dtype == at::kBFloat16 && multiplies_bfloat16());
}

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Entries between the rows of a tile with `columns` columns; rows that are a power of two apart
// would meet in the same few lines of the cache.
std::int64_t stride_for(std::int64_t columns) {
  const std::int64_t stride = round_up(columns, kColumnBlock);
  return stride % 256 == 0 ? stride + kColumnBlock : stride;
}

// Rows of the head (V, D) in a block, a multiple of 32: the block and a copy of it stay in the
// second-level cache while all tokens are multiplied by it, for what is summed up by token comes
// from further away with every block.
std::int64_t block_rows(std::int64_t vocabulary, std::int64_t width) {
  constexpr std::int64_t kBytes = 1 << 21, kMost = 256, kLeast = 64;
  const std::int64_t fit = std::clamp(kBytes / (4 * width) / 32 * 32, kLeast, kMost);
  const std::int64_t even = round_up(vocabulary / (4 * at::get_num_threads()) + 1, 32);
  return std::min(fit, std::max(even, kLeast));
}

// Some tokens: their places in (...), their rows of hidden, and their labels.
struct Tokens {
  std::vector<std::int64_t> place;
  Tensor hidden;                     // (n, D), contiguous
  std::vector<std::int64_t> labels;  // padded with -1 to whole column blocks

  std::int64_t count() const { return static_cast<std::int64_t>(place.size()); }
  std::int64_t columns() const { return static_cast<std::int64_t>(labels.size()); }
};

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

// Transposed logits of some tokens, tile by tile.
class LogitTiles {
 public:
  LogitTiles(const Tokens& tokens, const Head& head)
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

  // f(tile, stride, first, rows, column, columns) for the tiles of z of the head's rows [begin,
  // end) and the tokens from `column` on, in parallel. They are parts of `slab` (end - begin,
  // stride), or lie in the cache until f returns if null.
  template <class F>
  void each(std::int64_t begin, std::int64_t end, float* slab, std::int64_t stride, const F& f) {
    if (blocked_) {
      each_blocked(begin, end, slab, stride, f);
    } else {
      each_multiplied(begin, end, slab, stride, f);
    }
  }

  // A block of the head's rows as products want their first factor: in pieces of kPiece columns,
  // whose rows lie close together, but not a power of two apart.
  Tensor block(std::int64_t height) const {
    // What lies between the rows must not be NaN.
    return at::zeros({(width_ + kPiece - 1) / kPiece, height, kPieceStride}, at::kBFloat16);
  }

  // Copies the head's rows [first, first + rows) to `block`.
  void take(std::int64_t first, std::int64_t rows, Tensor& block) const {
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

  // z of the head's rows [first, first + rows), which `block` holds, and of `columns` tokens,
  // kGroup at most; `column` is a multiple of kGroup.
  void tile(const Tensor& block, std::int64_t first, std::int64_t rows, std::int64_t column,
            std::int64_t columns, float* z, std::int64_t stride) const {
    const auto* from = block.const_data_ptr<at::BFloat16>();
    const auto* packed =
        reinterpret_cast<const at::BFloat16*>(packed_.const_data_ptr()) + column * width_;
    for (std::int64_t k = 0; k < width_; k += kPiece) {
      at::native::cpublas::brgemm(rows, columns, std::min(kPiece, width_ - k), kPieceStride, kBlock,
                                  stride, k > 0, from + k / kPiece * block.stride(0),
                                  packed + k * kBlock, z, true);
    }
    softmax_kernels().transform_tile(z, stride, rows, columns, bias(first), transform_);
  }

 private:
  // The layout that the blocked product wants of its second operand: by blocks of kBlock tokens,
  // pairs of neighbouring entries of D together.
  static constexpr std::int64_t kBlock = kGroup;
  static constexpr std::int64_t kPiece = 512, kPieceStride = kPiece + 32;

  void pack() {
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

  const float* bias(std::int64_t first) const {
    return bias_.defined() ? bias_.const_data_ptr<float>() + first : nullptr;
  }

  template <class F>
  void each_blocked(std::int64_t begin, std::int64_t end, float* slab, std::int64_t stride,
                    const F& f) {
    const std::int64_t columns = tokens_.columns(), height = block_rows(end - begin, width_),
                       blocks = (end - begin + height - 1) / height;
    Tensor buffer;
    if (slab == nullptr) {
      buffer = at::empty({at::get_num_threads(), height, stride_for(kGroup)}, at::kFloat);
    }
    at::parallel_for(0, blocks, 1, [&](std::int64_t from, std::int64_t to) {
      Tensor head = block(height);
      for (std::int64_t i = from; i < to; ++i) {
        const std::int64_t first = begin + i * height, rows = std::min(height, end - first);
        take(first, rows, head);
        for (std::int64_t j = 0; j < columns; j += kGroup) {
          float* z = slab != nullptr ? slab + (first - begin) * stride + j
                                     : buffer.mutable_data_ptr<float>() +
                                           at::get_thread_num() * height * stride_for(kGroup);
          const std::int64_t step = slab != nullptr ? stride : stride_for(kGroup);
          const std::int64_t count = std::min(kGroup, columns - j);
          tile(head, first, rows, j, count, z, step);
          f(z, step, first, rows, j, count);
        }
      }
      at::native::cpublas::brgemm_release();
    });
  }

  template <class F>
  void each_multiplied(std::int64_t begin, std::int64_t end, float* slab, std::int64_t stride,
                       const F& f) {
    const std::int64_t columns = tokens_.columns(), n = tokens_.count();
    Tensor buffer;
    if (slab == nullptr)
      buffer = at::empty({std::min(kWidenedRows, end - begin), stride}, at::kFloat);
    for (std::int64_t start = begin; start < end; start += kWidenedRows) {
      const std::int64_t count = std::min(kWidenedRows, end - start);
      float* block =
          slab != nullptr ? slab + (start - begin) * stride : buffer.mutable_data_ptr<float>();
      Tensor product = at::from_blob(block, {count, n}, {stride, 1}, at::kFloat);
      at::mm_out(product, weight_.narrow(0, start, count).to(at::kFloat), hidden_.t());
      const std::int64_t tiles = (count + kTileRows - 1) / kTileRows;
      at::parallel_for(0, tiles, 1, [&](std::int64_t from, std::int64_t to) {
        for (std::int64_t i = from; i < to; ++i) {
          const std::int64_t rows = std::min(kTileRows, count - i * kTileRows);
          float* tile = block + i * kTileRows * stride;
          for (std::int64_t v = 0; v < rows; ++v) {
            std::fill(tile + v * stride + n, tile + v * stride + columns, 0.0f);
          }
          const std::int64_t first = start + i * kTileRows;
          softmax_kernels().transform_tile(tile, stride, rows, columns, bias(first), transform_);
          f(tile, stride, first, rows, 0, columns);
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
  ColumnStatistics(const Tokens& tokens, bool extras)
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

  // Folds a tile of z of the tokens from `column` on.
  void fold(float* tile, std::int64_t stride, std::int64_t first, std::int64_t rows,
            std::int64_t column, std::int64_t columns) {
    softmax_kernels().fold_tile(tile, stride, rows, columns, first, tokens_.labels.data() + column,
                                of_thread(at::get_thread_num(), column), label_z_.data() + column);
  }

  TokenStatistics finish_token(std::int64_t j, std::int64_t vocabulary) const {
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

 private:
  static constexpr int kFields = 6;

  OthersOfColumns of_thread(int t, std::int64_t column = 0) const {
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
  ColumnCoefficients coefficients(std::int64_t j = 0) const {
    const auto pointer = [&](const std::vector<float>& x) {
      return x.empty() ? nullptr : x.data() + j;
    };
    return {pointer(a),     pointer(b),          logp.data() + j,
            lse.data() + j, lse_tail.data() + j, pointer(entropy)};
  }
};

// A transposed gradient (rows, tokens) in the dtype that its products are taken in.
struct GradientTiles {
  const Tokens& tokens;
  const Columns& columns;
  Transform transform;
  Storage storage;
  std::vector<float> scratch;  // per thread

  GradientTiles(const Tokens& t, const Columns& c, const Head& head, Storage s)
      : tokens(t),
        columns(c),
        transform(transform_of(head.temperature, head.softcap, head.logit_scale)),
        storage(s),
        scratch(at::get_num_threads() * t.columns()) {}

  // Of the tile's tokens, which are those from `column` on.
  void write(const float* tile, std::int64_t stride, std::int64_t first, std::int64_t rows,
             std::int64_t column, std::int64_t count, void* out, std::int64_t out_stride) {
    softmax_kernels().tile_gradient(tile, stride, rows, count, first, tokens.labels.data() + column,
                                    transform, columns.coefficients(column), out, out_stride,
                                    storage,
                                    scratch.data() + at::get_thread_num() * tokens.columns());
  }
};

// bfloat16 rows (count, width) as the blocked product wants its second operand: by blocks of
// kProductBlock columns, neighbouring rows interleaved; an odd last row is paired with zeros.
constexpr std::int64_t kProductBlock = 64;

DRRLHF_MULTIVERSION void interleave(const std::uint16_t* one, const std::uint16_t* two,
                                    std::int64_t n, std::uint32_t* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = one[i] | std::uint32_t(two[i]) << 16;
}

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

// c (rows, width) (+)= a (rows, depth) b, b packed as above with `depth` rows, which is even.
void multiply_packed(const at::BFloat16* a, std::int64_t stride, std::int64_t rows,
                     std::int64_t depth, const at::BFloat16* b, std::int64_t width, float* c,
                     std::int64_t c_stride, bool add) {
  for (std::int64_t d = 0; d < width; d += kProductBlock) {
    const std::int64_t block = std::min(kProductBlock, width - d);
    at::native::cpublas::brgemm(rows, block, depth, stride, block, c_stride, add, a, b + d * depth,
                                c + d, true);
  }
}

DRRLHF_MULTIVERSION float dot(const std::uint16_t* a, const std::uint16_t* b, std::int64_t n) {
  constexpr int kLanes = 16;
  const auto wide = [](std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
  };
  float sums[kLanes] = {};
  for (std::int64_t i = 0; i < n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) sums[k] += wide(a[i + k]) * wide(b[i + k]);
  }
  float sum = 0;
  for (const float x : sums) sum += x;
  return sum;
}

DRRLHF_MULTIVERSION void scaled(const float* x, std::int64_t n, float factor, float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = factor * x[i];
}

DRRLHF_MULTIVERSION void add_scaled(const float* x, std::int64_t n, float factor, float* out) {
  for (std::int64_t i = 0; i < n; ++i) out[i] += factor * x[i];
}

DRRLHF_MULTIVERSION void add_scaled_row(const std::uint16_t* x, std::int64_t n, float factor,
                                        float* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t bits = std::uint32_t(x[i]) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    out[i] += factor * y;
  }
}

const std::uint16_t* words_of(const Tensor& x) {
  return reinterpret_cast<const std::uint16_t*>(x.const_data_ptr<at::BFloat16>());
}

bool multiplies_packed(const Tensor& weight) {
  return weight.scalar_type() == at::kBFloat16 && multiplies_bfloat16() &&
         weight.size(1) % kColumnBlock == 0 && weight.stride(1) == 1;
}

// Sums by token (tokens, D) of factors times the head's rows: sums = P head for P (tokens, V) that
// is made piece by piece. The head is taken block by block, each block packed once, and every
// thread multiplies what it makes of a block while that is in its cache.
class HeadSums {
 public:
  // `workspace` bounds the threads' sums: with many threads, several share the sums of a part of
  // the vocabulary and take a chunk of the tokens each.
  HeadSums(const Tensor& weight, std::int64_t tokens, std::int64_t workspace)
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
    chunk_ = round_up((tokens + threads / parts_ - 1) / (threads / parts_), kGroup);
    chunks_ = (tokens + chunk_ - 1) / chunk_;
    sums_ = empty_on_huge_pages({parts_, tokens, stride_}, at::kFloat);
  }

  // Tokens whose sums fit in the workspace, all at best.
  static std::int64_t tokens_at_once(const Tensor& weight, std::int64_t tokens,
                                     std::int64_t workspace) {
    const std::int64_t bytes = stride_for(weight.size(1)) * std::int64_t(sizeof(float));
    const std::int64_t threads = at::get_num_threads();
    const std::int64_t fit = std::max(kGroup, workspace / (bytes * threads) / kGroup * kGroup);
    // Threads beyond those whose sums fit share: more tokens at a time are worth more.
    const std::int64_t shared = std::min<std::int64_t>(workspace / bytes, 1024) / kGroup * kGroup;
    const std::int64_t most = std::max(fit, shared);
    const std::int64_t passes = (tokens + most - 1) / most;
    return std::min(most, round_up((tokens + passes - 1) / passes, kGroup));
  }

  std::int64_t height() const { return height_; }

  // For each block of the head's rows [first, first + rows): begin_block(first, rows), then
  // f(first, rows, column, count, out, stride) writes the factors of the head's rows [first, first
  // + rows) and of `count` tokens, kGroup at most, from `column` on: out (count, rows), with 0
  // behind the rows up to a multiple of 32.
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
            for (std::int64_t k = 0; k < count; k += kGroup) {
              f(first, rows, j + k, std::min(kGroup, count - k),
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
  void read(std::int64_t j, float factor, float* out) const {
    const float* from = sums_.const_data_ptr<float>() + j * stride_;
    scaled(from, width_, factor, out);
    for (std::int64_t part = 1; part < parts_; ++part) {
      add_scaled(from + part * tokens_ * stride_, width_, factor, out);
    }
  }

 private:
  static constexpr std::int64_t kTokens = 2 * kGroup;  // multiplied at a time

  Tensor weight_, sums_;
  std::int64_t vocabulary_, width_, tokens_, stride_, height_, blocks_, parts_, chunk_, chunks_;
};

// Whether a kept slab's column is divided by -p[label] scale / temperature: what the reference says
// of it (drrlhf/reference.py). Of less probable labels ratios, and sums of them, might overflow.
bool divides_by_label(at::ScalarType dtype, float logp) {
  constexpr float kImprobable = -31.0f;
  return dtype == at::kBFloat16 && logp >= kImprobable;
}

// By what such a column was divided.
float divisor(const Transform& t, float logp) {
  return -std::exp(logp) * (t.scale * t.inverse_temperature);
}

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

  // Turns a tile of z of the tokens from `column` on into `out`, as SoftmaxKernels::tile_ratios.
  void turn(float* z, std::int64_t stride, std::int64_t first, std::int64_t rows,
            std::int64_t column, std::int64_t columns, std::uint16_t* out, std::int64_t out_stride,
            bool transposed) {
    if (statistics_.has_value()) statistics_->fold(z, stride, first, rows, column, columns);
    const std::int64_t tokens = std::min(columns, tokens_.count() - column);
    softmax_kernels().tile_ratios(
        z, stride, rows, columns, tokens, first, tokens_.labels.data() + column, transform_,
        reference_.data() + column, sum_.data() + at::get_thread_num() * tokens_.columns() + column,
        label_z_.data() + column, label_slope_.data() + column, out, out_stride, transposed);
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
    softmax_kernels().transform_tile(reference_.data(), tokens_.columns(), 1, tokens_.columns(),
                                     nullptr, transform_);
    for (float& z : reference_) z = std::isfinite(z) ? z : 0.0f;
  }

  const Tokens& tokens_;
  Tensor weight_;
  Transform transform_;
  int threads_;
  std::vector<float> reference_, sum_, label_z_, label_slope_;
  std::optional<ColumnStatistics> statistics_;
};

// d weight (rows, D) = gradient (rows, tokens) hidden, block by block.
class WeightGradient {
 public:
  // Tokens that are multiplied at a time where the gradient is made for this.
  static constexpr std::int64_t kDepth = 512;

  WeightGradient(const Tensor& hidden, std::int64_t height)
      : depth_(round_up(hidden.size(0), 2)),
        width_(hidden.size(1)),
        height_(height),
        packed_(at::empty({depth_ * width_}, at::kBFloat16)),
        sums_(at::empty({at::get_num_threads(), height, stride_for(width_)}, at::kFloat)) {
    pack_pairs(hidden.const_data_ptr<at::BFloat16>(), hidden.stride(0), hidden.size(0), width_,
               packed_.mutable_data_ptr<at::BFloat16>());
  }

  // Adds the products of the tokens [token, token + count), which come in order, all but the last
  // count even, to the sums of `rows` rows. gradient (rows, count rounded up to a multiple of 2):
  // an entry beyond the last token counts for nothing, but must be finite.
  void add(const at::BFloat16* gradient, std::int64_t stride, std::int64_t rows, std::int64_t token,
           std::int64_t count) {
    const std::int64_t depth = round_up(count, 2);
    const auto* packed = packed_.const_data_ptr<at::BFloat16>();
    for (std::int64_t d = 0; d < width_; d += kProductBlock) {
      const std::int64_t block = std::min(kProductBlock, width_ - d);
      at::native::cpublas::brgemm(rows, block, depth, stride, block, stride_for(width_), token > 0,
                                  gradient, packed + d * depth_ + token * block, sums() + d, true);
    }
  }

  // Rounds the sums.
  void write(std::int64_t rows, Tensor& d_weight, std::int64_t first) {
    at::BFloat16* out = d_weight.mutable_data_ptr<at::BFloat16>() + first * width_;
    for (std::int64_t v = 0; v < rows; ++v) {
      softmax_kernels().narrow_row(sums() + v * stride_for(width_), out + v * width_,
                                   Storage::kBFloat16, width_);
    }
  }

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
                      std::int64_t workspace) {
  if (multiplies_packed(weight)) {
    const std::int64_t n = gradient.size(1), step = gradient.stride(0), width = weight.size(1);
    const std::int64_t pass = HeadSums::tokens_at_once(weight, n, workspace);
    for (std::int64_t start = 0; start < n; start += pass) {
      const std::int64_t count = std::min(pass, n - start);
      const std::uint16_t* from = words_of(gradient) + start;
      HeadSums sums(weight, count, workspace);
      sums.each([](std::int64_t, std::int64_t) {},
                [&](std::int64_t first, std::int64_t rows, std::int64_t j, std::int64_t columns,
                    std::uint16_t* out, std::int64_t stride) {
                  softmax_kernels().transpose(from + first * step + j, step, rows, columns, out,
                                              stride);
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

// result (rows, D) = gradient hidden, for a transposed gradient (rows, tokens).
void multiply_by_hidden(const Tensor& gradient, const Tensor& hidden, Tensor result) {
  if (multiplies(hidden.scalar_type())) {
    at::mm_out(result, gradient, hidden);
  } else {
    result.copy_(at::mm(gradient.to(at::kFloat), hidden.to(at::kFloat)));
  }
}

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

at::ScalarType product_dtype(at::ScalarType dtype) {
  return multiplies(dtype) ? dtype : at::kFloat;
}

// As many tokens as have their logits, of `size` bytes each, in the workspace at a time; at least
// one block.
std::int64_t tokens_per_pass(std::int64_t tokens, std::int64_t vocabulary, std::int64_t workspace,
                             std::int64_t size) {
  const std::int64_t fit = workspace / (vocabulary * size) - kColumnBlock;  // the stride's skew
  const std::int64_t most = std::max(kColumnBlock, fit >= 64 ? fit / 64 * 64 : fit / 16 * 16);
  const std::int64_t passes = std::max<std::int64_t>(1, (tokens + most - 1) / most);
  return std::min(most, round_up((tokens + passes - 1) / passes, most >= 64 ? 64 : kColumnBlock));
}

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
  DRRLHF_CHECK_VALUE(keep == Keep::kNothing || keep == Keep::kHidden || keep == Keep::kSlab,
                     "keep: expected 0, 1 or 2, got ", static_cast<std::int64_t>(keep));
}

// Copies the columns `place` of a packed slab (V, counted), or all of them if null, to rows of
// `out_stride` entries: those of [begin, end) of the vocabulary.
void gather_columns(const Tensor& slab, std::int64_t begin, std::int64_t end,
                    const std::vector<std::int64_t>& place, void* out, std::int64_t out_stride) {
  const auto copy = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const T* from = static_cast<const T*>(slab.const_data_ptr());
    const std::int64_t stride = slab.stride(0);
    at::parallel_for(begin, end, 64, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t v = first; v < last; ++v) {
        const T* row = from + v * stride;
        T* target = to + (v - begin) * out_stride;
        for (std::size_t j = 0; j < place.size(); ++j) target[j] = row[place[j]];
      }
    });
  };
  if (slab.element_size() == 4) {
    copy(static_cast<std::uint32_t*>(out));
  } else {
    copy(static_cast<std::uint16_t*>(out));
  }
}

// Room for transposed gradients (rows, tokens), 0 behind the last token. Products that read whole
// registers multiply what lies there by 0, oneDNN's on AMX for one; 0 times NaN would be NaN.
Tensor gradient_room(std::int64_t rows, std::int64_t tokens, at::ScalarType dtype) {
  const std::int64_t stride = stride_for(tokens);
  Tensor room = empty_on_huge_pages({rows, stride}, dtype);
  room.narrow(1, tokens, stride - tokens).zero_();
  return room;
}

// The slab (V, counted) at the front of what the forward kept.
Tensor packed_slab(const Tensor& kept, std::int64_t vocabulary, std::int64_t counted) {
  return kept.view(-1).narrow(0, 0, vocabulary * counted).view({vocabulary, counted});
}

// d weight (V, D), and d bias (V,) if not null, from gradients of blocks of the head's rows that
// are multiplied by `hidden` (tokens, D) while they are in the cache: begin(first, rows) starts a
// block, f(first, rows, token, count, out, stride) writes `count` tokens' gradients out (rows,
// count), and finite numbers behind them up to a multiple of kColumnBlock. `factor` (tokens,) as in
// sum_tokens.
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
    Tensor gradient = gradient_room(height, round_up(std::min(kDepth, n), 32), at::kBFloat16);
    const std::int64_t stride = gradient.stride(0);
    auto* g = gradient.mutable_data_ptr<at::BFloat16>();
    std::vector<double> bias(height);
    for (std::int64_t i = from; i < to; ++i) {
      const std::int64_t first = i * height, rows = std::min(height, vocabulary - first);
      begin_block(first, rows);
      std::fill(bias.begin(), bias.end(), 0.0);
      for (std::int64_t token = 0; token < n; token += kDepth) {
        const std::int64_t count = std::min(kDepth, n - token);
        f(first, rows, token, count, g, stride);
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

// The same from the logits, made anew.
void weight_gradient_of_logits(const Tokens& tokens, const Head& head, GradientTiles& tiles,
                               Tensor& d_weight, Tensor* d_bias) {
  const std::int64_t height = block_rows(head.weight.size(0), head.weight.size(1));
  const std::int64_t stride = stride_for(kGroup);
  const LogitTiles logits(tokens, head);
  Tensor z = at::empty({at::get_num_threads(), height, stride}, at::kFloat);
  std::vector<Tensor> blocks;
  for (int t = 0; t < at::get_num_threads(); ++t) blocks.push_back(logits.block(height));
  weight_gradient(
      tokens.hidden, {}, d_weight, d_bias,
      [&](std::int64_t first, std::int64_t rows) {
        logits.take(first, rows, blocks[at::get_thread_num()]);
      },
      [&](std::int64_t first, std::int64_t rows, std::int64_t token, std::int64_t count,
          at::BFloat16* out, std::int64_t out_stride) {
        const int t = at::get_thread_num();
        float* tile = z.mutable_data_ptr<float>() + t * height * stride;
        for (std::int64_t j = 0; j < count; j += kGroup) {
          const std::int64_t columns = round_up(std::min(kGroup, count - j), kColumnBlock);
          logits.tile(blocks[t], first, rows, token + j, columns, tile, stride);
          tiles.write(tile, stride, first, rows, token + j, columns, out + j, out_stride);
        }
      });
}

// The same from a packed slab (V, counted) and its columns `place`, all if `whole`; `hidden` has
// the tokens' coefficients in it.
void weight_gradient_of_slab(const Tensor& slab, const std::vector<std::int64_t>& place, bool whole,
                             const Tensor& hidden, const std::vector<float>& factor,
                             Tensor& d_weight, Tensor* d_bias) {
  const std::uint16_t* from = words_of(slab);
  const std::int64_t step = slab.stride(0);
  weight_gradient(
      hidden, factor, d_weight, d_bias, [](std::int64_t, std::int64_t) {},
      [&](std::int64_t first, std::int64_t rows, std::int64_t token, std::int64_t count,
          at::BFloat16* out, std::int64_t stride) {
        for (std::int64_t v = 0; v < rows; ++v) {
          const std::uint16_t* row = from + (first + v) * step;
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

// Log-probs and what is kept of the tokens at `counted` places, by Ratios. Returns which of them
// are left to be done in another way.
std::vector<std::int64_t> pass_by_ratios(const Tensor& hidden, const Head& head,
                                         const Tensor& labels,
                                         const std::vector<std::int64_t>& counted, Keep keep,
                                         std::int64_t workspace, Tensor& kept,
                                         TokenOutputs& result) {
  const std::int64_t vocabulary = head.weight.size(0), width = head.weight.size(1);
  const auto n = static_cast<std::int64_t>(counted.size());
  std::vector<std::int64_t> left;
  if (n == 0) return left;
  auto* to = kept.mutable_data_ptr<at::BFloat16>();
  const std::int64_t room = workspace / 4 * 3;
  const std::int64_t pass =
      keep == Keep::kSlab ? n : HeadSums::tokens_at_once(head.weight, n, room);
  for (std::int64_t start = 0; start < n; start += pass) {
    const std::int64_t count = std::min(pass, n - start);
    const Tokens tokens = tokens_at(hidden, labels, counted.data() + start, count);
    Ratios ratios(tokens, head, result.extras());
    LogitTiles logits(tokens, head);
    std::optional<HeadSums> sums;
    if (keep == Keep::kSlab) {
      auto* slab = reinterpret_cast<std::uint16_t*>(to);
      logits.each(0, vocabulary, nullptr, 0,
                  [&](float* z, std::int64_t stride, std::int64_t first, std::int64_t rows,
                      std::int64_t column, std::int64_t columns) {
                    ratios.turn(z, stride, first, rows, column, columns, slab + first * n + column,
                                n, false);
                  });
    } else {
      sums.emplace(head.weight, count, room);
      const std::int64_t stride = stride_for(kGroup), size = sums->height() * stride;
      Tensor tiles = at::empty({at::get_num_threads(), size}, at::kFloat);
      std::vector<Tensor> blocks;
      for (int t = 0; t < at::get_num_threads(); ++t)
        blocks.push_back(logits.block(sums->height()));
      const auto take = [&](std::int64_t first, std::int64_t rows) {
        logits.take(first, rows, blocks[at::get_thread_num()]);
      };
      sums->each(take, [&](std::int64_t first, std::int64_t rows, std::int64_t column,
                           std::int64_t columns, std::uint16_t* out, std::int64_t out_stride) {
        float* z = tiles.mutable_data_ptr<float>() + at::get_thread_num() * size;
        columns = round_up(columns, kColumnBlock);
        logits.tile(blocks[at::get_thread_num()], first, rows, column, columns, z, stride);
        ratios.turn(z, stride, first, rows, column, columns, out, out_stride, true);
      });
    }
    std::vector<TokenStatistics> statistics(count);
    for (std::int64_t j = 0; j < count; ++j) {
      statistics[j] = ratios.finish_token(j);
      if (!divides_by_label(at::kBFloat16, statistics[j].logp)) {
        left.push_back(start + j);
        continue;
      }
      result.set(tokens.place[j], statistics[j]);
      if (keep == Keep::kSlab) to[tokens.labels[j] * n + j] = ratios.label_entry(j);
    }
    if (keep == Keep::kSlab) continue;
    write_rows(count, width, [&](std::int64_t j, float* row) -> at::BFloat16* {
      if (!divides_by_label(at::kBFloat16, statistics[j].logp)) return nullptr;
      ratios.gradient(j, statistics[j], *sums, row);
      return to + tokens.place[j] * width;
    });
  }
  return left;
}

}  // namespace

EightTensors linear_token_logprobs_cpu(const Tensor& hidden, const Head& head, const Tensor& labels,
                                       std::int64_t outputs, Keep keep, std::int64_t workspace) {
  const PlainTensors plain;
  check_head(hidden, head, labels);
  const Storage storage = storage_of("hidden", hidden);
  const auto dtype = hidden.scalar_type();
  const std::int64_t vocabulary = head.weight.size(0), width = head.weight.size(1);
  const auto shape = hidden.sizes().slice(0, hidden.dim() - 1);
  const Tensor y = checked_labels(labels, shape, vocabulary, head.ignore_index);
  std::vector<std::int64_t> counted;
  for (std::int64_t i = 0; i < y.numel(); ++i) {
    if (y.const_data_ptr<std::int64_t>()[i] != head.ignore_index) counted.push_back(i);
  }
  const auto n = static_cast<std::int64_t>(counted.size());
  check_keep(keep);
  TokenOutputs result(shape, outputs);
  Tensor kept = at::empty({0}, dtype);
  if (keep == Keep::kHidden) {
    kept = n == y.numel() ? empty_on_huge_pages(hidden.sizes(), dtype)
                          : at::zeros(hidden.sizes(), dtype);
  } else if (keep == Keep::kSlab) {
    kept = empty_on_huge_pages({vocabulary, y.numel()}, dtype);
    kept.view(-1).narrow(0, vocabulary * n, vocabulary * (y.numel() - n)).zero_();
  }
  const bool scored = keep == Keep::kNothing;
  std::vector<std::int64_t> column(n);  // in a packed slab, of what is left to do
  std::iota(column.begin(), column.end(), 0);
  if (!scored && multiplies_packed(head.weight)) {
    column = pass_by_ratios(hidden, head, y, counted, keep, workspace, kept, result);
    for (std::size_t j = 0; j < column.size(); ++j) counted[j] = counted[column[j]];
    counted.resize(column.size());
  }
  const auto left = static_cast<std::int64_t>(counted.size());
  const std::int64_t pass =
      scored ? kScoredTokens : tokens_per_pass(left, vocabulary, workspace, sizeof(float));
  const auto product = product_dtype(dtype);
  const Transform transform = transform_of(head.temperature, head.softcap, head.logit_scale);
  Tensor slab;
  if (!scored && left > 0) {
    slab = empty_on_huge_pages({vocabulary, stride_for(std::min(left, pass))}, at::kFloat);
  }
  for (std::int64_t start = 0; start < left; start += pass) {
    const std::int64_t count = std::min(pass, left - start);
    const Tokens tokens = tokens_at(hidden, y, counted.data() + start, count);
    const std::int64_t stride = stride_for(count);
    LogitTiles logits(tokens, head);
    ColumnStatistics statistics(tokens, result.extras());
    float* z = scored ? nullptr : slab.mutable_data_ptr<float>();
    logits.each(0, vocabulary, z, stride,
                [&](float* tile, std::int64_t tile_stride, std::int64_t first, std::int64_t rows,
                    std::int64_t column, std::int64_t columns) {
                  statistics.fold(tile, tile_stride, first, rows, column, columns);
                });
    Columns columns(tokens.columns());
    for (std::int64_t j = 0; j < count; ++j) {
      const TokenStatistics s = statistics.finish_token(j, vocabulary);
      result.set(tokens.place[j], s);
      columns.logp[j] = s.logp;
      columns.lse[j] = s.lse;
      columns.lse_tail[j] = s.lse_tail;
    }
    if (scored) continue;
    const auto entries = [&](const std::int64_t* x) {
      return at::from_blob(const_cast<std::int64_t*>(x), {count}, at::dtype(at::kLong));
    };
    if (keep == Keep::kSlab && dtype == at::kBFloat16) {
      columns.a.assign(tokens.columns(), 1.0f);
      for (std::int64_t j = 0; j < count; ++j) {
        if (divides_by_label(dtype, columns.logp[j])) {
          columns.a[j] = 1 / divisor(transform, columns.logp[j]);
        }
      }
    }
    // The gradient by the logits takes their place, row by row: at the front of each row, or in the
    // slab that is kept if whole column blocks fit there.
    const bool direct = keep == Keep::kSlab && left == n && count % kColumnBlock == 0;
    const Storage written = direct ? storage : storage_of("hidden", at::empty({0}, product));
    const std::int64_t size = direct ? hidden.element_size() : at::elementSize(product);
    char* base = static_cast<char*>(direct ? kept.mutable_data_ptr() : slab.mutable_data_ptr());
    const std::int64_t out_stride = direct ? n : stride * std::int64_t(sizeof(float)) / size;
    if (direct) base += start * size;
    GradientTiles gradient(tokens, columns, head, written);
    const std::int64_t tiles = (vocabulary + kTileRows - 1) / kTileRows;
    at::parallel_for(0, tiles, 1, [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t i = from; i < to; ++i) {
        const std::int64_t first = i * kTileRows, rows = std::min(kTileRows, vocabulary - first);
        gradient.write(z + first * stride, stride, first, rows, 0, tokens.columns(),
                       base + first * out_stride * size, out_stride);
      }
    });
    if (direct) continue;
    const Tensor transposed =
        at::from_blob(base, {vocabulary, count}, {out_stride, 1}, at::dtype(product));
    if (keep == Keep::kSlab) {
      const Tensor packed = packed_slab(kept, vocabulary, n);
      if (left == n) {
        packed.narrow(1, start, count).copy_(transposed);
      } else {
        packed.index_copy_(1, entries(column.data() + start), transposed.to(dtype));
      }
    } else if (left == y.numel()) {
      multiply_by_head(transposed, head.weight, kept.view({-1, width}).narrow(0, start, count),
                       workspace);
    } else {
      Tensor rows = at::empty({count, width}, dtype);
      multiply_by_head(transposed, head.weight, rows, workspace);
      kept.view({-1, width}).index_copy_(0, entries(tokens.place.data()), rows);
    }
  }
  return std::tuple_cat(result.tensors(), std::make_tuple(kept));
}

std::tuple<Tensor, Tensor, Tensor> linear_token_logprobs_backward_cpu(
    const Tensor& hidden, const Head& head, const Tensor& labels, const OptionalTensor& grad,
    const OptionalTensor& grad_entropy, const Tensor& logp, const Tensor& lse,
    const Tensor& lse_tail, const Tensor& entropy, const Tensor& kept, Keep keep,
    std::int64_t workspace, bool need_hidden, bool need_weight, bool need_bias) {
  const PlainTensors plain;
  check_head(hidden, head, labels);
  const Storage storage = storage_of("hidden", hidden);
  const auto dtype = hidden.scalar_type(), product = product_dtype(dtype);
  const std::int64_t vocabulary = head.weight.size(0), width = head.weight.size(1);
  const auto shape = hidden.sizes().slice(0, hidden.dim() - 1);
  const Tensor y = checked_labels(labels, shape, vocabulary, head.ignore_index);
  const std::int64_t total = y.numel();
  check_keep(keep);
  const std::int64_t expected = keep == Keep::kHidden ? total * width
                                : keep == Keep::kSlab ? total * vocabulary
                                                      : 0;
  DRRLHF_CHECK_VALUE(
      keep == Keep::kNothing || (kept.scalar_type() == dtype && kept.is_contiguous() &&
                                 kept.device().is_cpu() && kept.numel() == expected),
      "kept: expected what the forward kept, got ", kept.sizes(), " of ", kept.scalar_type());
  const auto optional = [&](const char* name, const OptionalTensor& g) {
    return g.has_value() ? per_token(name, *g, total) : Tensor();
  };
  const Tensor a = optional("grad", grad), b = optional("grad_entropy", grad_entropy);
  const Tensor lp = per_token("logp", logp, total), high = per_token("lse", lse, total);
  const Tensor tail = per_token("lse_tail", lse_tail, total);
  const Tensor h = b.defined() ? per_token("entropy", entropy, total) : Tensor();
  const auto at_place = [](const Tensor& x, std::int64_t i) {
    return x.defined() ? x.const_data_ptr<float>()[i] : 0.0f;
  };
  const Transform transform = transform_of(head.temperature, head.softcap, head.logit_scale);
  // The coefficient of token i's column of the slab.
  const auto slab_coefficient = [&](std::int64_t i) {
    const float logp = at_place(lp, i);
    return at_place(a, i) * (divides_by_label(dtype, logp) ? divisor(transform, logp) : 1.0f);
  };

  // Only tokens with an upstream gradient take part from here on.
  std::vector<std::int64_t> active, column;  // places, and columns of a packed slab
  std::int64_t counted = 0;
  for (std::int64_t i = 0; i < total; ++i) {
    if (y.const_data_ptr<std::int64_t>()[i] == head.ignore_index) continue;
    if (at_place(a, i) != 0 || at_place(b, i) != 0) {
      active.push_back(i);
      column.push_back(counted);
    }
    ++counted;
  }
  const auto n = static_cast<std::int64_t>(active.size());
  const bool whole = n == counted;
  const bool has_slab = keep == Keep::kSlab && !b.defined();
  const Tensor slab = has_slab ? packed_slab(kept, vocabulary, counted) : Tensor();

  const auto columns_of = [&](const Tokens& tokens) {
    Columns c(tokens.columns());
    c.a.assign(tokens.columns(), 0.0f);
    if (b.defined()) {
      c.b.assign(tokens.columns(), 0.0f);
      c.entropy.assign(tokens.columns(), 0.0f);
    }
    for (std::int64_t j = 0; j < tokens.count(); ++j) {
      const std::int64_t i = tokens.place[j];
      c.a[j] = at_place(a, i);
      c.logp[j] = at_place(lp, i);
      c.lse[j] = at_place(high, i);
      c.lse_tail[j] = at_place(tail, i);
      if (b.defined()) {
        c.b[j] = at_place(b, i);
        c.entropy[j] = at_place(h, i);
      }
    }
    return c;
  };
  // The transposed gradient of tokens by the logits [begin, end), made anew, coefficients included.
  const auto recompute = [&](const Tokens& tokens, LogitTiles& logits, GradientTiles& gradient,
                             std::int64_t begin, std::int64_t end, Tensor out) {
    const std::int64_t out_stride = out.stride(0), size = out.element_size();
    char* to = static_cast<char*>(out.mutable_data_ptr());
    logits.each(begin, end, nullptr, stride_for(tokens.count()),
                [&](float* tile, std::int64_t stride, std::int64_t first, std::int64_t rows,
                    std::int64_t column, std::int64_t count) {
                  gradient.write(tile, stride, first, rows, column, count,
                                 to + ((first - begin) * out_stride + column) * size, out_stride);
                });
    return out.narrow(0, 0, end - begin).narrow(1, 0, tokens.count());
  };
  const auto scale_to = [&](const Tensor& rows, std::int64_t row, Tensor to, std::int64_t place,
                            float factor) {
    const std::int64_t bytes = width * to.element_size();
    softmax_kernels().scale_row(static_cast<const char*>(rows.const_data_ptr()) + row * bytes,
                                static_cast<char*>(to.mutable_data_ptr()) + place * bytes, storage,
                                width, factor);
  };

  Tensor d_hidden = at::empty({0}, dtype);
  if (need_hidden && keep == Keep::kHidden && !b.defined()) {
    d_hidden = empty_on_huge_pages(hidden.sizes(), dtype);
    std::vector<float> factor(total, 0.0f);
    for (const std::int64_t i : active) factor[i] = at_place(a, i);
    at::parallel_for(0, total, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        if (factor[i] == 0) {
          const std::int64_t bytes = width * d_hidden.element_size();
          std::memset(static_cast<char*>(d_hidden.mutable_data_ptr()) + i * bytes, 0, bytes);
        } else {
          scale_to(kept, i, d_hidden, i, factor[i]);
        }
      }
    });
  } else if (need_hidden) {
    d_hidden =
        n == total ? empty_on_huge_pages(hidden.sizes(), dtype) : at::zeros(hidden.sizes(), dtype);
    const bool in_one = has_slab && whole;
    const auto made = has_slab ? dtype : product;
    const std::int64_t pass =
        in_one ? std::max<std::int64_t>(1, n)
               : tokens_per_pass(n, vocabulary, workspace, at::elementSize(made));
    Tensor buffer;
    if (!in_one && n > 0) {
      buffer = gradient_room(vocabulary, std::min(n, pass), made);
    }
    for (std::int64_t start = 0; start < n; start += pass) {
      const std::int64_t count = std::min(pass, n - start);
      Tensor gradient = slab;
      if (has_slab && !whole) {
        const std::vector<std::int64_t> place(column.begin() + start,
                                              column.begin() + start + count);
        gather_columns(slab, 0, vocabulary, place, buffer.mutable_data_ptr(), buffer.stride(0));
        gradient = buffer.narrow(1, 0, count);
      } else if (!has_slab) {
        const Tokens tokens = tokens_at(hidden, y, active.data() + start, count);
        const Columns columns = columns_of(tokens);
        LogitTiles logits(tokens, head);
        GradientTiles tiles(tokens, columns, head, storage_of("hidden", at::empty({0}, made)));
        gradient = recompute(tokens, logits, tiles, 0, vocabulary, buffer);
      }
      Tensor rows = at::empty({count, width}, dtype);
      multiply_by_head(gradient, head.weight, rows, workspace / 4 * 3);
      for (std::int64_t j = 0; j < count; ++j) {
        const std::int64_t i = active[start + j];
        scale_to(rows, j, d_hidden, i, has_slab ? slab_coefficient(i) : 1.0f);
      }
    }
  }

  Tensor d_weight = at::empty({0}, head.weight.options());
  Tensor d_bias = at::empty({0}, head.bias.has_value() ? head.bias->options() : d_weight.options());
  if (need_weight) d_weight = empty_on_huge_pages({vocabulary, width}, dtype);
  if (need_bias) d_bias = at::empty({vocabulary}, d_bias.options());
  if ((need_weight || need_bias) && n == 0) {
    d_weight.zero_();
    d_bias.zero_();
  } else if (need_weight || need_bias) {
    const auto made = has_slab ? dtype : product;
    const Tokens tokens = tokens_at(hidden, y, active.data(), n);
    Columns columns = columns_of(tokens);
    if (has_slab) {
      for (std::int64_t j = 0; j < n; ++j) columns.a[j] = slab_coefficient(active[j]);
    }
    Tensor rows = tokens.hidden;
    if (has_slab && need_weight) {
      rows = at::empty({n, width}, dtype);
      for (std::int64_t j = 0; j < n; ++j) scale_to(tokens.hidden, j, rows, j, columns.a[j]);
    }
    GradientTiles tiles(tokens, columns, head, storage_of("hidden", at::empty({0}, made)));
    const std::vector<float> factor = has_slab ? columns.a : std::vector<float>();
    if (need_weight && multiplies_packed(head.weight)) {
      Tensor* bias = need_bias ? &d_bias : nullptr;
      has_slab ? weight_gradient_of_slab(slab, column, whole, rows, factor, d_weight, bias)
               : weight_gradient_of_logits(tokens, head, tiles, d_weight, bias);
      return {d_hidden, d_weight, d_bias};
    }
    const std::int64_t stride = stride_for(n);
    const std::int64_t fit = workspace / (stride * at::elementSize(made)) / kTileRows * kTileRows;
    const bool in_one = has_slab && whole;
    const std::int64_t block = in_one ? vocabulary : std::min(vocabulary, std::max(fit, kTileRows));
    Tensor buffer;
    if (!in_one) buffer = gradient_room(block, n, made);
    std::optional<LogitTiles> logits;
    if (!has_slab) logits.emplace(tokens, head);
    for (std::int64_t begin = 0; begin < vocabulary; begin += block) {
      const std::int64_t count = std::min(block, vocabulary - begin);
      Tensor gradient = slab;
      if (has_slab && !whole) {
        gather_columns(slab, begin, begin + count, column, buffer.mutable_data_ptr(), stride);
        gradient = buffer.narrow(0, 0, count).narrow(1, 0, n);
      } else if (!has_slab) {
        gradient = recompute(tokens, *logits, tiles, begin, begin + count, buffer);
      }
      if (need_weight) multiply_by_hidden(gradient, rows, d_weight.narrow(0, begin, count));
      if (need_bias) sum_tokens(gradient, factor, d_bias.narrow(0, begin, count));
    }
  }
  return {d_hidden, d_weight, d_bias};
}

}  // namespace drrlhf
