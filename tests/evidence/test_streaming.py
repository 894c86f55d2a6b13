"""KL with momentum: a running normaliser in log space, one pass over batches of any size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import drrlhf as dr
from evidence.streaming_bias import run


def test_two_steps_by_hand():
    t, m = 0.5, 0.75
    state = dr.NormaliserState()
    running = None
    for step in range(2):
        l = torch.tensor([0.3, 1.0, -0.2 + step], dtype=torch.float64, requires_grad=True)
        batch = torch.exp(l.detach() / t).mean()
        running = batch if running is None else m * running + (1 - m) * batch
        risk = dr.robust_risk(l, dr.KL(temperature=t, momentum=m), normaliser_state=state)
        risk.value.backward()
        q = torch.exp(l.detach() / t) / 3 / running
        torch.testing.assert_close(risk.value.detach(), t * running.log(), rtol=1e-12, atol=0)
        torch.testing.assert_close(risk.weights, q, rtol=1e-12, atol=0)
        torch.testing.assert_close(l.grad, q, rtol=1e-12, atol=0)
        torch.testing.assert_close(state.log_normaliser, running.log(), rtol=1e-12, atol=0)
    assert abs(float(q.sum()) - 1) > 0.1  # not the weights of the batch alone


@pytest.mark.parametrize("temperature", [0.3, -1.0])
def test_without_momentum_it_is_the_batch(temperature):
    l, state = torch.randn(2, 9), dr.NormaliserState()
    for row in l:
        plain = dr.robust_risk(row, dr.KL(temperature=temperature))
        set_ = dr.KL(temperature=temperature, momentum=0.0)
        risk = dr.robust_risk(row, set_, normaliser_state=state)
        torch.testing.assert_close(risk.value, plain.value)
        torch.testing.assert_close(risk.weights, plain.weights)
    # and without a state every batch stands alone
    alone = dr.robust_risk(l[0], dr.KL(temperature=temperature, momentum=0.9))
    torch.testing.assert_close(alone.weights, dr.robust_risk(l[0], f"kl:{temperature=}").weights)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_losses_stay_finite(shift):
    state, l = dr.NormaliserState(), torch.tensor([0.1, 0.4, 0.2])
    for _ in range(3):
        risk = dr.robust_risk(
            (l + shift).double(), "kl:temperature=0.01,momentum=0.9", normaliser_state=state
        )
    plain = dr.robust_risk((l + shift).double(), "kl:temperature=0.01")
    torch.testing.assert_close(risk.value, plain.value, rtol=1e-9, atol=0)
    torch.testing.assert_close(risk.weights, plain.weights, rtol=1e-6, atol=1e-9)


def test_batches_without_an_answer_leave_the_state_alone():
    state, set_ = dr.NormaliserState(), "kl:temperature=1,momentum=0.5"
    dr.robust_risk(torch.tensor([1.0, 2.0]), set_, normaliser_state=state)
    before = state.log_normaliser.clone()
    for losses, nominal in (
        (torch.zeros(0), None),
        (torch.ones(2), torch.zeros(2)),
        (torch.tensor([1.0, math.nan]), None),
        (torch.tensor([1.0, math.inf]), None),
    ):
        risk = dr.robust_risk(losses, set_, nominal=nominal, normaliser_state=state)
        assert torch.equal(state.log_normaliser, before)
        assert (risk.value == 0) == losses.isfinite().all()
    dr.robust_risk(torch.ones(2), set_, normaliser_state=state, update=False)
    assert torch.equal(state.log_normaliser, before)


def test_small_batches_see_the_population():
    """Weights of batches of two, averaged, against the population's; those of the batch alone are
    far from it. The losses take four values, so that the population is known."""
    values = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    t = 0.5
    population = t * torch.exp(values / t).mean().log()
    expected = torch.softmax(values / t, 0)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for momentum in (0.0, 0.995):
        state, mass, reported = dr.NormaliserState(), torch.zeros(4, dtype=torch.float64), []
        for step in range(4000):
            drawn = torch.randint(0, 4, (2,), generator=generator)
            risk = dr.robust_risk(
                values[drawn], dr.KL(temperature=t, momentum=momentum), normaliser_state=state
            )
            if step >= 1000:
                mass.index_add_(0, drawn, risk.weights)
                reported.append(risk.value)
        found[momentum] = (mass / 3000 - expected).abs().max(), torch.stack(reported).mean()
    assert found[0.0][0] > 0.2 and population - found[0.0][1] > 0.5
    assert found[0.995][0] < 0.03 and abs(population - found[0.995][1]) < 0.1


def test_other_losses_and_modules_stream():
    module = dr.PreferenceLossModule("kl:temperature=0.5,momentum=0.5", beta=0.5)
    z = torch.zeros(3)
    for step in range(3):
        chosen = torch.randn(3, requires_grad=True)
        if step == 2:
            module.eval()
        before = module.normaliser_state.log_normaliser.clone()
        out = module(chosen, z, z, z)
        out.loss.backward()
        slopes = -0.5 * torch.sigmoid(-0.5 * chosen.detach())
        torch.testing.assert_close(chosen.grad, out.weights * slopes)
    assert torch.equal(module.normaliser_state.log_normaliser, before)  # eval mode
    other = dr.PreferenceLossModule("kl:temperature=0.5,momentum=0.5", beta=0.5)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.normaliser_state.log_normaliser, before)
    assert module.bfloat16().normaliser_state.log_normaliser.dtype == torch.float64


def test_compiles():
    state = dr.NormaliserState()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(l):
        risk = dr.robust_risk(l, "kl:temperature=0.5,momentum=0.5", normaliser_state=state)
        return risk.value, risk.weights

    l = torch.randn(5)
    other = dr.NormaliserState()
    for _ in range(2):
        eager = dr.robust_risk(l, "kl:temperature=0.5,momentum=0.5", normaliser_state=other)
        value, weights = step(l)
        torch.testing.assert_close((value, weights), (eager.value, eager.weights))
        l = l + 1
    torch.testing.assert_close(state.log_normaliser, other.log_normaliser)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dr.KL(radius=0.1, momentum=0.5), "momentum needs temperature="),
        (lambda: dr.KL(temperature=1, momentum=1.0), r"momentum must lie in \[0, 1\)"),
        (lambda: dr.parse_ambiguity("kl:temperature=1,momentum=x"), "momentum must be a number"),
        (lambda: dr.parse_ambiguity("tv:0.1,momentum=0.5"), "unknown key 'momentum'"),
    ],
)
def test_wrong_momentum(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_string_and_back():
    set_ = dr.KL(temperature=-1.0, momentum=0.9, trim=0.05)
    assert dr.parse_ambiguity(str(set_)) == set_


def test_the_kept_table_is_what_is_measured():
    kept = json.loads((Path(run.__file__).parent / f"{run.FILE}.json").read_text())
    assert run.population() == pytest.approx(kept["population"], rel=1e-12)
    of = {(r["size"], r["momentum"]): (r["mean"], r["deviation"]) for r in kept["records"]}
    assert of.keys() == {(n, m) for n in run.SIZES for m in run.MOMENTA}
    for case in ((2, None), (64, 0.9)):
        assert run.measure(*case) == pytest.approx(of[case], rel=1e-9)
