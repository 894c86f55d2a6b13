#include "row_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <vector>

#include "../message.h"

namespace drrlhf::cpu {
namespace {

// Queries whose gradients are taken at once: causality leaves out half a square of their keys.
constexpr std::int64_t kQueries = 128;

struct Piece {
  std::int64_t start, stop;
  std::int64_t size() const { return stop - start; }
};

// Its own tokens, and what they see before these.
struct Block {
  Piece own, before, then;
  std::vector<Piece> seen() const {  // pieces that adjoin are one
    std::vector<Piece> pieces;
    for (const Piece& piece : {before, then, own}) {
      if (piece.size() == 0) continue;
      if (!pieces.empty() && pieces.back().stop == piece.start)
        pieces.back().stop = piece.stop;
      else
        pieces.push_back(piece);
    }
    return pieces;
  }
};

// Blocks that see nothing outside of them.
struct Group {
  std::vector<Block> blocks;
  std::int64_t start() const { return blocks.front().own.start; }
  std::int64_t stop() const { return blocks.back().own.stop; }
};

std::vector<Group> groups_of(const at::Tensor& blocks, std::int64_t length) {
  DRRLHF_CHECK_VALUE(blocks.dim() == 2 && blocks.size(1) == 6 && blocks.scalar_type() == at::kLong,
                     "blocks: expected int64 of shape (B, 6), got ", blocks.sizes());
  const at::Tensor rows = blocks.contiguous();
  const std::int64_t* p = rows.const_data_ptr<std::int64_t>();
  std::vector<Group> groups;
  std::int64_t end = 0;
  for (std::int64_t i = 0; i < rows.size(0); ++i, p += 6) {
    const Block block{{p[0], p[1]}, {p[2], p[3]}, {p[4], p[5]}};
    std::int64_t first = end;  // of all that it sees
    bool in_order = block.own.start == end && block.own.size() > 0;
    for (const Piece& piece : {block.before, block.then}) {
      in_order &= piece.size() == 0 || (0 <= piece.start && piece.size() > 0 && piece.stop <= end);
      if (piece.size() != 0) first = std::min(first, piece.start);
    }
    DRRLHF_CHECK_VALUE(in_order, "blocks: expected tokens in order, and prefixes before them, got ",
                       p[0], " to ", p[1], " behind ", p[2], " to ", p[3], " and ", p[4], " to ",
                       p[5]);
    if (first == end) groups.emplace_back();
    while (first < end && groups.back().start() > first) {  // it sees what lies in an earlier one
      const std::vector<Block> last = std::move(groups.back().blocks);
      groups.pop_back();
      groups.back().blocks.insert(groups.back().blocks.end(), last.begin(), last.end());
    }
    groups.back().blocks.push_back(block);
    end = block.own.stop;
  }
  DRRLHF_CHECK_VALUE(end == length, "blocks: expected them to cover ", length, " tokens, got ",
                     end);
  return groups;
}

// One head of keys with the heads of queries that share it, in one group of blocks.
class Part {
 public:
  Part(const at::Tensor& key, const at::Tensor& value, std::int64_t origin, std::int64_t window,
       double scale)
      : key_(key),
        wide_key_(key.to(at::kFloat)),
        wide_value_(value.to(at::kFloat)),
        of_key_(at::zeros(key.sizes(), at::kFloat)),
        of_value_(at::zeros(key.sizes(), at::kFloat)),
        origin_(origin),
        window_(window),
        scale_(scale) {}

  // The gradient (heads, Q, D) of the queries (heads, Q, D) that end a block; all arguments alike.
  at::Tensor add(const Block& block, const at::Tensor& query, const at::Tensor& grad,
                 const at::Tensor& out, const at::Tensor& norms) {
    const std::int64_t queries = query.size(1), width = query.size(2);
    const at::Tensor q = query.reshape({-1, width}), g = grad.reshape({-1, width});
    const at::Tensor wide = g.to(at::kFloat);
    // Scores in float32: a score of 10 in bfloat16 would move its probability by 4 %.
    at::Tensor p = at::mm(q.to(at::kFloat), seen(wide_key_, block).t());
    p.mul_(scale_).sub_(norms.reshape({-1, 1})).exp_();
    hide(block, queries, p);
    const at::Tensor inner = (wide * out.reshape({-1, width})).sum(-1, true);
    at::Tensor ds = at::mm(wide, seen(wide_value_, block).t());
    ds = ds.sub_(inner).mul_(p).mul_(scale_).to(q.scalar_type());
    add_seen(of_key_, block, at::mm(ds.t(), q));
    add_seen(of_value_, block, at::mm(p.to(q.scalar_type()).t(), g));
    return at::mm(ds, seen(key_, block)).view(query.sizes());
  }

  const at::Tensor& of_key() const { return of_key_; }
  const at::Tensor& of_value() const { return of_value_; }

 private:
  at::Tensor range(const at::Tensor& x, const Piece& piece) const {
    return x.narrow(0, piece.start - origin_, piece.size());
  }

  at::Tensor seen(const at::Tensor& x, const Block& block) const {
    std::vector<at::Tensor> pieces;
    for (const Piece& piece : block.seen()) pieces.push_back(range(x, piece));
    return pieces.size() == 1 ? pieces[0] : at::cat(pieces);
  }

  void add_seen(at::Tensor& total, const Block& block, const at::Tensor& found) const {
    std::int64_t done = 0;
    for (const Piece& piece : block.seen()) {
      range(total, piece).add_(found.narrow(0, done, piece.size()));
      done += piece.size();
    }
  }

  // Probabilities (heads Q, keys) of keys that a query does not see become 0.
  void hide(const Block& block, std::int64_t queries, at::Tensor& p) const {
    const std::int64_t keys = p.size(1);
    float* row = p.mutable_data_ptr<float>();
    for (std::int64_t r = 0; r < p.size(0); ++r, row += keys) {
      const std::int64_t stop = keys - queries + r % queries + 1;
      std::fill(row + stop, row + keys, 0.0f);
      if (stop > window_) std::fill(row, row + stop - window_, 0.0f);
    }
  }

  at::Tensor key_, wide_key_, wide_value_, of_key_, of_value_;
  std::int64_t origin_, window_;
  double scale_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> row_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& norms, const at::Tensor& blocks, std::int64_t window,
    double scale) {
  DRRLHF_CHECK_VALUE(query.dim() == 3 && key.dim() == 3 && key.sizes() == value.sizes() &&
                         key.size(0) > 0 && query.size(0) % key.size(0) == 0 &&
                         query.size(1) == key.size(1) && query.size(2) == key.size(2),
                     "query, key, value: expected (H, T, D) and twice (K, T, D), got ",
                     query.sizes(), ", ", key.sizes(), " and ", value.sizes());
  const std::vector<Group> groups = groups_of(blocks, query.size(1));
  const std::int64_t heads = key.size(0), each = query.size(0) / heads;
  const at::Tensor of_query = at::empty_like(query, at::MemoryFormat::Contiguous);
  const at::Tensor of_key = at::empty_like(key, at::MemoryFormat::Contiguous);
  const at::Tensor of_value = at::empty_like(of_key);
  const at::Tensor by_head = grad.transpose(0, 1), result = out.transpose(0, 1);

  const std::int64_t tasks = heads * static_cast<std::int64_t>(groups.size());
  at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;  // threads of a pool know of no grad mode
    for (std::int64_t task = begin; task < end; ++task) {
      const Group& group = groups[task / heads];
      const std::int64_t head = task % heads, length = group.stop() - group.start();
      const auto mine = [&](const at::Tensor& x) {
        return x.select(0, head).narrow(0, group.start(), length);
      };
      Part part(mine(key), mine(value), group.start(), window, scale);
      for (const Block& whole : group.blocks) {
        for (std::int64_t first = whole.own.start; first < whole.own.stop; first += kQueries) {
          Block block = whole;
          block.own.stop = std::min(first + kQueries, whole.own.stop);
          const auto asked = [&](const at::Tensor& x) {
            return x.narrow(0, head * each, each).narrow(1, first, block.own.stop - first);
          };
          asked(of_query).copy_(
              part.add(block, asked(query), asked(by_head), asked(result), asked(norms)));
        }
      }
      mine(of_key).copy_(part.of_key());
      mine(of_value).copy_(part.of_value());
    }
  });
  return {of_query, of_key, of_value};
}

}  // namespace drrlhf::cpu
