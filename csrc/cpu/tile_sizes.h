// How large the pieces are that the head on the CPU works on: tiles of logits, blocks of the head,
// passes over tokens.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "softmax.h"

namespace drrlhf::cpu {

// Rows of the head in a tile of logits that no blocked product makes.
inline constexpr std::int64_t kTileRows = 64;
// Tokens of a tile that a blocked product makes; a tile is worked on while it is in the cache.
inline constexpr std::int64_t kTileTokens = 64;
// Tokens whose logits are made together where none are kept.
inline constexpr std::int64_t kScoredTokens = 1024;
// Rows of the head that are widened to float32 at a time where the dtype has no products here.
inline constexpr std::int64_t kWidenedRows = 256;

inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Entries between the rows of a tile with `columns` columns; rows that are a power of two apart
// would meet in the same few lines of the cache.
inline std::int64_t stride_for(std::int64_t columns) {
  const std::int64_t stride = round_up(columns, kColumnBlock);
  return stride % 256 == 0 ? stride + kColumnBlock : stride;
}

// Rows of the head (V, D) in a block, a multiple of 32: the block and a copy of it stay in the
// second-level cache while all tokens are multiplied by it, for what is summed up by token comes
// from further away with every block.
inline std::int64_t block_rows(std::int64_t vocabulary, std::int64_t width) {
  constexpr std::int64_t kBytes = 1 << 21, kMost = 256, kLeast = 64;
  const std::int64_t fit = std::clamp(kBytes / (4 * width) / 32 * 32, kLeast, kMost);
  const std::int64_t even = round_up(vocabulary / (4 * at::get_num_threads()) + 1, 32);
  return std::min(fit, std::max(even, kLeast));
}

// As many tokens as have their logits, of `size` bytes each, in the workspace at a time; at least
// one block.
inline std::int64_t tokens_per_pass(std::int64_t tokens, std::int64_t vocabulary,
                                    std::int64_t workspace, std::int64_t size) {
  const std::int64_t fit = workspace / (vocabulary * size) - kColumnBlock;  // the stride's skew
  const std::int64_t most = std::max(kColumnBlock, fit >= 64 ? fit / 64 * 64 : fit / 16 * 16);
  const std::int64_t passes = std::max<std::int64_t>(1, (tokens + most - 1) / most);
  return std::min(most, round_up((tokens + passes - 1) / passes, most >= 64 ? 64 : kColumnBlock));
}

}  // namespace drrlhf::cpu
