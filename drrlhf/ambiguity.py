"""Ambiguity sets: how far the training distribution may move, and against whom.

`n` pairs with losses `l` of either sign and nominal weights `p` (sum 1). Every set names an
adversary who picks worst-case weights `q` (sum 1); its robust risk is the value the adversary
reaches. The mathematics is carried out by `drrlhf.robust_risk`; this module only says *which* set.

Every set takes `trim=e` in [0, 1): the top `e` of nominal mass, ordered by loss, is set aside
first (fractionally, never by truncating `e * n`) and what is left is renormalised, so that
outliers cannot attract the adversary (DORO, arXiv 2106.06142). At least 1e-8 of it is left.

Strings name sets in configs and shells: ``"erm"``, ``"tv:0.1"``, ``"kl:0.1"``,
``"kl:temperature=-1"``, ``"kl:temperature=1,momentum=0.9"``, ``"chi2:0.5"``,
``"chi2:penalty=1"``, ``"cvar:0.3"``, ``"cvar:0.3,trim=0.05"``,
``"group:4,step_size=0.05"``. `parse_ambiguity` reads them and ``str(ambiguity)`` writes them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple


def _in(domain: str, inside: Callable[[Any], bool]) -> dict[str, Any]:
    """What a field says of its values, None excepted where that is its default."""
    return {"domain": domain, "inside": inside}


def _exactly_one(owner: str, **options: float | None) -> None:
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        names = " or ".join(f"{name}=" for name in options)
        raise ValueError(
            f"{owner}: give exactly one of {names}, got {', '.join(given) or 'neither'}"
        )


class Encoded(NamedTuple):
    """An ambiguity set as the ops take it.

    kind: the set and its form; parameter: its radius, alpha, penalty, step size or temperature;
    temperature: of a CVaR that has one besides; update: whether a group set's weights are stepped.
    """

    kind: str
    parameter: float = 0.0
    temperature: float = 0.0
    trim: float = 0.0
    update: bool = True


# What float64 can tell apart. Sums of nominal masses are right to about 1e-14, which of a mass of
# 1e-8 is a millionth; and in a chi-square ball of radius r weights lie sqrt(2 r) beside p. Numbers
# beyond are taken as these: less mass would be none, and a smaller ball has no digit of its radius.
_LEAST_MASS = 1e-8
_LEAST_RADIUS = 1e-14


@dataclass(frozen=True)
class AmbiguitySet:
    """Base of all sets. `trim` in [0, 1) sets the top nominal mass of losses aside first."""

    trim: float = field(default=0.0, kw_only=True, metadata=_in("[0, 1)", lambda e: 0 <= e < 1))

    #: name in strings, and the field that a bare number after the colon fills
    name: ClassVar[str]
    positional: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for f in dataclasses.fields(self):
            value, domain = getattr(self, f.name), f.metadata["domain"]
            if value is None and f.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(
                    f"{owner}: {f.name} must be a number in {domain}, got {value!r} "
                    f"({type(value).__name__}); pass a Python float"
                )
            if not (math.isfinite(value) and f.metadata["inside"](value)):
                raise ValueError(f"{owner}: {f.name} must lie in {domain}, got {value!r}")
            object.__setattr__(self, f.name, float(value))

    def encode(self, update: bool = True) -> Encoded:
        """What the ops are told; whether to step group weights is the caller's choice."""
        trim = min(self.trim, 1 - _LEAST_MASS)
        return self._encoded()._replace(trim=trim, update=update)

    def _encoded(self) -> Encoded:
        """Kind and parameters."""
        raise NotImplementedError

    def __str__(self) -> str:
        parts = []
        for f in sorted(dataclasses.fields(self), key=lambda f: f.name != self.positional):
            value = getattr(self, f.name)
            if value is None or (f.name != self.positional and value == f.default):
                continue
            text = repr(int(value)) if float(value).is_integer() else repr(value)
            parts.append(text if f.name == self.positional else f"{f.name}={text}")
        return self.name + (":" + ",".join(parts) if parts else "")


@dataclass(frozen=True)
class ERM(AmbiguitySet):
    """No adversary: q = p, the ordinary (nominally weighted) mean."""

    name: ClassVar[str] = "erm"

    def _encoded(self) -> Encoded:
        return Encoded("erm")


@dataclass(frozen=True)
class KL(AmbiguitySet):
    """Kullback-Leibler ball, or its Lagrangian form.

    ``KL(radius=r)``: max over q of sum q l with KL(q||p) <= r; q is proportional to p exp(l/t)
    where t > 0 solves KL(q||p) = r. ``r = 0`` is ERM; from ``r = -log p(argmax set)`` on, q is p
    restricted to the largest losses and the value is max l. Dual variable: t (inf at r = 0).

    ``KL(temperature=t)``: max of sum q l - t KL(q||p); q is proportional to p exp(l/t) and the
    value is t log sum p exp(l/t). ``t -> inf`` is ERM, ``t -> 0+`` the max. ``t < 0`` is the
    optimistic side, which gives high losses *less* weight (Dr. DPO, arXiv 2407.07880,
    beta' = -t); ``t -> 0-`` is the min. Dual variable: t.

    ``KL(temperature=t, momentum=m)``: the same in one pass over many small batches. The normaliser
    Z = sum p exp(l/t) is a running one, Z <- m Z + (1 - m) sum p exp(l/t), kept as its logarithm
    in `drrlhf.NormaliserState`; the value is t log Z and q = p exp(l/t) / Z, which sums to 1 only
    on average. ``m = 0`` is the batch alone; the nearer m is to 1, the nearer the objective to
    that of the whole population (SogCLR's estimator, arXiv 2202.12387), and the slower it follows
    a model that changes: 1/(1 - m) batches.

    Raises ValueError unless exactly one of radius and temperature is given, radius in [0, inf),
    temperature finite and not 0, momentum (with a temperature alone) in [0, 1).
    """

    radius: float | None = field(default=None, metadata=_in("[0, inf)", lambda r: r >= 0))
    temperature: float | None = field(
        default=None, metadata=_in("(-inf, inf) without 0", lambda t: t != 0)
    )
    momentum: float | None = field(default=None, metadata=_in("[0, 1)", lambda m: 0 <= m < 1))
    name: ClassVar[str] = "kl"
    positional: ClassVar[str | None] = "radius"

    def __post_init__(self) -> None:
        _exactly_one("KL", radius=self.radius, temperature=self.temperature)
        if self.momentum is not None and self.temperature is None:
            raise ValueError(
                "KL: momentum needs temperature=, a radius has no running normaliser; drop it "
                "or write KL(temperature=..., momentum=...)"
            )
        super().__post_init__()

    def _encoded(self) -> Encoded:
        if self.radius is not None:
            return Encoded("kl_radius", self.radius)
        assert self.temperature is not None
        return Encoded("kl_temperature", self.temperature)


@dataclass(frozen=True)
class TV(AmbiguitySet):
    """Total-variation ball: max over q of sum q l with 1/2 sum |q - p| <= radius.

    q moves mass r from the smallest losses (the last one partly) onto the largest, shared in
    proportion to p; value = r max l + (1 - r) CVaR_{1-r}. ``r = 0`` is ERM; from
    ``r = 1 - p(argmax set)`` on it is max l. Dual variable: the r-quantile below which losses
    get weight 0. This is the set of Mandal, Sasnauskas, Radanovic (arXiv 2503.00539).

    Raises ValueError unless radius lies in [0, 1].
    """

    radius: float = field(metadata=_in("[0, 1]", lambda r: 0 <= r <= 1))
    name: ClassVar[str] = "tv"
    positional: ClassVar[str | None] = "radius"

    def _encoded(self) -> Encoded:
        return Encoded("tv", self.radius)


@dataclass(frozen=True)
class ChiSquare(AmbiguitySet):
    """Chi-square ball, or its penalised form.

    ``ChiSquare(radius=r)``: max over q of sum q l with 1/2 sum p (q/p - 1)^2 <= r; q is
    proportional to p (l - eta)_+. ``r = 0`` is ERM, as is any r below 1e-14; from
    ``r = (1/p(argmax set) - 1)/2`` on all mass lies on the largest losses. Dual variable: eta
    (-inf at r = 0).

    ``ChiSquare(penalty=c)``: max of sum q l - c/2 sum p (q/p - 1)^2; q = p (l - eta)_+ / c.
    ``c -> inf`` is ERM, ``c -> 0`` the max. Dual variable: eta.

    Raises ValueError unless exactly one is given, radius in [0, inf), penalty in (0, inf).
    """

    radius: float | None = field(default=None, metadata=_in("[0, inf)", lambda r: r >= 0))
    penalty: float | None = field(default=None, metadata=_in("(0, inf)", lambda c: c > 0))
    name: ClassVar[str] = "chi2"
    positional: ClassVar[str | None] = "radius"

    def __post_init__(self) -> None:
        _exactly_one("ChiSquare", radius=self.radius, penalty=self.penalty)
        super().__post_init__()

    def _encoded(self) -> Encoded:
        if self.radius is not None:
            return Encoded("chi2_radius", self.radius if self.radius >= _LEAST_RADIUS else 0.0)
        assert self.penalty is not None
        return Encoded("chi2_penalty", self.penalty)


@dataclass(frozen=True)
class CVaR(AmbiguitySet):
    """Conditional value at risk: the mean of the worst `alpha` of nominal mass.

    ``CVaR(alpha=a)``: max over q of sum q l with q <= p/a; the top-a mass, the boundary partly.
    ``a = 1`` is ERM; up to ``a = p(argmax set)`` it is max l.

    ``CVaR(alpha=a, temperature=t)``: the same cap, minus t KL(q||p): q = p min(exp((l-eta)/t),
    1/a). ``t -> 0`` is CVaR(a), ``t -> inf`` ERM; ``a -> 0`` is KL(temperature=t).
    Dual variable: the threshold eta. Without a temperature an alpha below 1e-8 is taken as 1e-8.

    Raises ValueError unless alpha lies in (0, 1] and temperature, where given, in (0, inf).
    """

    alpha: float = field(metadata=_in("(0, 1]", lambda a: 0 < a <= 1))
    temperature: float | None = field(default=None, metadata=_in("(0, inf)", lambda t: t > 0))
    name: ClassVar[str] = "cvar"
    positional: ClassVar[str | None] = "alpha"

    def _encoded(self) -> Encoded:
        if self.temperature is None:
            return Encoded("cvar", max(self.alpha, _LEAST_MASS))
        return Encoded("cvar_temperature", self.alpha, self.temperature)


@dataclass(frozen=True)
class Group(AmbiguitySet):
    """Worst case over `num_groups` groups by multiplicative weights (arXiv 1911.08731).

    One step: w_g <- w_g exp(step_size L_g), L_g the nominal mean loss of group g; then the groups
    present in the batch share the total that they held before, and an absent group keeps its
    weight exactly. q_i = w_g p_i / (mass of g in the batch), scaled so that sum q = 1; the value
    is sum q l. ``step_size = 0`` with fresh state weighs groups equally; ``step_size -> inf`` is
    the worst group. State lives in `drrlhf.GroupState`. There is no dual variable: 0 is reported.

    Raises ValueError unless num_groups is an integer >= 1 and step_size lies in [0, inf).
    """

    num_groups: int = field(
        metadata=_in("the integers >= 1", lambda g: g >= 1 and float(g).is_integer())
    )
    step_size: float = field(default=0.01, metadata=_in("[0, inf)", lambda s: s >= 0))
    name: ClassVar[str] = "group"
    positional: ClassVar[str | None] = "num_groups"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "num_groups", int(self.num_groups))

    def _encoded(self) -> Encoded:
        return Encoded("group", self.step_size)


SETS: dict[str, type[AmbiguitySet]] = {s.name: s for s in (ERM, KL, TV, ChiSquare, CVaR, Group)}


def parse_ambiguity(ambiguity: str | AmbiguitySet) -> AmbiguitySet:
    """The set that a string names; a set is handed back as it is.

    Grammar: ``name[:value][,key=value]...``, the bare value filling the set's main parameter.

    Raises:
        ValueError: unknown name or key (the nearest valid one is named), a value that is not a
            number, or one outside the set's domain.
    """
    if isinstance(ambiguity, AmbiguitySet):
        return ambiguity
    if not isinstance(ambiguity, str):
        raise ValueError(
            f"ambiguity must be a set such as drrlhf.TV(radius=0.1) or a string such as 'tv:0.1', "
            f"got {type(ambiguity).__name__}"
        )
    name, colon, rest = ambiguity.strip().lower().partition(":")
    name = name.strip()
    if name not in SETS:
        # In Python a set has a longer name: chisquare.
        known = {one.__name__.lower(): key for key, one in SETS.items()} | {n: n for n in SETS}
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"did you mean {known[near[0]]!r}? " if near else ""
        raise ValueError(f"unknown ambiguity {ambiguity!r}: {hint}known sets: {', '.join(SETS)}")
    cls = SETS[name]
    keys = [f.name for f in dataclasses.fields(cls)]
    arguments: dict[str, float] = {}
    for position, part in enumerate(rest.split(",") if colon else []):
        key, equals, text = (s.strip() for s in part.partition("="))
        if not equals:
            if position or cls.positional is None:
                raise ValueError(
                    f"ambiguity {ambiguity!r}: expected key=value, got {part!r}; keys of {name}: "
                    f"{', '.join(keys)}"
                )
            key, text = cls.positional, key
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"ambiguity {ambiguity!r}: unknown key {key!r}; {hint}keys of {name}: "
                f"{', '.join(keys)}"
            )
        if key in arguments:
            raise ValueError(f"ambiguity {ambiguity!r}: {key} is given twice")
        try:
            arguments[key] = float(text)
        except ValueError:
            raise ValueError(
                f"ambiguity {ambiguity!r}: {key} must be a number, got {text!r}"
            ) from None
    if cls.positional in keys and not arguments and cls is not ERM:
        raise ValueError(
            f"ambiguity {ambiguity!r}: {cls.__name__} needs {cls.positional}; "
            f"write for example '{name}:{'4' if cls is Group else '0.1'}'"
        )
    try:
        return cls(**arguments)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f"ambiguity {ambiguity!r}: {cls.__name__} needs {cls.positional}; keys of {name}: "
            f"{', '.join(keys)}"
        ) from None
