// Softmax statistics and gradients of logits, vectorised: along rows for logits that are given,
// down columns for transposed tiles of logits that a matrix product has just left in the cache.
//
// z = softcap tanh(scale x / softcap) inverse_temperature, without the tanh where softcap is 0.
// Everything is float32 inside; the label's own logit is kept apart from the others, so that
// log p of a confident model keeps its digits.
#pragma once

#include <cfloat>
#include <cstdint>

namespace drrlhf::cpu {

struct Transform {
  float scale, softcap, inverse_temperature;
};

enum class Storage { kFloat, kBFloat16, kHalf };

// Of the logits other than the label's: sum e with e = exp(z - reference), and where asked for
// sum e (z - reference), sum e^2, the first maximum and its index. total = sum z of all logits, the
// label's included. The reference is the largest of the first few, so that one pass will do.
struct Others {
  float reference = -FLT_MAX, top = -FLT_MAX;
  double sum = 0, shifted = 0, squares = 0, total = 0;
  std::int64_t index = -1;
};

// The same for every column of a tile, in arrays that the caller fills with those values at first.
// What follows `sum` is null where it is not asked for.
struct OthersOfColumns {
  float *reference, *sum, *shifted, *squares, *total, *top;
  std::int32_t* index;
};

// What a row is known by once its label's logit is counted in. lse + lse_tail is its log-sum-exp to
// more digits than one float32 holds: gradients need them.
struct TokenStatistics {
  float logp, lse, lse_tail, entropy, mean, log_sum_squares;
  bool is_top1;
};

// The coefficients of one row's gradient: a d logp / dx + b d entropy / dx.
struct RowCoefficients {
  float a, b, logp, lse, lse_tail, entropy;
};

// The same for every column of a tile; b and entropy null where b is 0, a null where it is 1.
struct ColumnCoefficients {
  const float *a, *b, *logp, *lse, *lse_tail, *entropy;
};

// Of ratios to fixed references, for every column of a tile: the others' e are added to `sum`, and
// the label's z and dz/dlogit are set.
struct RatiosOfColumns {
  const float* reference;
  float *sum, *label_z, *label_slope;
};

// A part of transposed logits (V, tokens): entries [first, first + rows) of the vocabulary and
// tokens [column, column + columns).
struct Part {
  std::int64_t first, rows, column, columns;
};

// z of a part, whose rows lie `stride` entries apart. What kernels take beside it by column begins
// at the tile's own first one.
struct Tile : Part {
  float* z;
  std::int64_t stride;
};

struct SoftmaxKernels {
  int lanes;  // floats in a vector
  // Statistics of the row x (n,) without entry `label`, whose transformed value goes to label_z.
  void (*fold_row)(const void* x, Storage storage, std::int64_t n, std::int64_t label,
                   const Transform& transform, bool extras, Others& others, float& label_z);
  // out (n,) = gradient of the row x (n,); out may be x.
  void (*row_gradient)(const void* x, void* out, Storage storage, std::int64_t n,
                       std::int64_t label, const Transform& transform,
                       const RowCoefficients& coefficients);
  // Turns the tile's logits into z in place; bias (rows,) may be null. `columns` is a multiple of
  // kColumnBlock, here and below.
  void (*transform_tile)(Tile tile, const float* bias, const Transform& transform);
  // Folds a tile into `others`. A column whose label (columns,) lies in the tile gets its label_z.
  // The tile is left as it was.
  void (*fold_tile)(Tile tile, const std::int64_t* labels, const OthersOfColumns& others,
                    float* label_z);
  // out (rows, columns) = gradient of the tile; out may begin where the tile does, with rows no
  // further apart. scratch (columns,).
  void (*tile_gradient)(Tile tile, const std::int64_t* labels, const Transform& transform,
                        const ColumnCoefficients& coefficients, void* out, std::int64_t out_stride,
                        Storage storage, float* scratch);
  // Ratios e = exp(z - reference) to a reference that is fixed beforehand: out = e dz/dlogit in
  // bfloat16, in units of scale / temperature, of the first `tokens` columns. Transposed they are
  // out (tokens, rows), filled with 0 up to a multiple of 32 entries; otherwise (rows, tokens). A
  // label's own entry is 0. The tile is left without the labels' own logits. Only where the
  // processor has AVX-512.
  void (*tile_ratios)(Tile tile, std::int64_t tokens, const std::int64_t* labels,
                      const Transform& transform, const RatiosOfColumns& ratios, std::uint16_t* out,
                      std::int64_t out_stride, bool transposed);
  // out (columns, rows) = x (rows, columns), both of 16-bit entries; out's rows are filled with 0
  // up to a multiple of 32 entries. Only where the processor has AVX-512.
  void (*transpose)(const std::uint16_t* x, std::int64_t stride, std::int64_t rows,
                    std::int64_t columns, std::uint16_t* out, std::int64_t out_stride);
  // out (n,) = factor x (n,).
  void (*scale_row)(const void* x, void* out, Storage storage, std::int64_t n, float factor);
  // out (n,) = x (n,), rounded.
  void (*narrow_row)(const float* x, void* out, Storage storage, std::int64_t n);
};

// Columns are worked on in blocks of this many, whatever the vector width.
constexpr std::int64_t kColumnBlock = 16;

// The kernels for the processor that this runs on; never wider than ATen's own, so that
// ATEN_CPU_CAPABILITY=default or avx2 in the environment holds for both.
const SoftmaxKernels& softmax_kernels();

// Adds `from` to `into`: statistics of disjoint parts of one row.
void merge(Others& into, const Others& from);

TokenStatistics finish(const Others& others, float label_z, std::int64_t label, std::int64_t n);

}  // namespace drrlhf::cpu
