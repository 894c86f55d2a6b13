"""`robust_risk` against `torch.logsumexp`, the cheapest smooth reduction of the same losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

import drrlhf as dr
from drrlhf import backends
from drrlhf.bench import peers
from drrlhf.bench.gate import Gate
from drrlhf.bench.registry import OURS, SUITES, Case, Contest, Work, of_leaves

SETS = (
    "erm",
    "tv:0.1",
    "kl:0.1",
    "kl:temperature=1",
    "kl:temperature=-1",
    "chi2:0.5",
    "chi2:penalty=1",
    "cvar:0.3",
    "cvar:0.3,trim=0.05",
    "cvar:0.3,temperature=0.5",
    "group:4",
)
PAIRS = {"cpu": 4096, "gpu": 4096, "quick": 128}
SCALING = {"cpu": (64, 256, 1024, 16384, 65536), "gpu": (64, 1024, 65536), "quick": (32,)}
SCALED_SETS = ("tv:0.1", "kl:0.1", "chi2:0.5", "cvar:0.3")
BASELINE = "torch.logsumexp"

Reduce = Callable[[Tensor], Tensor]


def cases(suite: str) -> Iterator[Case]:
    """Forward and backward of every set at one size, and of a few over the number of pairs."""
    for text in SETS:
        yield _case(suite, text, PAIRS[suite], None)
    for text in SCALED_SETS:
        for n in (*SCALING[suite], PAIRS[suite]):
            yield _case(suite, text, n, "pairs")


def _case(suite: str, text: str, n: int, axis: str | None) -> Case:
    return Case(
        op="robust_risk",
        metric=text,
        dtype="float32",
        shape=(n,),
        unit="us",
        axis=axis,
        order=5 if axis is None else 8,
        threads=1,  # a reduction this short is not worth a second one
        build=lambda: _contest(text, n, SUITES[suite]),
    )


def _contest(text: str, n: int, device: str) -> Contest:
    groups = torch.arange(n, device=device) % 4
    ambiguity = dr.parse_ambiguity(text)
    return reductions(
        (n,),
        device,
        lambda losses: dr.robust_risk(losses, ambiguity, groups=groups).value,
        lambda losses: torch.logsumexp(losses, 0),
        _peers(text),
    )


def reductions(
    shape: tuple[int, ...],
    device: str,
    ours: Reduce,
    baseline: Reduce,
    others: Mapping[str, Callable[[], Reduce]] | None = None,
) -> Contest:
    """What reduces losses, forward and backward: ours, `BASELINE`, and others by name."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(shape, generator=generator).to(device).requires_grad_()

    def work(reduce: Reduce, losses: Tensor = losses) -> Work:
        return of_leaves(lambda: reduce(losses).sum(), {"weights": losses}, "value")

    def by_reference(dtype: torch.dtype) -> Mapping[str, Tensor]:
        with backends.use("reference"):
            return work(ours, losses.detach().to(dtype).requires_grad_()).result()

    gate = Gate(lambda: by_reference(torch.float64), lambda: by_reference(torch.float32))
    implementations: dict[str, Callable[[], Work]] = {
        OURS: lambda: work(ours),
        BASELINE: lambda: work(baseline),
    }
    for name, make in (others or {}).items():
        implementations[name] = partial(lambda make: work(make()), make)
    gates = {name: gate for name in implementations if name != BASELINE}
    return Contest(implementations, baseline=(BASELINE,), gates=gates)


def _peers(text: str) -> dict[str, Callable[[], Reduce]]:
    """Libraries that compute the value of the same set."""

    def sqwash() -> Reduce:
        reduce = peers.load("sqwash", "sqwash").reduce_superquantile
        return lambda losses: reduce(losses, 0.3)

    def dro(geometry: str, size: float, penalty: float) -> Reduce:
        # Its losses take network outputs; what reduces them to the robust value is this method.
        # The package itself imports torchvision, xgboost and more, which this file does not need.
        robust_loss = peers.load_file("dro", "neural_model/fdro_utils.py").RobustLoss
        return robust_loss(size=size, reg=penalty, geometry=geometry)._compute_robust_loss

    return {
        "cvar:0.3": {"sqwash": sqwash, "dro": lambda: dro("cvar", 0.3, 0.0)},
        "cvar:0.3,temperature=0.5": {"dro": lambda: dro("cvar", 0.3, 0.5)},
        "chi2:0.5": {"dro": lambda: dro("chi-square", 0.5, 0.0)},
    }.get(text, {})
