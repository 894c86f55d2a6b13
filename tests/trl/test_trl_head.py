"""Our output head in TRL's place: its contract, TRL's trainers with and without it, its seat."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("trl")

from trl_fixtures import (  # isort: skip  (first: it settles the environment)
    quiet,
    tiny_llama_dir,
    tiny_pairs,
    tiny_tokenizer,
)

import steps
import torch
import trl
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, HfArgumentParser
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils

import drrlhf.trl as ours
from drrlhf import backends
from drrlhf.trl import head, patch_head, seam, unpatch_head
from drrlhf.trl.head import TokenLogprobHead

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
CHUNK = utils._CHUNKED_LOGPROB_CHUNK_SIZE
TRLS = (ChunkedLogProbFunction, chunked_logprob._use_triton)


def seat():
    return tuple(getattr(utils, name) for name in seam.HEAD_NAMES)


@pytest.fixture(autouse=True)
def left_as_found():
    """No test and no trainer may leave the names replaced."""
    assert seat() == TRLS
    yield
    assert seat() == TRLS
    assert not head._patches


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny_llama_dir(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of our head: dicts of rows, and whether the weight is trained."""
    seen = []
    apply = TokenLogprobHead.apply

    def spy(self, hidden, weight, *rest):
        seen.append({"rows": len(hidden), "trained": weight.requires_grad, "head": self})
        return apply(self, hidden, weight, *rest)

    monkeypatch.setattr(TokenLogprobHead, "apply", spy)
    return seen


# ---------------------------------------------------------------------------------- the contract


class Problem:
    """N tokens; every second target is the model's own first choice, as in a tuned model."""

    def __init__(self, n=48, v=300, d=32, bias=True):
        generator = torch.Generator().manual_seed(n)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.hidden, self.weight = normal(n, d), 0.5 * normal(v, d)
        self.bias = normal(v) if bias else None
        self.targets = torch.randint(0, v, (n,), generator=generator)
        if n:
            self.targets[::2] = (self.hidden @ self.weight.T).argmax(1)[::2]
        self.upstream, self.upstream_entropy = normal(n), normal(n)

    def run(self, function, dtypes=(torch.float32,) * 3, frozen=False, autocast=False, **options):
        """(the five outputs, the gradients) of `function.apply`."""
        values = [self.hidden, self.weight, self.bias]
        inputs = [
            None if x is None else x.to(dtype).requires_grad_()
            for x, dtype in zip(values, dtypes, strict=True)
        ]
        if frozen:
            inputs[1].requires_grad_(False)
        options = {"temperature": 1.0, "chunk_size": CHUNK} | options
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = function.apply(*inputs, self.targets, *options.values())
        total = (found[0] * self.upstream).sum()
        if found[1] is not None:
            total = total + (found[1] * self.upstream_entropy).sum()
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        return found, torch.autograd.grad(total, wanted)


class ExactHead:
    """The same by float64 in plain PyTorch, from what autocast makes of the inputs."""

    @staticmethod
    def apply(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        softcap=None,
        scale=1.0,
        outputs=seam.HEAD_OUTPUTS,
    ):
        if torch.is_autocast_enabled("cpu"):
            hidden, weight = (x.to(torch.get_autocast_dtype("cpu")) for x in (hidden, weight))
        with torch.autocast("cpu", enabled=False):
            z = hidden.double() @ weight.double().T
            if bias is not None:
                z = z + bias.double()
            z = z * scale
            z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
            logp = z.log_softmax(-1)
            p = logp.exp()
            return (
                logp.gather(1, targets.unsqueeze(1)).squeeze(1).float(),
                -(p * logp).sum(1).float(),
                p.square().sum(1).log().float().detach(),
                z.mean(1).float().detach(),
                z.argmax(1) == targets,
            )


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"temperature": 1.3, "chunk_size": CHUNK, "final_logit_softcapping": 3.0},
    "scale": {
        "temperature": 0.9,
        "chunk_size": 64,
        "final_logit_softcapping": None,
        "logit_scale": 0.3,
    },
    "all": {"temperature": 2, "chunk_size": 100, "final_logit_softcapping": 30, "logit_scale": 4.0},
}


def relative_error(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()


def assert_same_gradients(mine, theirs, rounding=5e-6):
    for found, expected in zip(mine, theirs, strict=True):
        assert found.dtype == expected.dtype
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding * scale)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float32_is_trls(options, bias):
    problem = Problem(bias=bias)
    found, gradients = problem.run(TokenLogprobHead(), **options)
    expected, their_gradients = problem.run(ChunkedLogProbFunction, **options)
    for mine, theirs in zip(found[:4], expected[:4], strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=5e-6)
    assert found[4].dtype == torch.bool and torch.equal(found[4], expected[4])
    assert 0 < found[4].sum() < len(found[4])
    assert_same_gradients(gradients, their_gradients, rounding=1e-5)
    assert [x.requires_grad for x in found] == [True, True, False, False, False]
    problem = Problem(n=256, bias=bias)  # of few tokens, single roundings decide
    heads = TokenLogprobHead(), ChunkedLogProbFunction, ExactHead
    for mine, theirs, best in zip(*(problem.run(h, **options)[1] for h in heads), strict=True):
        assert relative_error(mine, best) <= 2 * relative_error(theirs, best)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_autocast_is_no_worse_than_trls(options, hidden_dtype):
    """TRL rounds the logits to bfloat16, ours does not: nearer to float64 in every output."""
    problem = Problem(n=256)
    types = (hidden_dtype, torch.float32, torch.float32)
    exact, mine, theirs = (
        problem.run(function, types, autocast=True, **options)
        for function in (ExactHead, TokenLogprobHead(), ChunkedLogProbFunction)
    )
    for got, want, other in zip(mine[0][:4], exact[0][:4], theirs[0][:4], strict=True):
        assert relative_error(got, want) <= 1e-5 < relative_error(other, want)
    assert torch.equal(mine[0][4], exact[0][4])
    for got, want, other in zip(mine[1], exact[1], theirs[1], strict=True):
        assert got.dtype == other.dtype
        # ours are rounded once to autocast's dtype, as those of any product under autocast
        rounded = other.to(torch.bfloat16) if got is not mine[1][-1] else other
        assert relative_error(got, want) <= relative_error(rounded, want)


def test_a_head_of_another_dtype_follows_the_hidden_states():
    """cast_lm_head_to_fp32 hands over float32 hidden states and a bfloat16 head, no autocast."""
    problem = Problem()
    types = (torch.float32, torch.bfloat16, torch.float32)
    found, gradients = problem.run(TokenLogprobHead(), types)
    expected, their_gradients = problem.run(ChunkedLogProbFunction, types)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=5e-6)
    assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16, torch.float32]
    for mine, theirs in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_frozen_head():
    problem = Problem(bias=False)
    _, mine = problem.run(TokenLogprobHead(), frozen=True)
    _, theirs = problem.run(ChunkedLogProbFunction, frozen=True)
    assert len(mine) == 1
    assert_same_gradients(mine, theirs)


@pytest.mark.parametrize("budget", [None, 0, 2**30])
def test_the_budget_arrives_and_does_not_change_numbers(monkeypatch, budget):
    given, function = [], head.linear_token_logprobs

    def spy(*arguments, **options):
        given.append(options["memory_budget"])
        return function(*arguments, **options)

    monkeypatch.setattr(head, "linear_token_logprobs", spy)
    problem = Problem()
    (logps, *_), gradients = problem.run(TokenLogprobHead(budget))
    assert given == [budget]
    (expected, *_), their_gradients = problem.run(ChunkedLogProbFunction)
    torch.testing.assert_close(logps, expected, rtol=2e-6, atol=5e-6)
    assert_same_gradients(gradients, their_gradients)


@pytest.mark.parametrize(
    "outputs",
    [
        (),
        ("log_probs",),
        ("log_probs", "entropy"),
        ("mean_logits", "is_top1"),
        ("log_probs", "log_sum_sq_probs"),
        ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ],
    ids="-".join,
)
def test_outputs_asked_for(outputs):
    problem = Problem()
    options = {"temperature": 1.0, "chunk_size": CHUNK, "softcap": None, "scale": 1.0}
    options["outputs"] = outputs
    found, _ = problem.run(TokenLogprobHead(), **options)
    expected, _ = problem.run(ChunkedLogProbFunction, **options)
    assert [x is None for x in found] == [x is None for x in expected]
    for mine, theirs in zip(found, expected, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=5e-6)


def test_no_rows():
    found, gradients = Problem(n=0).run(TokenLogprobHead())
    assert all(x.shape == (0,) for x in found)
    assert all((g == 0).all() for g in gradients) and gradients[1].shape == (300, 32)


def test_refusals():
    problem = Problem()
    base = {"temperature": 1.0, "chunk_size": CHUNK, "softcap": None, "scale": 1.0}
    with pytest.raises(ValueError, match="outputs: unknown 'entropies'"):
        problem.run(TokenLogprobHead(), **base, outputs=("entropies",))
    with pytest.raises(ValueError, match="softcap: expected a finite number > 0"):
        problem.run(TokenLogprobHead(), **(base | {"softcap": 0.0}))
    for bad in (-1, 300):
        problem.targets[3] = bad
        with pytest.raises(ValueError, match=rf"labels: expected values in \[0, 300\).*got {bad}"):
            problem.run(TokenLogprobHead())


def test_a_cast_head_is_read_again_and_not_stale():
    problem = Problem()
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logps, *_ = TokenLogprobHead().apply(hidden, weight, None, problem.targets, 1.0, CHUNK)
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified in place between its forward and its back"):
        logps.sum().backward()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_parameters_gathered_for_the_moment(monkeypatch, frozen, autocast):
    """DeepSpeed ZeRO-3: outside TRL's gathering context a parameter is empty, backward included."""
    problem = Problem()
    whole = [problem.weight, problem.bias]
    parameters = [torch.nn.Parameter(x.clone(), requires_grad=not frozen) for x in whole]
    for p in parameters:
        p.ds_status = "NOT_AVAILABLE"

    @contextlib.contextmanager
    def gather(*given):
        given = [p for p in given if p is not None and p.ds_status != "AVAILABLE"]
        for p in given:
            p.data = next(w for w, q in zip(whole, parameters, strict=True) if q is p).clone()
            p.ds_status = "AVAILABLE"
        yield
        for p in given:
            p.data, p.ds_status = torch.empty(0), "NOT_AVAILABLE"

    def gradients(function):
        with gather(*parameters):
            pass
        hidden = problem.hidden.clone().requires_grad_()
        with gather(*parameters), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = function.apply(hidden, *parameters, problem.targets, 1.0, CHUNK)
        assert all(p.numel() == 0 for p in parameters)
        # not .backward(): DeepSpeed's own hooks are what accumulates into a partitioned parameter
        inputs = [hidden] if frozen else [hidden, *parameters]
        return torch.autograd.grad((found[0] * problem.upstream + found[1]).sum(), inputs)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    tolerance = 2e-2 if autocast else 2e-6
    for mine, theirs in zip(
        gradients(TokenLogprobHead()), gradients(ChunkedLogProbFunction), strict=True
    ):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


# -------------------------------------------------------------------- models with TRL's fused head


def test_models_prepared_before_use_it_and_only_counted_tokens_go_in(llama, calls):
    model = AutoModelForCausalLM.from_pretrained(llama)
    utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", *seam.HEAD_OUTPUTS))
    ids = torch.randint(6, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(12) < 7, -100)

    def run():
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss + 0.1 * out.entropy.sum()).backward()
        return out, torch.cat([p.grad.flatten() for p in model.parameters()])

    expected, theirs = run()
    assert not calls
    with patch_head():
        found, mine = run()
    assert [call["rows"] for call in calls] == [3 * 5]
    for name in ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=2e-6, atol=5e-6
        )
    torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-6 * theirs.abs().max().item())
    again, _ = run()
    assert len(calls) == 1 and torch.equal(again.log_probs, expected.log_probs)


def test_a_batch_without_a_counted_token(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    utils.add_fused_lm_head(model)
    ids = torch.full((2, 5), 7)
    with patch_head():
        out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
        out.loss.backward()
    assert out.loss == 0 and (out.log_probs == 0).all()
    assert all((p.grad == 0).all() for p in model.parameters())


# ---------------------------------------------------------------------------------- TRL's trainers


def train_dpo(llama, tmp_path, library=trl, patched=False, lora=False, **options):
    """The logged losses (float64) of a short DPO run, and its trainer."""
    # AdamW would turn a gradient's last digit into a full step of a parameter
    sgd = {"optim": "sgd", "learning_rate": 0.5 if lora else 0.1}
    # the head's calls are counted: without those of a probe
    own = {} if library is trl else {"share_prompts": False}
    options = {"max_steps": 20} | sgd | own | options
    with patch_head() if patched else contextlib.nullcontext():
        trainer = library.DPOTrainer(
            model=llama,
            args=library.DPOConfig(str(tmp_path / "dpo"), **quiet(**options)),
            train_dataset=tiny_pairs(32),
            processing_class=tiny_tokenizer(),
            peft_config=LORA if lora else None,
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(losses, dtype=torch.float64), trainer


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_twenty_steps_of_trls_dpo(llama, tmp_path, calls, lora):
    expected, _ = train_dpo(llama, tmp_path, lora=lora)
    assert len(expected) == 20 and expected.min() < 0.9 * expected.max() and not calls
    found, _ = train_dpo(llama, tmp_path, patched=True, lora=lora)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert len(calls) == 2 * 20
    assert {call["trained"] for call in calls[::2]} == {not lora}  # policy, reference, policy, ...

    half, _ = train_dpo(llama, tmp_path, lora=lora, bf16=True)
    ours_half, _ = train_dpo(llama, tmp_path, patched=True, lora=lora, bf16=True)
    # The backbone rounds to bfloat16 in both, and training carries that on: the runs part by as
    # much as each of them parts from float32. What the head alone adds is in the next test.
    theirs = (half - expected).norm()
    assert 0 < (ours_half - expected).norm() <= 2 * theirs
    assert (ours_half - half).norm() <= 2 * theirs


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_bfloat16_losses_are_nearer_to_those_of_an_exact_head(llama, tmp_path, monkeypatch, lora):
    """One policy, one bfloat16 backbone, three heads: TRL's, ours and a float64 one."""
    _, trainer = train_dpo(llama, tmp_path, lora=lora, bf16=True, max_steps=5)

    def numbers():
        batches = DataLoader(trainer.train_dataset, batch_size=4, collate_fn=trainer.data_collator)
        losses, gradients = [], []
        for batch in batches:
            trainer.model.zero_grad()
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            losses.append(loss.detach().double())
            gradients += [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
        return torch.stack(losses), torch.cat(gradients)

    theirs = numbers()
    with patch_head():
        mine = numbers()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", ExactHead)
        exact = numbers()
    assert len(exact[0]) == 8
    assert relative_error(mine[0], exact[0]) <= 1e-5 < relative_error(theirs[0], exact[0])
    # Of the gradients' error nearly all is the backbone's: which head is nearer is chance.
    assert relative_error(mine[1], exact[1]) <= 2 * relative_error(theirs[1], exact[1])


@pytest.mark.parametrize("method", ["SFT", "KTO", "GRPO", "RLOO"])
def test_other_trainers(llama, tmp_path, calls, method):
    data, options, arguments = tiny_pairs(8), {"max_steps": 3, "learning_rate": 2e-3}, {}
    if method in ("SFT", "KTO"):
        data = data.rename_column("chosen", "completion").remove_columns("rejected")
        if method == "KTO":
            data = data.add_column("label", [True, False] * 4)
    else:
        data = data.remove_columns(["chosen", "rejected"])
        options |= {"num_generations": 4, "max_completion_length": 6, "temperature": 0.8}
        options |= {"beta": 0.05}
        arguments["reward_funcs"] = lambda completions, **_: [len(c) / 100 for c in completions]

    def run():
        torch.manual_seed(0)
        trainer = getattr(trl, f"{method}Trainer")(
            model=llama,
            args=getattr(trl, f"{method}Config")(str(tmp_path / method), **quiet(**options)),
            train_dataset=data,
            processing_class=tiny_tokenizer(),
            **arguments,
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        return torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in log])

    expected = run()
    assert not calls
    with patch_head():
        found = run()
    assert len(calls) >= 3 and expected[:, 1].min() > 1e-2
    # a policy-gradient loss is 0 up to rounding until the policy has moved
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- taking the place


def test_call_and_undo():
    patch_head()
    first = seat()
    assert isinstance(first[0], TokenLogprobHead) and first[1](torch.device("cpu"))
    patch_head()  # again: the same
    assert seat() == first
    unpatch_head()
    assert seat() == TRLS
    unpatch_head()  # nothing to undo


def test_nested():
    with patch_head() as outer:
        with patch_head(memory_budget=0):
            assert utils._ChunkedLogProbFunction.memory_budget == 0
        assert utils._ChunkedLogProbFunction is outer.head
        inner = patch_head(memory_budget=1)
        outer.remove()  # not the last one: what stands is the inner one's
        assert utils._ChunkedLogProbFunction is inner.head
    inner.remove()
    assert seat() == TRLS


def test_undone_after_an_exception():
    with pytest.raises(KeyError), patch_head():
        raise KeyError
    assert seat() == TRLS


def test_other_devices():
    """TRL's choice stands where a changing number of rows would compile anew."""
    with patch_head():
        chosen = [utils._use_triton(torch.device(d)) for d in ("cpu", "cuda", "xla", "meta")]
    assert chosen == [True, True, False, False]


def test_negative_budget():
    with pytest.raises(ValueError, match="memory_budget: expected bytes >= 0, got -1"):
        patch_head(-1)


def moved_signature(ctx, hidden, weight, targets):
    raise AssertionError


@pytest.mark.parametrize(
    ("target", "name", "value", "message"),
    [
        (utils, "_ChunkedLogProbFunction", None, "utils:_ChunkedLogProbFunction is gone"),
        (utils, "_use_triton", None, "utils:_use_triton is gone"),
        (utils, "add_fused_lm_head", None, "utils.add_fused_lm_head is gone"),
        (utils, "add_fused_lm_head", moved_signature, r"takes \('ctx',.*expected \('model',"),
        (ChunkedLogProbFunction, "forward", moved_signature, "Function.forward takes"),
        (chunked_logprob, "OPTIONAL_OUTPUTS", ("entropy",), "outputs are"),
        (trl, "__version__", "1.15.2", "supports trl>=1.16,<2, found trl 1.15.2"),
    ],
)
def test_moved_seams(monkeypatch, target, name, value, message):
    with monkeypatch.context() as patch:
        if value is None:
            patch.delattr(target, name)
        else:
            patch.setattr(target, name, value)
        with pytest.raises(ImportError, match=message) as caught:
            patch_head()
    assert isinstance(caught.value, seam.SeamMovedError) == (target is not trl)


class Foreign:
    @staticmethod
    def apply(*arguments):
        return ChunkedLogProbFunction.apply(*arguments)


def test_a_foreign_head_is_refused(monkeypatch, llama, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", Foreign)
        with pytest.raises(RuntimeError, match=r"found .*Foreign, which something other than drrl"):
            patch_head()
        with pytest.raises(RuntimeError, match="head='trl' in drrlhf"):
            train_dpo(llama, tmp_path, ours)
        train_dpo(llama, tmp_path, ours, head="trl", max_steps=1)  # is left in its place
        assert utils._ChunkedLogProbFunction is Foreign


def test_a_foreign_head_over_ours_is_not_thrown_out(monkeypatch):
    handle = patch_head()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", Foreign)
        for undo in (handle.remove, unpatch_head):
            with pytest.raises(RuntimeError, match=r"expected .*TokenLogprobHead"):
                undo()
        assert utils._ChunkedLogProbFunction is Foreign
    handle.remove()


# ------------------------------------------------------------------------------------ our trainers


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_both_heads_train_alike(llama, tmp_path, calls, lora):
    options = {
        "lora": lora,
        # Not a radius: adapters start with equal losses, and it would weigh by their rounding.
        "ambiguity": "kl:temperature=0.5",
        "max_steps": 8,
        "precompute_ref_log_probs": lora,
    }
    theirs, _ = train_dpo(llama, tmp_path, ours, head="trl", **options)
    assert not calls
    mine, _ = train_dpo(llama, tmp_path, ours, **options)
    assert calls
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)


def test_only_around_its_own_losses(llama, tmp_path, calls):
    """Training, evaluation and precomputation use ours; between them TRL's name is TRL's."""
    seats = []
    _, trainer = train_dpo(llama, tmp_path, ours, max_steps=1)
    assert len(calls) == 2  # policy and reference
    collator = trainer.data_collator
    trainer.data_collator = lambda examples: seats.append(seat()) or collator(examples)
    trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert len(calls) == 4 and seats and set(seats) == {TRLS}
    trainer.compute_ref_log_probs(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert len(calls) == 5


def test_left_as_found_after_an_exception(llama, tmp_path):
    _, trainer = train_dpo(llama, tmp_path, ours, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    del batch["completion_mask"]
    for call in (trainer.compute_loss, trainer.compute_ref_log_probs):
        with pytest.raises(KeyError, match="completion_mask"):
            call(trainer.model, dict(batch))
        assert seat() == TRLS


def test_under_a_patch_for_all(llama, tmp_path, calls):
    with patch_head(memory_budget=2**20) as handle:
        train_dpo(llama, tmp_path, ours, max_steps=1)
        budgets = {call["head"].memory_budget for call in calls}
        assert len(calls) == 2 and budgets == {2**20}  # not the default
        calls.clear()
        train_dpo(llama, tmp_path, ours, max_steps=1, head="trl")
        assert not calls and utils._ChunkedLogProbFunction is handle.head


def test_configuration(llama, tmp_path, calls):
    assert ours.DPOConfig(str(tmp_path), **quiet()).head == "auto"
    with pytest.raises(
        ValueError, match=r"head: unknown 'liger'; .*expected one of auto, drrlhf, trl"
    ):
        ours.DPOConfig(str(tmp_path), **quiet(head="liger"))
    (parsed,) = HfArgumentParser(ours.DPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--head", "trl"]
    )
    assert parsed.head == "trl" and parsed.to_dict()["head"] == "trl"
    trainer = ours.DPOTrainer(
        model=llama,
        args=trl.DPOConfig(str(tmp_path), **quiet(max_steps=1)),  # has no such field
        train_dataset=tiny_pairs(4),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert len(calls) > 2  # policy and reference, which are tried with shared prompts first


def test_a_device_without_a_kernel_gets_trls(llama, tmp_path, calls):
    assert head.resolve("auto", "cpu") == "drrlhf" and head.resolve("auto", "mps") == "trl"
    served = backends.serving("linear_token_logprobs", "cuda") != "reference"
    assert head.resolve("auto", "cuda") == ("drrlhf" if served else "trl")
    assert head.resolve("drrlhf", "cuda") == "drrlhf" and head.resolve("trl", "cpu") == "trl"
    with backends.use("reference"):
        train_dpo(llama, tmp_path, ours, max_steps=1)
    assert not calls
    train_dpo(llama, tmp_path, ours, max_steps=1)
    assert calls


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_the_reference_is_asked_for_log_probs_alone(tmp_path, monkeypatch, method):
    """With adapters it is the policy's own model, which TRL prepared to give its metrics."""
    asked, function = [], head.linear_token_logprobs

    def spy(*arguments, **options):
        asked.append((torch.is_grad_enabled(), options["outputs"]))
        return function(*arguments, **options)

    monkeypatch.setattr(head, "linear_token_logprobs", spy)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    options = {"ambiguity": "tv:0.1", "beta": 0.1, "trainer_peft_config": lora}
    options["share_prompts"] = False  # no probe, which asks as it is told to
    steps.run(method, str(tiny_llama_dir(tmp_path)), str(tmp_path / "out"), **options)
    extras = ("entropy",) if method == "grpo" else ("entropy", "mean_logit", "is_top1")
    assert set(asked) == {(False, ()), (True, extras)}


@pytest.mark.parametrize("which", ["model", "ref_model"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_a_quantized_head_are_not_taken_for_numbers(llama, tmp_path, dtype, which):
    """Both heads read the weight as it is: the run would go through, on other numbers."""
    models = {name: AutoModelForCausalLM.from_pretrained(llama) for name in ("model", "ref_model")}
    projection = models[which].lm_head
    codes = (100 * projection.weight.detach()).to(dtype)
    projection.weight = torch.nn.Parameter(codes, requires_grad=False)
    for name in ("drrlhf", "trl"):
        with pytest.raises(ValueError, match=f"output head in one of .*, got {dtype}, .*leave"):
            ours.DPOTrainer(
                **models,
                args=ours.DPOConfig(str(tmp_path), **quiet(head=name)),
                train_dataset=tiny_pairs(4),
                processing_class=tiny_tokenizer(),
            )
