// Sums of token log-probs by sequence: some warps of a block for each sequence.
#pragma once

#include "device_team.h"

namespace drrlhf::cuda {

struct Span {
  std::int64_t begin, end;
  bool legal;
};

// Where sequence s lies among the tokens; nothing of it is outside them, legal or not.
__device__ inline Span span_of(const Sequences& q, std::int64_t s) {
  if (q.boundaries.data == nullptr) return {s * q.length, (s + 1) * q.length, true};
  const std::int64_t begin = integer_at(q.boundaries, s), end = integer_at(q.boundaries, s + 1);
  const bool legal = begin >= 0 && begin <= end && end <= q.tokens && (s > 0 || begin == 0) &&
                     (s < q.count - 1 || end == q.tokens);
  return {legal ? begin : 0, legal ? end : 0, legal};
}

struct SequenceSum {
  double total, count;
};

// In shared memory.
struct WarpSums {
  SequenceSum of[kWarps];
};

template <class Value>
__device__ SequenceSum sum_tokens(Value value, const Sequences& q, const Span& span, int member,
                                  int members) {
  SequenceSum sum = {0.0, 0.0};
#pragma unroll 4
  for (std::int64_t i = span.begin + member; i < span.end; i += members) {
    const bool counted = integer_at(q.labels, i) != q.ignore_index;
    sum.total += counted ? value(i) : 0.0;
    sum.count += counted ? 1.0 : 0.0;
  }
  return sum;
}

// The sum over the sequence that the caller's `warps` warps (a power of two, aligned) share; s
// outside [0, count) is none. All threads of the block call it together.
__device__ inline SequenceSum sequence_sum(const Numbers& logps, const Sequences& q, std::int64_t s,
                                           int warps, WarpSums& shared) {
  const int warp = threadIdx.x / kLanes, member = threadIdx.x % (warps * kLanes);
  const bool some = s >= 0 && s < q.count;
  const Span span = some ? span_of(q, s) : Span{0, 0, true};
  const int members = warps * kLanes;
  SequenceSum sum;
  if (logps.dtype == Dtype::kFloat) {  // what our own heads give: no question at each token
    const float* x = static_cast<const float*>(logps.data);
    sum = sum_tokens([=](std::int64_t i) { return double(x[i]); }, q, span, member, members);
  } else {
    sum = sum_tokens([&](std::int64_t i) { return number_at(logps, i); }, q, span, member, members);
  }
  Sums<2> both = {{sum.total, sum.count}};
  reduce_lanes<Add, 2>(both, kLanes);
  if (threadIdx.x % kLanes == 0) shared.of[warp] = {both.v[0], both.v[1]};
  __syncthreads();
  SequenceSum result = {0.0, 0.0};
  for (int w = warp / warps * warps; w < (warp / warps + 1) * warps; ++w) {
    result.total += shared.of[w].total;
    result.count += shared.of[w].count;
  }
  if (!span.legal) result.total = kNan;
  return result;
}

// Warps for each sequence, so that a launch has about `blocks` blocks; at least `least` sequences
// share one.
inline int warps_for(std::int64_t sequences, int least) {
  constexpr std::int64_t kBlocks = 512;
  int warps = kWarps / least;
  while (warps > 1 && sequences * warps > kBlocks * kWarps) warps /= 2;
  return warps;
}

}  // namespace drrlhf::cuda
