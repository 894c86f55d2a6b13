#include "row_worst_case.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/math.h"
#include "../message.h"
#include "../names.h"
#include "vectorised.h"

#if defined(__GNUC__) && !defined(__clang__)
// What returns vectors is inlined: nobody has another idea of how they are returned.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace drrlhf::cpu {
namespace {

constexpr std::int64_t kBlocksOfATask = 512;
constexpr int kLanes = 8;  // rows that are solved side by side

// One number of every row, aligned as the numbers of a std::vector are.
typedef double Lanes __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));

// Some rows, entry by entry: losses, what they are compared by, nominal masses, weights. What does
// not count has l = p = 0 and the least rank; NaN has the largest.
struct Block {
  std::vector<double> room;
  Lanes *l, *rank, *p, *q;
  Lanes value, total, nan;
  std::int64_t width;

  explicit Block(std::int64_t width) : room(4 * kLanes * width), width(width) {
    l = reinterpret_cast<Lanes*>(room.data()), rank = l + width, p = rank + width, q = p + width;
  }
};

DRRLHF_HD Lanes all(double x) { return x - Lanes{}; }

DRRLHF_HD Lanes where(const auto& mask, const Lanes& yes, const Lanes& no) {
  return mask ? yes : no;
}

DRRLHF_HD Lanes largest(const Block& b) {
  Lanes top = all(-kInfinity);
  for (std::int64_t k = 0; k < b.width; ++k) top = where(b.rank[k] > top, b.rank[k], top);
  return top;
}

// q in proportion to p exp(l / t), with the value t log sum p exp(l / t).
DRRLHF_HD void tilt(Block& b, double t) {
  for (std::int64_t k = 0; k < b.width; ++k) {
    const Lanes x = b.l[k] / t;
    b.rank[k] = where(b.p[k] > 0.0, where(x == x, x, all(kInfinity)), all(-kInfinity));
  }
  const Lanes top = largest(b);
  Lanes z = {}, less = {};
  for (std::int64_t k = 0; k < b.width; ++k) {
    Lanes d = b.rank[k] - top;  // NaN where both are infinite
    // Where the largest is infinite every other entry is infinitely far below.
    const auto near = d > -700.0;
    d = where(near, d, all(-700.0));
    Lanes grown, shrunk;  // exp and expm1
    for (int r = 0; r < kLanes; ++r) {
      const ExpParts e = exp_parts(d[r]);
      grown[r] = e.scale * (1 + e.tail);
      shrunk[r] = (e.scale - 1) + e.scale * e.tail;
    }
    grown = where(b.rank[k] == top, all(1.0), where(near, grown, Lanes{}));
    b.q[k] = b.p[k] * grown;
    z += b.q[k];
    less += where(b.rank[k] == top, Lanes{}, b.p[k] * where(near, shrunk, all(-1.0)));
  }
  for (std::int64_t k = 0; k < b.width; ++k) b.q[k] = where(z > 0.0, b.q[k] / z, Lanes{});
  for (int r = 0; r < kLanes; ++r) {
    // Where all are near the largest, log z is a small number of its own.
    b.value[r] = t * (top[r] + (z[r] > 0.5 ? std::log1p(less[r]) : std::log(z[r])));
  }
}

// The mass `kept` of p from the largest loss down, ties in proportion to p, found without sorting
// from the mass above an entry and beside it. Their sums.
DRRLHF_HD Lanes fill(Block& b, double kept) {
  Lanes filled = {};
  for (std::int64_t k = 0; k < b.width; ++k) {
    Lanes above = {}, beside = {};
    for (std::int64_t j = 0; j < b.width; ++j) {
      above += where(b.rank[j] > b.rank[k], b.p[j], Lanes{});
      beside += where(b.rank[j] == b.rank[k], b.p[j], Lanes{});
    }
    Lanes share = (kept - above) / where(beside > 0.0, beside, all(1.0));
    share = where(share > 1.0, all(1.0), where(share > 0.0, share, Lanes{}));
    b.q[k] = b.p[k] * share;
    filled += b.q[k];
  }
  return filled;
}

// What is not filled goes to the largest losses, in proportion to p.
DRRLHF_HD void raise_top(Block& b, const Lanes& filled) {
  const Lanes top = largest(b);
  Lanes mass = {};
  for (std::int64_t k = 0; k < b.width; ++k) mass += where(b.rank[k] == top, b.p[k], Lanes{});
  const Lanes share = (1.0 - filled) / where(mass > 0.0, mass, all(1.0));
  for (std::int64_t k = 0; k < b.width; ++k) {
    b.q[k] += where(b.rank[k] == top, share * b.p[k], Lanes{});
  }
}

DRRLHF_HD void solve(Block& b, Kind kind, double parameter) {
  const std::int64_t width = b.width;
  for (std::int64_t k = 0; k < width; ++k) {
    b.p[k] = where(b.total > 0.0, b.p[k] / b.total, Lanes{});
    b.q[k] = kind == Kind::kErm ? b.p[k] : Lanes{};
  }
  if (kind == Kind::kKlTemperature) {
    tilt(b, parameter);
  } else {
    if (kind == Kind::kCvar) {
      const Lanes filled = fill(b, parameter);
      for (std::int64_t k = 0; k < width; ++k) b.q[k] /= where(filled > 0.0, filled, all(1.0));
    } else if (kind == Kind::kTv) {
      raise_top(b, parameter < 1 ? fill(b, 1.0 - parameter) : Lanes{});
    }
    b.value = Lanes{};
    // Not 0 times infinity where an entry has no weight.
    for (std::int64_t k = 0; k < width; ++k) {
      b.value += where(b.q[k] > 0.0, b.q[k] * b.l[k], Lanes{});
    }
  }
  b.value = where(b.nan > 0.0, all(kNan), b.value);
  b.value = where(b.total > 0.0, b.value, Lanes{});
}

// Row `from + r` of a table into lane r of the block; rows behind the last are empty.
template <class T>
void load(Block& b, const T* table, const bool* counts, const double* masses, std::int64_t from,
          std::int64_t rows) {
  b.total = b.nan = Lanes{};
  for (int r = 0; r < kLanes; ++r) {
    for (std::int64_t k = 0; k < b.width; ++k) {
      const std::int64_t at = (from + r) * b.width + k;
      const double mass = r >= rows || (counts && !counts[at]) ? 0.0 : masses ? masses[k] : 1.0;
      const double l = mass > 0 ? static_cast<double>(table[at]) : 0.0;
      b.l[k][r] = l;
      b.p[k][r] = mass;
      b.rank[k][r] = mass > 0 ? (l == l ? l : kInfinity) : -kInfinity;
      b.nan[r] += l == l ? 0 : 1;
      b.total[r] += mass;
    }
  }
}

// Values and weights of n rows.
template <class T>
void solve_rows(const Tensor& table, const bool* counts, const double* masses, Kind kind,
                double parameter, const Tensor& values, const Tensor& weights) {
  const std::int64_t n = table.size(0), width = table.size(1);
  const T* l = table.const_data_ptr<T>();
  T *value = values.mutable_data_ptr<T>(), *q = weights.mutable_data_ptr<T>();
  const std::int64_t blocks = (n + kLanes - 1) / kLanes;
  at::parallel_for(0, blocks, kBlocksOfATask, [&](std::int64_t begin, std::int64_t end) {
    Block b(width);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t from = i * kLanes, rows = std::min<std::int64_t>(kLanes, n - from);
      load(b, l, counts, masses, from, rows);
      vectorised([=, block = &b] { solve(*block, kind, parameter); });
      for (std::int64_t r = 0; r < rows; ++r) {
        value[from + r] = static_cast<T>(b.value[r]);
        for (std::int64_t k = 0; k < width; ++k) {
          q[(from + r) * width + k] = static_cast<T>(b.q[k][r]);
        }
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> row_worst_case(const Tensor& table, const OptionalTensor& mask,
                                          const OptionalTensor& nominal, std::string_view kind,
                                          double parameter) {
  DRRLHF_CHECK_VALUE(table.dim() == 2, "table: expected shape (n, K), got ", table.sizes());
  const std::int64_t n = table.size(0);
  const auto dtype = statistics_dtype(table);
  const Tensor losses = table.to(dtype).contiguous();
  const Tensor counted = mask.has_value() ? mask->contiguous() : Tensor();
  const Tensor mass = nominal.has_value() ? nominal->to(at::kDouble).contiguous() : Tensor();
  const bool* counts = mask.has_value() ? counted.const_data_ptr<bool>() : nullptr;
  const double* masses = nominal.has_value() ? mass.const_data_ptr<double>() : nullptr;
  const Tensor values = at::empty({n}, losses.options()), weights = at::empty_like(losses);
  (dtype == at::kDouble ? solve_rows<double> : solve_rows<float>)(losses, counts, masses,
                                                                  kind_of(kind), parameter, values,
                                                                  weights);
  return {values, weights};
}

}  // namespace drrlhf::cpu
