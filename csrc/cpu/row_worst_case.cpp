#include "row_worst_case.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/dual_search.h"
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

constexpr std::int64_t kRowsOfATask = 4096;

// Some rows, entry by entry: losses, what they are compared by, nominal masses, weights. What does
// not count has l = p = 0 and the least rank; NaN has the largest. Rows are solved side by side,
// one in each lane, as many as a vector holds: GCC takes a wider one apart number by number.
template <int kLanes>
struct Block {
  // One number of every row, aligned as the numbers of a std::vector are.
  typedef double Lanes __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));

  Lanes *l, *rank, *p, *q;
  Lanes value, total, nan;
  std::int64_t width;

  static std::int64_t room(std::int64_t width) { return 4 * kLanes * width; }

  DRRLHF_HD Block(double* room, std::int64_t width) : width(width) {
    l = reinterpret_cast<Lanes*>(room), rank = l + width, p = rank + width, q = p + width;
  }
};

template <class B>
using LanesOf = typename B::Lanes;

template <class Lanes>
DRRLHF_HD Lanes all(double x) {
  return x - Lanes{};
}

// By value: a reference to Block's numbers would claim that they are aligned as a whole vector is.
template <class Lanes>
DRRLHF_HD Lanes where(const auto& mask, Lanes yes, Lanes no) {
  return mask ? yes : no;
}

template <class B>
constexpr int lanes() {
  return sizeof(LanesOf<B>) / sizeof(double);
}

template <class B, class Lanes = LanesOf<B>>
DRRLHF_HD Lanes largest(const B& b) {
  Lanes top = all<Lanes>(-kInfinity);
  for (std::int64_t k = 0; k < b.width; ++k) top = where(b.rank[k] > top, b.rank[k], top);
  return top;
}

// q in proportion to p exp(l / t), with the value t log sum p exp(l / t).
template <class B, class Lanes = LanesOf<B>>
DRRLHF_HD void tilt(B& b, double t) {
  for (std::int64_t k = 0; k < b.width; ++k) {
    const Lanes x = b.l[k] / t;
    b.rank[k] =
        where(b.p[k] > 0.0, where(x == x, x, all<Lanes>(kInfinity)), all<Lanes>(-kInfinity));
  }
  const Lanes top = largest(b);
  Lanes z = {}, less = {};
  for (std::int64_t k = 0; k < b.width; ++k) {
    Lanes d = b.rank[k] - top;  // NaN where both are infinite
    // Where the largest is infinite every other entry is infinitely far below.
    const auto near = d > -700.0;
    d = where(near, d, all<Lanes>(-700.0));
    Lanes grown, shrunk;  // exp and expm1
    for (int r = 0; r < lanes<B>(); ++r) {
      const ExpParts e = exp_parts(d[r]);
      grown[r] = e.scale * (1 + e.tail);
      shrunk[r] = (e.scale - 1) + e.scale * e.tail;
    }
    grown = where(b.rank[k] == top, all<Lanes>(1.0), where(near, grown, Lanes{}));
    b.q[k] = b.p[k] * grown;
    z += b.q[k];
    less += where(b.rank[k] == top, Lanes{}, b.p[k] * where(near, shrunk, all<Lanes>(-1.0)));
  }
  for (std::int64_t k = 0; k < b.width; ++k) b.q[k] = where(z > 0.0, b.q[k] / z, Lanes{});
  for (int r = 0; r < lanes<B>(); ++r) {
    // Where all are near the largest, log z is a small number of its own.
    b.value[r] = t * (top[r] + (z[r] > 0.5 ? std::log1p(less[r]) : std::log(z[r])));
  }
}

// The mass `kept` of p from the largest loss down, ties in proportion to p, found without sorting
// from the mass above an entry and beside it. Their sums.
template <class B, class Lanes = LanesOf<B>>
DRRLHF_HD Lanes fill(B& b, double kept) {
  Lanes filled = {};
  for (std::int64_t k = 0; k < b.width; ++k) {
    Lanes above = {}, beside = {};
    for (std::int64_t j = 0; j < b.width; ++j) {
      above += where(b.rank[j] > b.rank[k], b.p[j], Lanes{});
      beside += where(b.rank[j] == b.rank[k], b.p[j], Lanes{});
    }
    // A part below the rounding of the masses is none: of an infinite loss 1e-17 would be seen.
    const Lanes part = kept - above;
    Lanes share = part / where(beside > 0.0, beside, all<Lanes>(1.0));
    share = where(beside - part < kMassRounding, all<Lanes>(1.0), share);
    share = where(part < kMassRounding, Lanes{}, share);
    b.q[k] = b.p[k] * share;
    filled += b.q[k];
  }
  return filled;
}

// What is not filled goes to the largest losses, in proportion to p.
template <class B, class Lanes = LanesOf<B>>
DRRLHF_HD void raise_top(B& b, const Lanes& filled) {
  const Lanes top = largest(b);
  Lanes mass = {};
  for (std::int64_t k = 0; k < b.width; ++k) mass += where(b.rank[k] == top, b.p[k], Lanes{});
  const Lanes share = (1.0 - filled) / where(mass > 0.0, mass, all<Lanes>(1.0));
  for (std::int64_t k = 0; k < b.width; ++k) {
    b.q[k] += where(b.rank[k] == top, share * b.p[k], Lanes{});
  }
}

template <class B, class Lanes = LanesOf<B>>
DRRLHF_HD void solve(B& b, Kind kind, double parameter) {
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
      for (std::int64_t k = 0; k < width; ++k)
        b.q[k] /= where(filled > 0.0, filled, all<Lanes>(1.0));
    } else if (kind == Kind::kTv) {
      raise_top(b, parameter < 1 ? fill(b, 1.0 - parameter) : Lanes{});
    }
    b.value = Lanes{};
    // Not 0 times infinity where an entry has no weight.
    for (std::int64_t k = 0; k < width; ++k) {
      b.value += where(b.q[k] > 0.0, b.q[k] * b.l[k], Lanes{});
    }
  }
  b.value = where(b.nan > 0.0, all<Lanes>(kNan), b.value);
  b.value = where(b.total > 0.0, b.value, Lanes{});
}

// The table and what else of it is asked; `counts` and `masses` may be null.
template <class T>
struct Rows {
  const T* losses;       // (n, width)
  const bool* counts;    // (n, width)
  const double* masses;  // (width,)
  T *values, *weights;   // (n,), (n, width)
  std::int64_t width;
};

// Rows from `from` on, one in each lane; lanes beyond `rows` repeat the last without any mass.
template <class B, class T, class Lanes = LanesOf<B>>
DRRLHF_HD void load(B& b, const Rows<T>& table, std::int64_t from, std::int64_t rows) {
  std::int64_t start[lanes<B>()];
  Lanes there;
  for (int r = 0; r < lanes<B>(); ++r) {
    start[r] = (from + (r < rows ? r : rows - 1)) * table.width;
    there[r] = r < rows ? 1.0 : 0.0;
  }
  b.total = b.nan = Lanes{};
  for (std::int64_t k = 0; k < table.width; ++k) {
    Lanes l, mass = there;
    for (int r = 0; r < lanes<B>(); ++r) l[r] = static_cast<double>(table.losses[start[r] + k]);
    if (table.masses) mass *= all<Lanes>(table.masses[k]);
    if (table.counts) {
      Lanes counts;
      for (int r = 0; r < lanes<B>(); ++r) counts[r] = table.counts[start[r] + k];
      mass = where(counts > 0.0, mass, Lanes{});
    }
    const auto counted = mass > 0.0;
    const auto number = l == l;
    b.l[k] = where(counted, l, Lanes{});
    b.p[k] = mass;
    b.rank[k] = where(counted, where(number, l, all<Lanes>(kInfinity)), all<Lanes>(-kInfinity));
    b.nan += where(counted, where(number, Lanes{}, all<Lanes>(1.0)), Lanes{});
    b.total += mass;
  }
}

template <class B, class T>
DRRLHF_HD void store(const B& b, const Rows<T>& table, std::int64_t from, std::int64_t rows) {
  for (std::int64_t r = 0; r < rows; ++r) table.values[from + r] = static_cast<T>(b.value[r]);
  for (std::int64_t k = 0; k < table.width; ++k) {
    for (std::int64_t r = 0; r < rows; ++r) {
      table.weights[(from + r) * table.width + k] = static_cast<T>(b.q[k][r]);
    }
  }
}

// Values and weights of n rows.
template <class T>
void solve_rows(const Rows<T>& table, std::int64_t n, Kind kind, double parameter) {
  at::parallel_for(0, n, kRowsOfATask, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> room(Block<kMostLanes>::room(table.width));
    vectorised([=, scratch = room.data()]<int kLanes>(Width<kLanes>) {
      Block<kLanes> b(scratch, table.width);
      for (std::int64_t from = begin; from < end; from += kLanes) {
        const std::int64_t rows = std::min<std::int64_t>(kLanes, end - from);
        load(b, table, from, rows);
        solve(b, kind, parameter);
        store(b, table, from, rows);
      }
    });
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
  const Tensor values = at::empty({n}, losses.options()), weights = at::empty_like(losses);
  const auto run = [&]<class T>(T) {
    const Rows<T> rows{losses.const_data_ptr<T>(),
                       mask.has_value() ? counted.const_data_ptr<bool>() : nullptr,
                       nominal.has_value() ? mass.const_data_ptr<double>() : nullptr,
                       values.mutable_data_ptr<T>(),
                       weights.mutable_data_ptr<T>(),
                       table.size(1)};
    solve_rows(rows, n, kind_of(kind), parameter);
  };
  dtype == at::kDouble ? run(double{}) : run(float{});
  return {values, weights};
}

}  // namespace drrlhf::cpu
