"""`linear_preference_loss` is `preference_loss` of the sequences' log-probs, in one call."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from three_ways import (
    BACKENDS,
    DEVICE,
    ON_GPU,
    assert_differentiable_once,
    assert_no_worse,
    assert_refused,
)

import drrlhf as dr
from drrlhf import backends
from drrlhf.reference.pair_losses import F_DIVERGENCES, PAIR_LOSSES

PAIRS, LENGTH, WIDTH, VOCABULARY = 6, 5, 16, 40
AMBIGUITIES = [
    "erm",
    "kl:0.1",
    "kl:temperature=0.5",
    "kl:temperature=-0.5",
    "tv:0.2",
    "chi2:0.5",
    "chi2:penalty=1",
    "cvar:0.4",
    "cvar:0.4,temperature=0.1",
    "cvar:0.4,trim=0.1",
    "group:2",
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


class Problem:
    """Stacked pairs whose sequences differ in length; prompts and padding are ignored."""

    def __init__(self, pairs=PAIRS, dtype=torch.float64, packed=False, seed=0):
        g = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
        self.hidden, self.weight = random(2 * pairs, LENGTH, WIDTH), random(VOCABULARY, WIDTH) / 2
        self.ref_hidden, self.ref_weight = (
            random(2 * pairs, LENGTH, WIDTH),
            random(VOCABULARY, WIDTH) / 2,
        )
        self.bias, self.ref_bias = random(VOCABULARY), random(VOCABULARY)
        self.ref_logps = -5 - 5 * torch.rand(2 * pairs, generator=g).to(dtype)
        lengths = torch.randint(2, LENGTH + 1, (2 * pairs,), generator=g)
        inside = torch.arange(LENGTH) < lengths.unsqueeze(1)
        self.labels = torch.randint(0, VOCABULARY, inside.shape, generator=g)
        self.labels[~inside] = -100
        self.labels[::3, 0] = -100
        self.cu_seqlens = None
        if packed:
            for name in ("hidden", "ref_hidden", "labels"):
                setattr(self, name, getattr(self, name)[inside])
            self.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        self.counts = torch.where(inside, 1, 0)
        self.counts[::3, 0] = 0
        self.counts = self.counts.sum(1)
        self.pairs = pairs

    def ours(self, **options):
        options = {"ref_logps": self.ref_logps, "cu_seqlens": self.cu_seqlens} | options
        return dr.linear_preference_loss(self.hidden, self.weight, self.labels, **options)

    def logps(self, **token_options):
        tokens = dr.linear_token_logprobs(self.hidden, self.weight, self.labels, **token_options)
        return dr.sequence_logprobs(tokens, self.labels, cu_seqlens=self.cu_seqlens)

    def composed(self, ref_logps=None, token_options=None, **options):
        """The same by its parts."""
        seq, n = self.logps(**(token_options or {})), self.pairs
        refs = (None, None) if ref_logps is None else (ref_logps[:n], ref_logps[n:])
        if PAIR_LOSSES[options.get("loss_type", "sigmoid")].lengths:
            options |= {"chosen_lengths": self.counts[:n], "rejected_lengths": self.counts[n:]}
        return dr.preference_loss(seq[:n], seq[n:], *refs, **options), seq

    def trained(self):
        return [self.hidden.requires_grad_(), self.weight.requires_grad_()]


def assert_equal(problem, ours, theirs, sequences, inputs=None, **close):
    for name in ("loss", "weights", "losses", "chosen_rewards", "rejected_rewards", "dual"):
        torch.testing.assert_close(
            getattr(ours, name).detach(), getattr(theirs, name).detach(), **close
        )
    torch.testing.assert_close(ours.logps, sequences.detach(), **close)
    assert not any(x.requires_grad for x in ours[1:])
    inputs = inputs or [problem.hidden, problem.weight]
    found = (
        torch.autograd.grad(x.loss, inputs, torch.tensor(-2.5).to(x.loss)) for x in (ours, theirs)
    )
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, **close)
        assert a.abs().sum() > 0


# float64 has no kernel over the vocabulary, so by name the C++ one gets float32.
def dtype_of(backend):
    return torch.float64 if backend == "reference" else torch.float32


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.usual
@pytest.mark.pairwise
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_equals_its_parts_for_every_loss_type(backend, loss_type, packed):
    problem = Problem(dtype=dtype_of(backend), packed=packed)
    problem.trained()
    options = {"loss_type": loss_type, "beta": 0.3}
    if PAIR_LOSSES[loss_type].smoothing:
        options["label_smoothing"] = 0.1
    refs = None if loss_type == "simpo" else problem.ref_logps
    ours = problem.ours(ref_logps=refs, **options)
    assert_equal(problem, ours, *problem.composed(refs, **options), **CLOSE)


@pytest.mark.usual
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo"])
def test_equals_its_parts_where_labels_are_probabilities(backend, loss_type):
    problem = Problem(dtype=dtype_of(backend))
    problem.trained()
    p = torch.linspace(0.05, 1, PAIRS, dtype=dtype_of(backend))
    options = {"label_probs": p, "label_ambiguity": "chi2:0.2", "ambiguity": "tv:0.2"}
    refs = None if loss_type == "simpo" else problem.ref_logps
    ours = problem.ours(ref_logps=refs, loss_type=loss_type, **options)
    assert_equal(problem, ours, *problem.composed(refs, loss_type=loss_type, **options), **CLOSE)
    certain = problem.ours(ref_logps=refs, loss_type=loss_type).losses
    assert not torch.isclose(ours.losses[:-1], certain[:-1], rtol=1e-3).any()


@pytest.mark.usual
@pytest.mark.pairwise
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ambiguity", AMBIGUITIES)
@pytest.mark.parametrize("uneven", [False, True])
def test_equals_its_parts_for_every_ambiguity_set(backend, ambiguity, packed, uneven):
    problem = Problem(dtype=dtype_of(backend), packed=packed)
    problem.trained()
    options = {"ambiguity": ambiguity, "groups": torch.arange(PAIRS) % 2}
    if uneven:
        options["nominal"] = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0])
    ours = problem.ours(**options)
    assert_equal(problem, ours, *problem.composed(problem.ref_logps, **options), **CLOSE)
    if uneven:
        assert ours.weights[1] == 0


@pytest.mark.usual
@pytest.mark.parametrize("f_divergence", F_DIVERGENCES)
def test_pair_options_are_passed_on(backend, f_divergence):
    problem = Problem(dtype=dtype_of(backend))
    problem.trained()
    options = {"f_divergence": f_divergence, "f_alpha_divergence_coef": 0.7, "beta": 0.2}
    ours = problem.ours(**options)
    assert_equal(problem, ours, *problem.composed(problem.ref_logps, **options), **CLOSE)
    for options in (
        {"loss_type": "simpo", "simpo_gamma": 1.5},
        {"loss_type": "discopop", "discopop_tau": 0.5},
    ):
        refs = None if options["loss_type"] == "simpo" else problem.ref_logps
        ours = problem.ours(ref_logps=refs, **options)
        assert_equal(problem, ours, *problem.composed(refs, **options), **CLOSE)


@pytest.mark.usual
@pytest.mark.parametrize("packed", [False, True])
def test_token_options_and_bias_are_passed_on(backend, packed):
    problem = Problem(dtype=dtype_of(backend), packed=packed)
    inputs = [*problem.trained(), problem.bias.requires_grad_()]
    every = [
        {"temperature": 0.7},
        {"softcap": 3.0},
        {"logit_scale": -0.5},
        {"bias": problem.bias},
        {"memory_budget": 0, "bias": problem.bias},
    ]
    for token_options in every:
        ours = problem.ours(**token_options)
        theirs = problem.composed(problem.ref_logps, token_options)
        used = inputs if "bias" in token_options else inputs[:2]
        assert_equal(problem, ours, *theirs, used, **CLOSE)
    problem.labels[problem.labels == -100] = 7
    ours = problem.ours(ignore_index=7)
    tokens = dr.linear_token_logprobs(
        problem.hidden, problem.weight, problem.labels, ignore_index=7
    )
    expected = dr.sequence_logprobs(
        tokens, problem.labels, cu_seqlens=problem.cu_seqlens, ignore_index=7
    )
    torch.testing.assert_close(ours.logps, expected.detach(), **CLOSE)


@pytest.mark.mathematics
@pytest.mark.parametrize("packed", [False, True])
def test_packed_equals_padded(backend, packed):
    found = []
    for layout in (packed, not packed):
        problem = Problem(dtype=dtype_of(backend), packed=layout)
        out = problem.ours(loss_type="ipo", ambiguity="tv:0.2")
        found.append((*out[:-1], out.logps))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.usual
@pytest.mark.pairwise
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_reference_from_hidden_states(backend, own_head, packed):
    problem = Problem(dtype=dtype_of(backend), packed=packed)
    inputs = [*problem.trained(), problem.bias.requires_grad_()]
    head = (problem.ref_weight, problem.ref_bias) if own_head else (problem.weight, problem.bias)
    tokens = dr.linear_token_logprobs(problem.ref_hidden, head[0], problem.labels, bias=head[1])
    refs = dr.sequence_logprobs(tokens, problem.labels, cu_seqlens=problem.cu_seqlens).detach()
    given = {"ref_weight": head[0], "ref_bias": head[1]} if own_head else {}
    ours = problem.ours(
        ref_logps=None, ref_hidden=problem.ref_hidden.requires_grad_(), bias=problem.bias, **given
    )
    theirs = problem.composed(refs, {"bias": problem.bias})
    assert_equal(problem, ours, *theirs, inputs, **CLOSE)
    # The reference learns nothing.
    found = torch.autograd.grad(
        problem.ours(ref_logps=None, ref_hidden=problem.ref_hidden, **given).loss,
        [problem.hidden, problem.ref_hidden],
        allow_unused=True,
    )
    assert found[0] is not None and found[1] is None
    if own_head:  # whose bias is its own too
        without = problem.ours(
            ref_logps=None, ref_hidden=problem.ref_hidden, bias=problem.bias, ref_weight=head[0]
        )
        assert not torch.allclose(without.losses, ours.losses)


@pytest.mark.accuracy
@pytest.mark.parametrize("packed", [False, True])
def test_erm_is_what_one_would_write(backend, packed):
    """DPO in plain PyTorch at the same dtype, by the three-way tolerance."""
    found = []
    for kind in range(3):
        problem = Problem(300, torch.float32, packed)
        if kind == 2:
            for name in ("hidden", "weight", "ref_logps"):
                setattr(problem, name, getattr(problem, name).double())
        inputs = problem.trained()
        if kind == 0:
            out = problem.ours(beta=0.5)
            loss, losses = out.loss, out.losses
        else:
            logp = (problem.hidden @ problem.weight.T).log_softmax(-1)
            counted = problem.labels != -100
            logp = logp.gather(-1, problem.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            tokens = torch.where(counted, logp, 0)
            if packed:
                sizes = problem.cu_seqlens.diff().tolist()
                seq = torch.stack([part.sum() for part in tokens.split(sizes)])
            else:
                seq = tokens.sum(1)
            ratio = seq - problem.ref_logps
            losses = -F.logsigmoid(0.5 * (ratio[:300] - ratio[300:]))
            loss = losses.mean()
        found.append((losses, *torch.autograd.grad(loss, inputs)))
    for name, *values in zip(("losses", "hidden", "weight"), *found):
        assert_no_worse(*values, name)


@pytest.mark.mathematics
@pytest.mark.skipif(ON_GPU, reason="gradcheck draws by a generator of the CPU")
@pytest.mark.parametrize("ambiguity", ["erm", "kl:0.1", "tv:0.2", "cvar:0.4"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo", "hinge"])
def test_gradcheck_of_the_reference(ambiguity, loss_type):
    problem = Problem(pairs=3)
    refs = None if loss_type == "simpo" else problem.ref_logps

    def loss(hidden, weight):
        return dr.linear_preference_loss(
            hidden, weight, problem.labels, refs, loss_type=loss_type, ambiguity=ambiguity
        ).loss

    assert torch.autograd.gradcheck(loss, problem.trained(), fast_mode=True)


@pytest.mark.usual
def test_groups_with_state(backend):
    problem = Problem(dtype=dtype_of(backend))
    groups, ambiguity = torch.tensor([0, 0, 1, 1, 2, 2]), dr.Group(3, step_size=0.5)
    ours, theirs = dr.GroupState(3), dr.GroupState(3)
    for step in range(3):
        update = step != 1
        out = problem.ours(ambiguity=ambiguity, groups=groups, group_state=ours, update=update)
        other, _ = problem.composed(
            problem.ref_logps, ambiguity=ambiguity, groups=groups, group_state=theirs, update=update
        )
        torch.testing.assert_close(out.weights, other.weights, **CLOSE)
        torch.testing.assert_close(ours.weights, theirs.weights, **CLOSE)
        if step == 0:
            after_one = ours.weights.clone()
        elif step == 1:
            assert torch.equal(ours.weights, after_one)
    assert not torch.equal(ours.weights, after_one)


@pytest.mark.mathematics
def test_a_masked_pair_costs_nothing_even_when_nan(backend):
    problem = Problem(dtype=dtype_of(backend))
    problem.ref_logps[1] = math.nan
    problem.hidden[1] = math.nan
    inputs = problem.trained()
    out = problem.ours(nominal=torch.tensor([1.0, 0, 1, 1, 1, 1]), ambiguity="tv:0.2")
    assert out.weights[1] == 0 and out.loss.isfinite()
    gradients = torch.autograd.grad(out.loss, inputs)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][[1, 1 + PAIRS]] == 0).all()


def test_check_finite_names_the_pair(backend):
    problem = Problem(dtype=dtype_of(backend))
    problem.ref_logps[2 + PAIRS] = math.nan
    assert problem.ours().loss.isnan()
    with pytest.raises(ValueError, match="got nan at index 2"):
        problem.ours(check_finite=True)


@pytest.mark.mathematics
def test_pairs_without_weight_leave_no_gradient(backend):
    """CVaR drops easy pairs: exactly 0, at every token of both of their sequences."""
    problem = Problem(dtype=dtype_of(backend))
    problem.hidden.requires_grad_()
    out = problem.ours(ambiguity="cvar:0.3")
    (gradient,) = torch.autograd.grad(out.loss, problem.hidden)
    dropped = (out.weights == 0).repeat(2)
    assert 0 < dropped.sum() < 2 * PAIRS
    assert (gradient[dropped] == 0).all()
    assert (gradient[~dropped].abs().sum((1, 2)) > 0).all()


@pytest.mark.usual
def test_sequences_without_labels_and_batches_without_pairs(backend):
    dtype = dtype_of(backend)
    problem = Problem(dtype=dtype)
    problem.labels[0] = problem.labels[PAIRS] = -100
    for loss_type in ("sigmoid", "ipo"):
        out = problem.ours(loss_type=loss_type)
        assert out.logps[0] == 0 and out.loss.isfinite()
    hidden = torch.zeros(0, 3, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.zeros(0, 3, dtype=torch.long)
    empty = dr.linear_preference_loss(hidden, problem.weight, labels, problem.ref_logps[:0])
    assert empty.loss == 0
    empty.loss.backward()
    assert hidden.grad.shape == hidden.shape
    none = torch.zeros(0, WIDTH, dtype=dtype)
    cu = torch.zeros(3, dtype=torch.int32)
    packed = dr.linear_preference_loss(
        none, problem.weight, labels.flatten(), problem.ref_logps[:2], cu_seqlens=cu
    )
    assert packed.logps.tolist() == [0, 0]


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(backend, dtype):
    problem = Problem(dtype=dtype)
    inputs = problem.trained()
    out = problem.ours(ambiguity="kl:0.1")
    out.loss.backward()
    assert out.loss.dtype == out.weights.dtype == torch.float32
    assert [x.grad.dtype for x in inputs] == [dtype] * 2
    exact = Problem(dtype=dtype)
    for name in ("hidden", "weight", "ref_logps"):
        setattr(exact, name, getattr(exact, name).double())
    with backends.use("reference"):
        truth = exact.ours(ambiguity="kl:0.1")
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-4, atol=0)


def test_autocast(backend):
    problem = Problem(dtype=torch.float32)
    hidden, weight = problem.trained()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = problem.ours()
    narrow = dr.linear_preference_loss(
        hidden.bfloat16(), weight.bfloat16(), problem.labels, problem.ref_logps
    )
    assert inside.loss.dtype == torch.float32 and torch.equal(inside.loss, narrow.loss)
    for a, b in zip(*(torch.autograd.grad(x.loss, (hidden, weight)) for x in (inside, narrow))):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.usual
def test_backends_agree():
    found = []
    for name in BACKENDS:
        with backends.use(name):
            problem = Problem(dtype=torch.float32)
            problem.trained()
            out = problem.ours(ambiguity="kl:0.2", loss_type="sigmoid")
            found.append([*out, *torch.autograd.grad(out.loss, [problem.hidden, problem.weight])])
    for a, b in zip(found[0], found[-1]):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-6)


def test_graphs_kept_and_second_derivatives(backend):
    problem = Problem(dtype=dtype_of(backend))
    inputs = problem.trained()
    loss = problem.ours(ambiguity="tv:0.2").loss
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, inputs)):
        assert torch.equal(a, b)
    assert_differentiable_once(problem.ours().loss, *inputs)


P = Problem(dtype=torch.float32)
ODD = {"hidden": P.hidden[:3], "labels": P.labels[:3], "ref_logps": P.ref_logps[:3]}
FLAT = {"hidden": P.hidden.flatten(0, 1), "labels": P.labels.flatten()}
ALL = 2 * PAIRS * LENGTH
TWO, FOUR = (FLAT | {"ref_logps": P.ref_logps[:n]} for n in (2, 4))
BAD = [
    (ODD, "even number of sequences"),
    (FLAT | {"cu_seqlens": torch.tensor([0, 7, 20, ALL])}, "even number of sequences"),
    (FLAT, "packed .T,. needs cu_seqlens"),
    (TWO | {"cu_seqlens": torch.tensor([1, 9, ALL])}, "from 0 to 60"),
    (TWO | {"cu_seqlens": torch.tensor([0, 9, ALL - 1])}, "from 0 to 60"),
    (FOUR | {"cu_seqlens": torch.tensor([0, 9, 4, 20, ALL])}, "not decreasing"),
    (FLAT | {"cu_seqlens": torch.tensor([0.0, 9, ALL])}, "integer dtype"),
    ({"cu_seqlens": torch.tensor([0, 9, ALL])}, "expected packed"),
    (FLAT | {"cu_seqlens": torch.tensor([0, 30, ALL])}, r"ref_logps: expected shape \(2,\)"),
    ({"ref_logps": P.ref_logps[:3]}, r"ref_logps: expected shape \(12,\)"),
    ({"ref_logps": None}, "^ref_logps: sigmoid needs the reference's log-probs, got None"),
    ({"ref_logps": None, "loss_type": "ipo"}, "^ref_logps: ipo needs the reference's log-probs"),
    ({"loss_type": "simpo"}, "^ref_logps: simpo has no reference model"),
    ({"ref_hidden": P.hidden}, "ref_logps is given too"),
    ({"ref_weight": P.weight}, "they read ref_hidden"),
    (
        {"ref_logps": None, "ref_hidden": P.hidden, "ref_bias": P.weight[:, 0]},
        "^ref_bias: it is that of ref_weight, which is None",
    ),
    ({"ref_logps": None, "ref_hidden": P.hidden[:4]}, "labels: expected shape"),
    ({"ref_logps": None, "ref_hidden": P.hidden[..., :4]}, "weight: expected shape"),
    ({"labels": P.labels + VOCABULARY}, r"labels: expected values in \[0, 40\)"),
    ({"labels": P.labels[:, :3]}, "labels: expected shape"),
    ({"weight": P.weight[:, :7]}, "weight: expected shape"),
    ({"weight": P.weight.double()}, "expected torch.float32 as hidden"),
    ({"loss_type": "sigmod"}, "did you mean 'sigmoid'"),
    ({"nominal": torch.ones(3)}, r"nominal: expected shape \(6,\)"),
    ({"nominal": -torch.ones(PAIRS)}, "nominal: expected finite weights"),
    ({"ambiguity": "group:2"}, "needs the group id"),
    (
        {"ambiguity": "group:2", "groups": torch.full((PAIRS,), 2)},
        r"groups: expected ids in \[0, 2\)",
    ),
    ({"memory_budget": -1}, "memory_budget"),
    ({"temperature": 0.0}, "temperature"),
]


@pytest.mark.parametrize("change,message", BAD)
def test_bad_input(backend, change, message):
    arguments = {
        "hidden": P.hidden,
        "weight": P.weight,
        "labels": P.labels,
        "ref_logps": P.ref_logps,
    }
    assert_refused(lambda: dr.linear_preference_loss(**(arguments | change)), message, backend)


@pytest.mark.usual
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_break(backend, packed):
    torch._dynamo.reset()
    problem = Problem(dtype=torch.float32, packed=packed)
    inputs = problem.trained()

    def step(hidden, weight):
        return dr.linear_preference_loss(
            hidden,
            weight,
            problem.labels,
            ref_hidden=problem.ref_hidden,
            loss_type="ipo",
            ambiguity="tv:0.2",
            cu_seqlens=problem.cu_seqlens,
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, step(*inputs))
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (compiled, step(*inputs)))):
        torch.testing.assert_close(a, b)
