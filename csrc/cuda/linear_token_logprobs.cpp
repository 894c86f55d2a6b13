// The head on a GPU: a chunk of float32 logits by the library's product, a kernel that turns it
// into gradients of the head's dtype in place, and the next product. Nothing here waits for the
// device.
#include "linear_token_logprobs.h"

#include <algorithm>

namespace drrlhf::cuda {
namespace {

// What the forward of linear_token_logprobs keeps, as drrlhf.reference numbers it.
enum class Keep : std::int64_t { kNothing = 0, kHidden = 1, kRows = 4 };

// out = a b; float32 where out is: what the product accumulated, not rounded to the dtype of a and
// b.
void product(Tensor out, const Tensor& a, const Tensor& b) {
#if defined(DRRLHF_EMULATED)
  // In float32, for oneDNN's narrow products on AMX read what lies behind the rows of `a`.
  out.copy_(at::mm(a.to(at::kFloat), b.to(at::kFloat)));
#else
  if (out.scalar_type() == a.scalar_type()) {
    at::mm_out(out, a, b);
  } else {
    at::mm_out(out, a, b, at::kFloat);
  }
#endif
}

// A head and its tokens, and the steps that the ops are made of.
class LinearHead {
 public:
  LinearHead(Call& call, const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
             const Tensor& labels, std::int64_t ignore_index, const LogitTransform& transform,
             std::int64_t workspace)
      : call_(call),
        hidden_(as_rows("hidden", hidden).contiguous()),
        weight_(weight),
        bias_(bias),
        ignore_index_(ignore_index),
        transform_(transform),
        workspace_(workspace) {
    DRRLHF_CHECK_VALUE(weight.dim() == 2 && weight.size(0) >= 1,
                       "weight: expected shape (V, D) with V >= 1, got ", weight.sizes());
    labels_ = call.integers("labels", labels, tokens());
  }

  std::int64_t tokens() const { return hidden_.size(0); }
  std::int64_t vocabulary() const { return weight_.size(0); }
  const Tensor& hidden() const { return hidden_; }

  // Rows begin on whole loads of 16 entries, as library products like them too.
  static std::int64_t padded(std::int64_t columns) { return (columns + 15) / 16 * 16; }

  // Memory for logits of `rows` tokens and `columns` entries of the vocabulary, rows on whole
  // loads.
  Tensor buffer(std::int64_t rows, std::int64_t columns) const {
    return at::empty({rows, padded(columns)}, hidden_.options().dtype(at::kFloat));
  }

  // The same memory, and rows no closer, as numbers of the head's dtype.
  Tensor as_gradient(const Tensor& logits) const { return logits.view(hidden_.scalar_type()); }

  std::int64_t rows_at_once() const {
    return even(tokens(), workspace_ / (padded(vocabulary()) * kLogitBytes), 1);
  }

  std::int64_t columns_at_once() const {
    return even(vocabulary(), workspace_ / (std::max<std::int64_t>(1, tokens()) * kLogitBytes), 16);
  }

  // Logits of some tokens and some entries of the vocabulary, before `transform`.
  void multiply(Tensor out, std::int64_t token, std::int64_t first) const {
    product(out, hidden_.narrow(0, token, out.size(0)), weight_.narrow(0, first, out.size(1)).t());
    if (bias_.has_value()) out.add_(bias_->narrow(0, first, out.size(1)));
  }

  void read(const Tensor& logits, std::int64_t token, const TokenTensors& out) const {
    call_.check(token_logprobs_cuda(logits_of(logits), after(labels_, token), ignore_index_,
                                    transform_, out.from(token), call_.stream()));
  }

  // d logp / d logits to `gradients`, which may be `as_gradient` of the logits.
  void differentiate(const Tensor& logits, std::int64_t token, const TokenTensors& out,
                     const Tensor& gradients) const {
    call_.check(softmax_chunk_cuda(logits_of(logits), after(labels_, token), ignore_index_,
                                   transform_, out.from(token), chunk_out(gradients),
                                   call_.stream()));
  }

  void differentiate(const Tensor& logits, std::int64_t token, std::int64_t first,
                     const Upstream& upstream, const Tensor& gradients) const {
    call_.check(chunk_gradient_cuda(logits_of(logits, first), after(labels_, token), ignore_index_,
                                    transform_, upstream.from(token), chunk_out(gradients),
                                    call_.stream()));
  }

  // x (tokens, D) by a factor for each token, exactly 0 where that is or the label is ignored.
  Tensor scaled(const Tensor& x, const Numbers& factor) const {
    const Tensor rows = x.reshape({tokens(), x.size(-1)}).contiguous();
    const Tensor out = at::empty_like(rows);
    if (tokens() > 0 && rows.size(1) > 0) {
      call_.check(scale_rows_cuda(rows.const_data_ptr(), dtype_of(rows.scalar_type()), tokens(),
                                  rows.size(1), factor, labels_, ignore_index_,
                                  out.mutable_data_ptr(), call_.stream()));
    }
    return out;
  }

 private:
  static constexpr std::int64_t kLogitBytes = sizeof(float);

  // The size of parts of `whole` of which `fit` fit: whole units, of one size as far as that
  // goes, for a small last part would leave most of a GPU idle.
  static std::int64_t even(std::int64_t whole, std::int64_t fit, std::int64_t unit) {
    const auto up = [](std::int64_t x, std::int64_t by) { return (x + by - 1) / by; };
    const std::int64_t most = std::max(unit, fit / unit * unit);
    if (whole <= most) return std::max<std::int64_t>(1, whole);
    const std::int64_t parts = up(whole, most);
    // Whole tiles of products where they fit.
    const std::int64_t part = up(up(whole, parts), unit) * unit, tiles = up(part, 128) * 128;
    return tiles <= most ? tiles : part;
  }

  static ChunkOut chunk_out(const Tensor& x) {
    return {x.mutable_data_ptr(), dtype_of(x.scalar_type()), x.stride(0)};
  }

  Call& call_;
  Tensor hidden_, weight_;
  OptionalTensor bias_;
  Integers labels_;
  std::int64_t ignore_index_;
  LogitTransform transform_;
  std::int64_t workspace_;
};

}  // namespace

EightTensors linear_token_logprobs(const Tensor& hidden, const Tensor& weight,
                                   const OptionalTensor& bias, const Tensor& labels,
                                   std::int64_t ignore_index, double temperature,
                                   std::optional<double> softcap, double logit_scale,
                                   std::int64_t outputs, std::int64_t keep,
                                   std::int64_t workspace) {
  Call call("linear_token_logprobs", hidden);
  const LinearHead head(call, hidden, weight, bias, labels, ignore_index,
                        transform_of(temperature, softcap, logit_scale), workspace);
  const TokenTensors result(labels, outputs);
  Tensor kept = at::empty({0}, hidden.options());
  const std::int64_t tokens = head.tokens();
  const auto keeps = static_cast<Keep>(keep);
  const std::int64_t vocabulary = head.vocabulary();
  DRRLHF_CHECK_VALUE(keeps == Keep::kNothing || keeps == Keep::kHidden || keeps == Keep::kRows,
                     "keep: expected 0, 1 or 4, got ", keep);
  if (keeps == Keep::kHidden) kept = at::empty(head.hidden().sizes(), hidden.options());
  if (keeps == Keep::kRows) {
    kept = at::zeros({tokens, LinearHead::padded(vocabulary)}, hidden.options());
  }
  const Tensor buffer = head.buffer(head.rows_at_once(), vocabulary);
  for (std::int64_t token = 0; token < tokens; token += buffer.size(0)) {
    const std::int64_t count = std::min(buffer.size(0), tokens - token);
    const Tensor space = buffer.narrow(0, 0, count), logits = space.narrow(1, 0, vocabulary);
    head.multiply(logits, token, 0);
    if (keeps == Keep::kNothing) {
      head.read(logits, token, result);
    } else if (keeps == Keep::kRows) {
      head.differentiate(logits, token, result,
                         kept.narrow(0, token, count).narrow(1, 0, vocabulary));
    } else {
      const Tensor gradients = head.as_gradient(space).narrow(1, 0, vocabulary);
      head.differentiate(logits, token, result, gradients);
      product(kept.narrow(0, token, count), gradients, weight);
    }
  }
  if (keeps == Keep::kHidden) kept = kept.view(hidden.sizes());
  return std::tuple_cat(result.tensors(), std::make_tuple(kept));
}

std::tuple<Tensor, Tensor, Tensor> linear_token_logprobs_backward(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& labels,
    const OptionalTensor& grad, const OptionalTensor& grad_entropy, const Tensor& logp,
    const Tensor& lse, const Tensor& lse_tail, const Tensor& entropy, const Tensor& kept,
    std::int64_t ignore_index, double temperature, std::optional<double> softcap,
    double logit_scale, std::int64_t keep, std::int64_t workspace, bool need_hidden,
    bool need_weight, bool need_bias) {
  Call call("linear_token_logprobs_backward", hidden);
  const LinearHead head(call, hidden, weight, bias, labels, ignore_index,
                        transform_of(temperature, softcap, logit_scale), workspace);
  const std::int64_t tokens = head.tokens(), vocabulary = head.vocabulary();
  const Upstream upstream(call, tokens, {grad, grad_entropy, logp, lse, lse_tail, entropy});
  const auto bias_options = bias.has_value() ? bias->options() : weight.options();
  Tensor d_hidden = at::empty({0}, hidden.options()), d_weight = at::empty({0}, weight.options()),
         d_bias = at::empty({0}, bias_options);
  // What the forward kept answers for the log-probs alone.
  const bool by_logp = grad.has_value() && !grad_entropy.has_value();
  const bool rows_kept = by_logp && static_cast<Keep>(keep) == Keep::kRows;
  const Tensor rows = rows_kept ? kept.narrow(1, 0, vocabulary) : Tensor();
  // Rows without an answer were kept as 0: NaN comes back by their factor, where it is asked for.
  const auto factor_of_kept = [&]() -> Numbers {
    const Tensor lost = logp.isnan().logical_and(grad->ne(0));
    return call.numbers("grad", at::where(lost, kNan, *grad), tokens);
  };

  if (need_hidden) {
    if (by_logp && static_cast<Keep>(keep) == Keep::kHidden) {
      d_hidden = head.scaled(kept, factor_of_kept());
    } else if (rows_kept) {
      const Tensor products = at::empty(head.hidden().sizes(), hidden.options());
      product(products, rows, weight);
      d_hidden = head.scaled(products, factor_of_kept());
    } else {
      d_hidden = at::empty(head.hidden().sizes(), hidden.options());
      const Tensor buffer = head.buffer(head.rows_at_once(), vocabulary);
      for (std::int64_t token = 0; token < tokens; token += buffer.size(0)) {
        const std::int64_t count = std::min(buffer.size(0), tokens - token);
        const Tensor space = buffer.narrow(0, 0, count), logits = space.narrow(1, 0, vocabulary);
        const Tensor gradients = head.as_gradient(space).narrow(1, 0, vocabulary);
        head.multiply(logits, token, 0);
        head.differentiate(logits, token, 0, upstream, gradients);
        product(d_hidden.narrow(0, token, count), gradients, weight);
      }
    }
    d_hidden = d_hidden.view(hidden.sizes());
  }
  if (!need_weight && !need_bias) return {d_hidden, d_weight, d_bias};

  if (need_weight) d_weight = at::zeros(weight.sizes(), weight.options());
  if (need_bias) d_bias = at::zeros({vocabulary}, bias_options);
  if (tokens == 0) return {d_hidden, d_weight, d_bias};
  // Columns of the vocabulary one after the other: each part of the head's gradient is summed over
  // all tokens by one product, and rounded once. 0 times NaN would be NaN, so what nobody asked
  // about is 0 in both factors.
  const auto factor = [&]() -> Numbers {
    if (rows_kept) return factor_of_kept();
    const Tensor by_grad = grad.has_value() ? grad->ne(0) : grad_entropy->ne(0);
    const Tensor asked =
        grad_entropy.has_value() ? by_grad.logical_or(grad_entropy->ne(0)) : by_grad;
    return call.numbers("grad", asked.to(at::kFloat), tokens);
  };
  const Numbers by = factor();
  const Tensor factors = head.scaled(head.hidden(), by);
  const std::int64_t width = head.columns_at_once();
  const Tensor buffer = rows_kept ? Tensor() : head.buffer(tokens, width);
  for (std::int64_t first = 0; first < vocabulary; first += width) {
    const std::int64_t count = std::min(width, vocabulary - first);
    Tensor part;
    if (rows_kept) {
      part = rows.narrow(1, first, count);
    } else {
      const Tensor logits = buffer.narrow(1, 0, count);
      part = head.as_gradient(buffer).narrow(1, 0, count);
      head.multiply(logits, 0, first);
      head.differentiate(logits, 0, first, upstream, part);
    }
    if (need_weight) {
      product(d_weight.narrow(0, first, count), part.t(), factors);
    }
    if (need_bias) {
      const Tensor terms = rows_kept ? head.scaled(part, by) : part;
      d_bias.narrow(0, first, count).copy_(at::sum(terms, {0}, false, at::kFloat));
    }
  }
  return {d_hidden, d_weight, d_bias};
}

}  // namespace drrlhf::cuda
