"""Worst-case accuracy and loss over the radius of an ambiguity set, with bootstrap bands.

The adversary reweighs examples. Its 0/1 errors take three values (right 0, a tie 1/2, wrong 1), and
pairs of equal loss share weight in proportion to what they had; so the worst case over n pairs is
that over three atoms that weigh as much as the pairs they stand for, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from drrlhf import ops
from drrlhf.ambiguity import AmbiguitySet, CVaR, Group, parse_ambiguity
from drrlhf.stress.resample import CONFIDENCE, Array, band

ERRORS = np.array([0.0, 0.5, 1.0])
ATOMS = 2048
ALONE = 256  # of these for the largest losses, which a strong adversary piles onto, one by one
RADII: Mapping[str, Sequence[float]] = {
    "tv": (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    "kl": (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
    "chi2": (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
    "cvar": (1, 0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1),
}
# (no adversary, the strongest that is searched): CVaR's strength grows as alpha falls.
SEARCHED = {"tv": (0.0, 1.0), "kl": (0.0, 20.0), "chi2": (0.0, 1000.0), "cvar": (1.0, 1e-3)}
_HALVINGS = 40


def worst_case(values: Array, mass: Array | None, ambiguity: AmbiguitySet) -> float:
    """Worst-case mean of ``values`` (n,) with nominal ``mass`` (n,), in float64."""
    return worst_case_weights(values, mass, ambiguity)[0]


def worst_case_weights(
    values: Array, mass: Array | None, ambiguity: AmbiguitySet
) -> tuple[float, Array]:
    """The worst-case mean and the weights (n,) that give it."""
    assert not isinstance(ambiguity, Group), "an adversary over examples has no groups"
    nominal = None if mass is None else torch.from_numpy(np.ascontiguousarray(mass))
    losses = torch.from_numpy(np.ascontiguousarray(values))
    risk = ops.robust_risk(losses, nominal, None, None, *ambiguity.encode())
    return risk.value.item(), risk.weights.numpy()


def error_codes(margin: Array) -> NDArray[np.int64]:
    """0 right, 1 a tie, 2 wrong: the index into `ERRORS`."""
    return (1 - np.sign(margin)).astype(np.int64)


def losses_of(margin: Array) -> Array:
    """-log sigmoid(margin), (n,)."""
    return np.logaddexp(0, -margin)


class Sample:
    """The pairs of one model, ready to be asked for any worst case with its band.

    ``error_mass`` (3,) and ``replicates`` (B, 3) are the mass of each error, in the sample and in
    each resample. Losses keep every value for the number itself; for the band they are gathered
    into at most `ATOMS` atoms, each of the `ALONE` largest losses for itself and the others of
    equal mass, whose small bias is taken back.
    """

    def __init__(
        self, margin: Array, table: Callable[[NDArray[np.int64], int], Array], draws: Array
    ) -> None:
        """``table(codes, size)`` counts codes by block, (J, size); ``draws`` is (B, J)."""
        by_block = table(error_codes(margin), len(ERRORS))
        self.error_mass = by_block.sum(0)
        self.error_draws = draws @ by_block
        self.losses = losses_of(margin)
        order = np.argsort(self.losses, kind="stable")
        atoms = min(ATOMS, len(order))
        codes = np.empty(len(order), dtype=np.int64)
        alone = min(ALONE, atoms - 1)
        rest = len(order) - alone
        codes[order[:rest]] = np.arange(rest) * (atoms - alone) // rest
        codes[order[rest:]] = np.arange(atoms - alone, atoms)
        in_atom = table(codes, atoms)
        self.atom_mass = in_atom.sum(0)
        self.atoms = np.bincount(codes, weights=self.losses, minlength=atoms) / self.atom_mass
        self.atom_draws = draws @ in_atom

    def accuracy(self, ambiguity: AmbiguitySet) -> dict[str, float]:
        """One minus the worst-case error, and its band."""
        value = 1 - worst_case(ERRORS, self.error_mass, ambiguity)
        drawn = [1 - worst_case(ERRORS, mass, ambiguity) for mass in self.error_draws]
        return band(value, drawn)

    def loss(self, ambiguity: AmbiguitySet) -> dict[str, float]:
        """The worst-case mean of -log sigmoid(margin), and its band."""
        value = worst_case(self.losses, None, ambiguity)
        shift = value - worst_case(self.atoms, self.atom_mass, ambiguity)
        drawn = [worst_case(self.atoms, mass, ambiguity) + shift for mass in self.atom_draws]
        return band(value, drawn)


def curves(sample: Sample, families: Sequence[str] = tuple(RADII)) -> dict[str, Any]:
    """{family: [{"set", "radius", "accuracy", "loss"}]}, by growing strength of the adversary."""
    return {
        family: [
            {
                "set": str(ambiguity),
                "radius": radius,
                "accuracy": sample.accuracy(ambiguity),
                "loss": sample.loss(ambiguity),
            }
            for radius in RADII[family]
            for ambiguity in [parse_ambiguity(f"{family}:{radius}")]
        ]
        for family in families
    }


def robustness_radius(sample: Sample, family: str, floor: float) -> dict[str, Any]:
    """The radius up to which worst-case accuracy stays at ``floor`` or above, and its band.

    For CVaR it is the smallest alpha, and the band's low end is the larger number: the cautious
    end comes first. None stands for accuracy below the floor without any adversary. ``beyond`` is
    True when even the strongest adversary that is searched stays above.
    """
    radius = _last_radius(sample.error_mass, family, floor)
    drawn = [_last_radius(mass, family, floor) for mass in sample.error_draws]
    cautious = np.quantile(
        [_order(family, one) for one in drawn], (1 - CONFIDENCE) / 2, method="lower"
    )
    low = None if cautious < 0 else float(1 - cautious if family == "cvar" else cautious)
    return {"radius": radius, "low": low, "floor": floor, "beyond": radius == SEARCHED[family][1]}


def _order(family: str, radius: float | None) -> float:
    """A number that grows with the strength of the adversary; -1 where none is withstood."""
    if radius is None:
        return -1.0
    return 1 - radius if family == "cvar" else radius


def _last_radius(mass: Array, family: str, floor: float) -> float | None:
    weak, strong = SEARCHED[family]

    def holds(radius: float) -> bool:
        worst = 1 - worst_case(ERRORS, mass, set_of(family, radius))
        return worst >= floor - 1e-12

    if not holds(weak):
        return None
    if holds(strong):
        return strong
    for _ in range(_HALVINGS):
        middle = (weak + strong) / 2
        weak, strong = (middle, strong) if holds(middle) else (weak, middle)
    return weak


def set_of(family: str, radius: float) -> AmbiguitySet:
    """The set of a family with this radius, or this alpha."""
    return CVaR(alpha=radius) if family == "cvar" else parse_ambiguity(f"{family}:{radius!r}")
