// The ops on a GPU: argument checks that need no answer from the device, outputs, launches on the
// current stream. Nothing here waits for the device.
//
// Compiled with DRRLHF_EMULATED, for tests, the same text serves CPU tensors (tests/emulated).
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <mutex>

#include "cuda/kernels.h"
#include "cuda/linear_token_logprobs.h"
#include "cuda/tensor_arguments.h"
#include "message.h"
#include "names.h"

namespace drrlhf {
namespace {

using namespace cuda;

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
  // Tokens of no sequence at all have no gradient; wrong boundaries of some make all of them NaN.
  const Tensor out = q.count > 0 ? at::empty(labels.sizes(), grad.options())
                                 : at::zeros(labels.sizes(), grad.options());
  if (q.tokens > 0 && q.count > 0) {
    call.check(sequence_logprobs_backward_cuda(call.numbers("grad", grad, q.count), q, mean,
                                               out_of(out), call.stream()));
  }
  return out;
}

SevenTensors token_logprobs(const Tensor& logits, const Tensor& labels, std::int64_t ignore_index,
                            double temperature, std::optional<double> softcap,
                            std::int64_t outputs) {
  Call call("token_logprobs", logits);
  const std::vector<RowBlock> blocks = row_blocks("logits", logits);
  const TokenTensors result(labels, outputs);
  if (labels.numel() == 0) return result.tensors();
  const Integers y = call.integers("labels", labels, logits.numel() / logits.size(-1));
  for (const RowBlock& block : blocks) {
    call.check(token_logprobs_cuda(logits_of(block.rows), after(y, block.first), ignore_index,
                                   transform_of(temperature, softcap, 1.0),
                                   result.from(block.first), call.stream()));
  }
  return result.tensors();
}

// Into `out` (n, V), or over the logits where it is undefined.
void token_gradient(const Tensor& logits, const Tensor& labels, const GivenUpstream& given,
                    std::int64_t ignore_index, double temperature, std::optional<double> softcap,
                    const Tensor& out) {
  Call call("token_logprobs_backward", logits);
  const std::vector<RowBlock> blocks = row_blocks("logits", logits);
  if (logits.numel() == 0) return;
  const std::int64_t n = logits.numel() / logits.size(-1);
  const Upstream upstream(call, n, given);
  const Integers y = call.integers("labels", labels, n);
  for (const auto& [rows, of, first] : blocks) {
    const Tensor to = out.defined() ? out.narrow(0, first, rows.size(0)) : rows;
    call.check(token_logprobs_backward_cuda(
        logits_of(rows), after(y, first), ignore_index, transform_of(temperature, softcap, 1.0),
        upstream.from(first), to.mutable_data_ptr(), to.stride(0), call.stream()));
    const bool copied = rows.const_data_ptr() != of.const_data_ptr();
    if (!out.defined() && copied) of.copy_(rows.view(of.sizes()));
  }
}

Tensor token_logprobs_backward(const Tensor& logits, const Tensor& labels,
                               const OptionalTensor& grad, const OptionalTensor& grad_entropy,
                               const Tensor& logp, const Tensor& lse, const Tensor& lse_tail,
                               const Tensor& entropy, std::int64_t ignore_index, double temperature,
                               std::optional<double> softcap) {
  const Tensor out = at::empty(logits.sizes(), logits.options());
  token_gradient(logits, labels, {grad, grad_entropy, logp, lse, lse_tail, entropy}, ignore_index,
                 temperature, softcap, out.view({-1, logits.size(-1)}));
  return out;
}

void token_logprobs_backward_(Tensor logits, const Tensor& labels, const OptionalTensor& grad,
                              const OptionalTensor& grad_entropy, const Tensor& logp,
                              const Tensor& lse, const Tensor& lse_tail, const Tensor& entropy,
                              std::int64_t ignore_index, double temperature,
                              std::optional<double> softcap) {
  token_gradient(logits, labels, {grad, grad_entropy, logp, lse, lse_tail, entropy}, ignore_index,
                 temperature, softcap, Tensor());
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
  m.impl("linear_token_logprobs", &drrlhf::cuda::linear_token_logprobs);
  m.impl("linear_token_logprobs_backward", &drrlhf::cuda::linear_token_logprobs_backward);
}
