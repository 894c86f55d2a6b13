// The ops on a GPU: argument checks that need no answer from the device, outputs, launches on the
// current stream. Nothing here waits for the device.
//
// Compiled with DRRLHF_EMULATED, for tests, the same text serves CPU tensors (tests/emulated).
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <deque>
#include <mutex>

#include "cuda/kernels.h"
#include "message.h"
#include "names.h"

#if !defined(DRRLHF_EMULATED)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace drrlhf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    default:
      return Dtype::kNone;
  }
}

at::ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

NumbersOut out_of(const Tensor& x) { return {x.mutable_data_ptr(), dtype_of(x.scalar_type())}; }

// One call of an op: the device of its first tensor, the stream, and what must live until the
// launch. The allocator hands memory out in the order of the stream, so not longer.
class Call {
 public:
  Call(const char* op, const Tensor& first)
      : op_(op),
        device_(first.device()),
#if defined(DRRLHF_EMULATED)
        stream_(nullptr) {
  }
#else
        guard_(first.device()),
        stream_(c10::cuda::getCurrentCUDAStream(first.device().index()).stream()) {
  }
#endif

  Stream stream() const { return stream_; }

  void check(Failure failure) const {
    DRRLHF_CHECK(failure == nullptr, op_, ": the kernel could not be launched: ", failure);
  }

  const Tensor& contiguous(const char* name, const Tensor& x) {
    DRRLHF_CHECK_VALUE(x.device() == device_, name, ": expected it on ", device_, ", got ",
                       x.device());
    return held_.emplace_back(x.contiguous());
  }

  // n numbers of a floating dtype; others are converted.
  Numbers numbers(const char* name, const Tensor& x, std::int64_t n) {
    DRRLHF_CHECK_VALUE(x.numel() == n, name, ": expected ", n, " numbers, got shape ", x.sizes());
    const bool known = dtype_of(x.scalar_type()) != Dtype::kNone;
    const Tensor& held = contiguous(name, known ? x : x.to(at::kDouble));
    return {held.const_data_ptr(), dtype_of(held.scalar_type())};
  }

  Numbers numbers(const char* name, const OptionalTensor& x, std::int64_t n) {
    return x.has_value() ? numbers(name, *x, n) : Numbers{nullptr, Dtype::kNone};
  }

  Integers integers(const char* name, const Tensor& x, std::int64_t n) {
    DRRLHF_CHECK_VALUE(x.numel() == n, name, ": expected ", n, " integers, got shape ", x.sizes());
    const bool known = x.scalar_type() == at::kLong || x.scalar_type() == at::kInt;
    const Tensor& held = contiguous(name, known ? x : x.to(at::kLong));
    return {held.const_data_ptr(), held.scalar_type() == at::kLong};
  }

  // float32 (n,) contiguous.
  const float* floats(const char* name, const Tensor& x, std::int64_t n) {
    DRRLHF_CHECK_VALUE(x.numel() == n, name, ": expected ", n, " numbers, got shape ", x.sizes());
    return contiguous(name, x.to(at::kFloat)).const_data_ptr<float>();
  }

 private:
  const char* op_;
  at::Device device_;
#if !defined(DRRLHF_EMULATED)
  c10::cuda::CUDAGuard guard_;
#endif
  Stream stream_;
  std::deque<Tensor> held_;
  // Kernels run on plain tensors: autocast must not narrow a product.
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

// Of the current device; asked for once.
int blocks_of_device(const at::Device& device) {
  static std::mutex mutex;
  static std::array<int, 128> known{};
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known.at(static_cast<std::size_t>(device.has_index() ? device.index() : 0));
  if (blocks == 0) blocks = cooperative_blocks();
  DRRLHF_CHECK(blocks > 0, "drrlhf: the CUDA device does not say how many blocks it runs at once");
  return blocks;
}

// The set, nominal weights and groups of a call, and its workspace on the device.
struct SolverArguments {
  CudaAdversary adversary;
  Workspace workspace;
  Tensor after;
};

SolverArguments solver_arguments(Call& call, const Tensor& like, const OptionalTensor& nominal,
                                 const OptionalTensor& groups, const OptionalTensor& group_weights,
                                 std::int64_t n, const Ambiguity& set) {
  SolverArguments result = {};
  CudaAdversary& adversary = result.adversary;
  adversary.set = set;
  adversary.nominal = call.numbers("nominal", nominal, n);
  const auto doubles = like.options().dtype(at::kDouble);
  result.after = at::empty({0}, doubles);
  if (adversary.set.kind == Kind::kGroup) {
    DRRLHF_CHECK_VALUE(groups.has_value() && group_weights.has_value(),
                       "groups: Group needs group ids and group weights");
    const Tensor& before = call.contiguous("group_weights", group_weights->to(at::kDouble));
    result.after = n > 0 ? at::empty_like(before) : before.clone();
    adversary.groups = call.integers("groups", *groups, n);
    adversary.before = before.const_data_ptr<double>();
    adversary.after = result.after.mutable_data_ptr<double>();
    adversary.num_groups = static_cast<int>(before.numel());
  }
  result.workspace.blocks = n > kOneBlockPairs ? blocks_of_device(like.device()) : 0;
  const std::int64_t bytes = scratch_bytes(n, adversary.num_groups, result.workspace.blocks);
  result.workspace.scratch =
      call.contiguous("scratch", at::empty({bytes}, like.options().dtype(at::kByte)))
          .mutable_data_ptr();
  return result;
}

// value (), dual () and weights (n,), each with memory of its own.
struct Answer {
  Tensor value, weights, dual;

  Answer(const Tensor& like, std::int64_t n) {
    const auto options = like.options().dtype(statistics_dtype(like));
    value = n > 0 ? at::empty({}, options) : at::zeros({}, options);
    dual = n > 0 ? at::empty({}, options) : at::zeros({}, options);
    weights = at::empty({n}, options);
  }

  SolutionOut out() const { return {out_of(value), out_of(weights), out_of(dual)}; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> robust_risk(
    const Tensor& losses, const OptionalTensor& nominal, const OptionalTensor& groups,
    const OptionalTensor& group_weights, std::string_view kind, double parameter,
    double temperature, double trim, bool update) {
  Call call("robust_risk", losses);
  const std::int64_t n = losses.numel();
  const SolverArguments s = solver_arguments(call, losses, nominal, groups, group_weights, n,
                                             ambiguity(kind, parameter, temperature, trim, update));
  const Answer answer(losses, n);
  if (n > 0) {
    call.check(robust_risk_cuda(call.numbers("losses", losses, n), n, s.adversary, answer.out(),
                                s.workspace, call.stream()));
  }
  return {answer.value, answer.weights, answer.dual, s.after};
}

Sequences sequences_of(Call& call, const Tensor& labels, const OptionalTensor& cu_seqlens,
                       std::int64_t ignore_index) {
  Sequences q = {};
  q.tokens = labels.numel();
  q.ignore_index = ignore_index;
  q.labels = call.integers("labels", labels, q.tokens);
  if (cu_seqlens.has_value()) {
    DRRLHF_CHECK_VALUE(cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1 && labels.dim() == 1,
                       "cu_seqlens: expected shape (S+1,) and labels (T,), got ",
                       cu_seqlens->sizes(), " and ", labels.sizes());
    q.boundaries = call.integers("cu_seqlens", *cu_seqlens, cu_seqlens->numel());
    q.count = cu_seqlens->numel() - 1;
  } else {
    DRRLHF_CHECK_VALUE(labels.dim() == 2, "labels: expected padded (B, L), got ", labels.sizes(),
                       "; packed (T,) needs cu_seqlens");
    q.count = labels.size(0);
    q.length = labels.size(1);
  }
  return q;
}

using NineTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors sequence_preference_loss(const Tensor& logps, const Tensor& labels,
                                     const OptionalTensor& cu_seqlens, const Tensor& ref_logps,
                                     const OptionalTensor& nominal, const OptionalTensor& groups,
                                     const OptionalTensor& group_weights, std::int64_t ignore_index,
                                     double beta, double label_smoothing, std::string_view kind,
                                     double parameter, double temperature, double trim,
                                     bool update) {
  Call call("sequence_preference_loss", logps);
  const Sequences q = sequences_of(call, labels, cu_seqlens, ignore_index);
  DRRLHF_CHECK_VALUE(q.count % 2 == 0, "labels: expected an even number of stacked sequences, got ",
                     q.count);
  const std::int64_t n = q.count / 2;
  const SolverArguments s = solver_arguments(call, logps, nominal, groups, group_weights, n,
                                             ambiguity(kind, parameter, temperature, trim, update));
  const Answer answer(logps, n);
  const auto fresh = [&] { return at::empty_like(answer.weights); };
  const Tensor losses = fresh(), chosen_rewards = fresh(), rejected_rewards = fresh();
  const Tensor sums = at::empty({2 * n}, answer.weights.options()), d_sums = at::empty_like(sums);
  if (n > 0) {
    const PairOut pairs = {out_of(losses), out_of(chosen_rewards), out_of(rejected_rewards),
                           out_of(sums), out_of(d_sums)};
    call.check(sequence_preference_loss_cuda(
        call.numbers("logps", logps, q.tokens), q, call.numbers("ref_logps", ref_logps, q.count), n,
        {beta, label_smoothing}, s.adversary, answer.out(), pairs, s.workspace, call.stream()));
  }
  return {answer.value, answer.weights, losses, chosen_rewards, rejected_rewards,
          answer.dual,  s.after,        sums,   d_sums};
}

Tensor sequence_logprobs(const Tensor& logps, const Tensor& labels,
                         const OptionalTensor& cu_seqlens, std::int64_t ignore_index, bool mean) {
  Call call("sequence_logprobs", logps);
  const Sequences q = sequences_of(call, labels, cu_seqlens, ignore_index);
  const Tensor out = at::empty({q.count}, logps.options().dtype(statistics_dtype(logps)));
  if (q.count > 0) {
    call.check(sequence_logprobs_cuda(call.numbers("logps", logps, q.tokens), q, mean, out_of(out),
                                      call.stream()));
  }
  return out;
}

Tensor sequence_logprobs_backward(const Tensor& grad, const Tensor& labels,
                                  const OptionalTensor& cu_seqlens, std::int64_t ignore_index,
                                  bool mean) {
  Call call("sequence_logprobs_backward", grad);
  const Sequences q = sequences_of(call, labels, cu_seqlens, ignore_index);
  const Tensor out = at::empty(labels.sizes(), grad.options());
  if (q.tokens > 0 && q.count > 0) {
    call.check(sequence_logprobs_backward_cuda(call.numbers("grad", grad, q.count), q, mean,
                                               out_of(out), call.stream()));
  }
  return out;
}

// Bits of `outputs`, as drrlhf.reference has them.
enum Output : std::int64_t { kEntropy = 1, kMean = 2, kIsTop1 = 4, kLogSumSquares = 8 };

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Statistics by token, (...) each, as the labels are; empty where not asked for.
struct TokenTensors {
  Tensor logp, lse, lse_tail, entropy, mean, is_top1, log_sum_squares;

  TokenTensors(const Tensor& labels, std::int64_t outputs) {
    const auto floats = labels.options().dtype(at::kFloat);
    const auto asked = [&](Output output, at::ScalarType dtype = at::kFloat) {
      const auto options = labels.options().dtype(dtype);
      return outputs & output ? at::empty(labels.sizes(), options) : at::empty({0}, options);
    };
    logp = at::empty(labels.sizes(), floats);
    lse = at::empty(labels.sizes(), floats);
    lse_tail = at::empty(labels.sizes(), floats);
    entropy = asked(kEntropy);
    mean = asked(kMean);
    is_top1 = asked(kIsTop1, at::kBool);
    log_sum_squares = asked(kLogSumSquares);
  }

  // From token `first` on.
  TokenOut from(std::int64_t first) const {
    const auto at = [&](const Tensor& x) {
      return x.numel() > 0 ? x.mutable_data_ptr<float>() + first : nullptr;
    };
    return {at(logp),
            at(lse),
            at(lse_tail),
            at(entropy),
            at(mean),
            at(log_sum_squares),
            is_top1.numel() > 0 ? is_top1.mutable_data_ptr<bool>() + first : nullptr};
  }

  SevenTensors tensors() const {
    return {logp, lse, lse_tail, entropy, mean, is_top1, log_sum_squares};
  }
};

LogitTransform transform_of(double temperature, std::optional<double> softcap, double scale) {
  return {static_cast<float>(scale), static_cast<float>(softcap.value_or(0.0)),
          static_cast<float>(1.0 / temperature)};
}

// x (..., V), V >= 1, as (n, V) with neighbouring entries; a view where there is one.
Tensor as_rows(const char* name, const Tensor& x) {
  DRRLHF_CHECK_VALUE(x.dim() >= 1 && x.size(-1) >= 1, name,
                     ": expected a last dimension of at least 1, got ", x.sizes());
  const Tensor rows = x.reshape({-1, x.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

Logits logits_of(const Tensor& rows, std::int64_t first = 0) {
  const Dtype dtype = dtype_of(rows.scalar_type());
  DRRLHF_CHECK_VALUE(dtype != Dtype::kNone && dtype != Dtype::kDouble,
                     "logits: expected float32, bfloat16 or float16, got ", rows.scalar_type());
  DRRLHF_CHECK_VALUE(rows.size(0) < std::int64_t(1) << 31,
                     "logits: expected fewer than 2^31 rows, ", "got ", rows.size(0),
                     "; split the batch");
  return {rows.const_data_ptr(), dtype, rows.size(0), rows.size(1), rows.stride(0), first};
}

SevenTensors token_logprobs(const Tensor& logits, const Tensor& labels, std::int64_t ignore_index,
                            double temperature, std::optional<double> softcap,
                            std::int64_t outputs) {
  Call call("token_logprobs", logits);
  const Tensor x = as_rows("logits", logits);
  const TokenTensors result(labels, outputs);
  if (labels.numel() > 0) {
    call.check(token_logprobs_cuda(logits_of(x), call.integers("labels", labels, x.size(0)),
                                   ignore_index, transform_of(temperature, softcap, 1.0),
                                   result.from(0), call.stream()));
  }
  return result.tensors();
}

// Upstream gradients and statistics of all tokens.
struct Upstream {
  Numbers grad, grad_entropy;
  const float *logp, *lse, *lse_tail, *entropy;

  Upstream(Call& call, std::int64_t n, const OptionalTensor& g, const OptionalTensor& g_entropy,
           const Tensor& logp_, const Tensor& lse_, const Tensor& tail_, const Tensor& entropy_)
      : grad(call.numbers("grad", g, n)),
        grad_entropy(call.numbers("grad_entropy", g_entropy, n)),
        logp(call.floats("logp", logp_, n)),
        lse(call.floats("lse", lse_, n)),
        lse_tail(call.floats("lse_tail", tail_, n)),
        entropy(g_entropy.has_value() ? call.floats("entropy", entropy_, n) : nullptr) {}

  // From token `first` on.
  TokenGrad from(std::int64_t first) const {
    return {after(grad, first), after(grad_entropy, first),
            logp + first,       lse + first,
            lse_tail + first,   entropy == nullptr ? nullptr : entropy + first};
  }

  static Numbers after(const Numbers& x, std::int64_t first) {
    constexpr std::array<std::int64_t, 5> kBytes = {0, 4, 8, 2, 2};
    const auto bytes = first * kBytes[static_cast<std::size_t>(x.dtype)];
    return {static_cast<const char*>(x.data) + bytes, x.dtype};
  }
};

Integers after(const Integers& x, std::int64_t first) {
  return {static_cast<const char*>(x.data) + first * (x.wide ? 8 : 4), x.wide};
}

void token_gradient(const Tensor& logits, const Tensor& labels, const OptionalTensor& grad,
                    const OptionalTensor& grad_entropy, const Tensor& logp, const Tensor& lse,
                    const Tensor& lse_tail, const Tensor& entropy, std::int64_t ignore_index,
                    double temperature, std::optional<double> softcap, const Tensor& x,
                    const Tensor& out) {
  Call call("token_logprobs_backward", logits);
  const std::int64_t n = x.size(0);
  if (n == 0) return;
  const Upstream upstream(call, n, grad, grad_entropy, logp, lse, lse_tail, entropy);
  call.check(token_logprobs_backward_cuda(logits_of(x), call.integers("labels", labels, n),
                                          ignore_index, transform_of(temperature, softcap, 1.0),
                                          upstream.from(0), out.mutable_data_ptr(), out.stride(0),
                                          call.stream()));
}

Tensor token_logprobs_backward(const Tensor& logits, const Tensor& labels,
                               const OptionalTensor& grad, const OptionalTensor& grad_entropy,
                               const Tensor& logp, const Tensor& lse, const Tensor& lse_tail,
                               const Tensor& entropy, std::int64_t ignore_index, double temperature,
                               std::optional<double> softcap) {
  const Tensor out = at::empty(logits.sizes(), logits.options());
  token_gradient(logits, labels, grad, grad_entropy, logp, lse, lse_tail, entropy, ignore_index,
                 temperature, softcap, as_rows("logits", logits), out.view({-1, logits.size(-1)}));
  return out;
}

void token_logprobs_backward_(Tensor logits, const Tensor& labels, const OptionalTensor& grad,
                              const OptionalTensor& grad_entropy, const Tensor& logp,
                              const Tensor& lse, const Tensor& lse_tail, const Tensor& entropy,
                              std::int64_t ignore_index, double temperature,
                              std::optional<double> softcap) {
  const Tensor x = as_rows("logits", logits);
  token_gradient(logits, labels, grad, grad_entropy, logp, lse, lse_tail, entropy, ignore_index,
                 temperature, softcap, x, x);
  if (x.const_data_ptr() != logits.const_data_ptr()) logits.copy_(x.view(logits.sizes()));
}

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

// The head's ops, on the library's products: a slab of float32 logits, a kernel that turns it into
// gradients of the head's dtype in place, and the next product.
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

  // Room for logits of `rows` tokens and `columns` entries of the vocabulary, rows on whole loads.
  Tensor room(std::int64_t rows, std::int64_t columns) const {
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
    call_.check(softmax_slab_cuda(logits_of(logits), after(labels_, token), ignore_index_,
                                  transform_, out.from(token), slab_out(gradients),
                                  call_.stream()));
  }

  void differentiate(const Tensor& logits, std::int64_t token, std::int64_t first,
                     const Upstream& upstream, const Tensor& gradients) const {
    call_.check(slab_gradient_cuda(logits_of(logits, first), after(labels_, token), ignore_index_,
                                   transform_, upstream.from(token), slab_out(gradients),
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

  // The size of parts of `whole` of which `fit` have room: whole units, of one size as far as that
  // goes, for a small last part would leave most of a GPU idle.
  static std::int64_t even(std::int64_t whole, std::int64_t fit, std::int64_t unit) {
    const auto up = [](std::int64_t x, std::int64_t by) { return (x + by - 1) / by; };
    const std::int64_t most = std::max(unit, fit / unit * unit);
    if (whole <= most) return std::max<std::int64_t>(1, whole);
    const std::int64_t parts = up(whole, most);
    // Whole tiles of products where the room is there.
    const std::int64_t part = up(up(whole, parts), unit) * unit, tiles = up(part, 128) * 128;
    return tiles <= most ? tiles : part;
  }

  static SlabOut slab_out(const Tensor& x) {
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
  const Tensor room = head.room(head.rows_at_once(), vocabulary);
  for (std::int64_t token = 0; token < tokens; token += room.size(0)) {
    const std::int64_t count = std::min(room.size(0), tokens - token);
    const Tensor space = room.narrow(0, 0, count), logits = space.narrow(1, 0, vocabulary);
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
  const Upstream upstream(call, tokens, grad, grad_entropy, logp, lse, lse_tail, entropy);
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
      const Tensor room = head.room(head.rows_at_once(), vocabulary);
      for (std::int64_t token = 0; token < tokens; token += room.size(0)) {
        const std::int64_t count = std::min(room.size(0), tokens - token);
        const Tensor space = room.narrow(0, 0, count), logits = space.narrow(1, 0, vocabulary);
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
  const Tensor room = rows_kept ? Tensor() : head.room(tokens, width);
  for (std::int64_t first = 0; first < vocabulary; first += width) {
    const std::int64_t count = std::min(width, vocabulary - first);
    Tensor part;
    if (rows_kept) {
      part = rows.narrow(1, first, count);
    } else {
      const Tensor logits = room.narrow(1, 0, count);
      part = head.as_gradient(room).narrow(1, 0, count);
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

}  // namespace
}  // namespace drrlhf

#if defined(DRRLHF_EMULATED)
TORCH_LIBRARY_IMPL(drrlhf_emulated, CPU, m) {
#else
TORCH_LIBRARY_IMPL(drrlhf_cpp, CUDA, m) {
#endif
  m.impl("robust_risk", &drrlhf::robust_risk);
  m.impl("sequence_preference_loss", &drrlhf::sequence_preference_loss);
  m.impl("sequence_logprobs", &drrlhf::sequence_logprobs);
  m.impl("sequence_logprobs_backward", &drrlhf::sequence_logprobs_backward);
  m.impl("token_logprobs", &drrlhf::token_logprobs);
  m.impl("token_logprobs_backward", &drrlhf::token_logprobs_backward);
  m.impl("token_logprobs_backward_", &drrlhf::token_logprobs_backward_);
  m.impl("linear_token_logprobs", &drrlhf::linear_token_logprobs);
  m.impl("linear_token_logprobs_backward", &drrlhf::linear_token_logprobs_backward);
}
