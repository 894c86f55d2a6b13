"""What a case of the benchmark is: one piece of work, and the implementations that do it.

Adding one: a `Case` in the module of its op, whose `build` makes the inputs and returns a
`Contest`; nothing is allocated before the case's turn comes. Adding an op: a module with
``cases(suite)``, and its line in `OPS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from drrlhf import backends
from drrlhf.bench.gate import Gate

OURS = "drrlhf"
SUITES = {"cpu": "cpu", "gpu": "cuda", "quick": "cpu"}  # and the device of each

# Each is a module of `drrlhf.bench` whose `cases(suite)` yields its cases.
OPS = (
    "ceilings",
    "robust_risk",
    "row_worst_case",
    "preference_loss",
    "sequence_preference_loss",
    "token_logprobs",
    "linear_token_logprobs",
    "linear_preference_loss",
    "policy_loss",
    "dpo_step",
    "trainer_step",
)


# Ours that are measured by name where they are not the automatic choice.
BY_NAME: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "gpu": ("cuda", "triton"),
    "quick": ("reference",),
}


def variant(*what: str) -> str:
    """The name of ours where it is not as it comes: "drrlhf (cuda, in place)"."""
    return f"{OURS} ({', '.join(what)})"


def other_backends(op: str, suite: str) -> tuple[str, ...]:
    """Backends to be measured by name: those that could serve `op` and are not the choice."""
    chosen = backends.serving(op, SUITES[suite])
    return tuple(name for name in BY_NAME[suite] if name != chosen)


class Unavailable(Exception):
    """An implementation, or a whole case, that cannot run here; its text is the reason."""


@dataclass(frozen=True)
class Work:
    """What one implementation does.

    run: the part that is timed. before: untimed, ahead of every run (clears gradients, or builds
    the graph that only the backward of is timed). outputs: what the last run computed, by
    quantity, for the correctness gate.
    """

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None
    outputs: Callable[[], Mapping[str, Tensor]] = dict

    def once(self) -> None:
        """One untimed run."""
        self.before()
        self.run()

    def result(self) -> Mapping[str, Tensor]:
        """What one untimed run computes."""
        self.once()
        return self.outputs()


def with_gradients(
    loss: Callable[[], Tensor],
    clear: Callable[[], object],
    gradients: Callable[[], Mapping[str, Tensor]],
    name: str = "loss",
) -> Work:
    """A loss () and its backward; shows the loss under `name`, and the gradients that it left."""
    found: dict[str, Tensor] = {}

    def run() -> None:
        value = loss()
        value.backward()
        found[name] = value.detach()

    return Work(run, clear, lambda: {**found, **gradients()})


def of_leaves(loss: Callable[[], Tensor], leaves: Mapping[str, Tensor], name: str = "loss") -> Work:
    """`with_gradients` whose gradients are those of some leaves, by their names."""

    def clear() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def gradients() -> Mapping[str, Tensor]:
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    return with_gradients(loss, clear, gradients, name)


@dataclass(frozen=True)
class Contest:
    """The implementations of one case, on inputs that exist now.

    implementations: name -> what makes its `Work`, or raises `Unavailable`. ours: those that must
    pass their gate before any speed is shown, and whose errors are errors. baseline: ratios are to
    the fastest of these. gates: the float64 truth that the outputs of each are held against.
    formula: in place of a baseline, a computed number: (what it is, its value in the case's unit).
    profiled: those of whose run the result file keeps a profile. named: implementation of ours ->
    the backend that it is measured on, where that is not the automatic choice.
    """

    implementations: Mapping[str, Callable[[], Work]]
    ours: tuple[str, ...] = (OURS,)
    baseline: tuple[str, ...] = ()
    gates: Mapping[str, Gate] | None = None
    formula: tuple[str, float] | None = None
    profiled: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One piece of work. `bytes` and `flops` are the least that it needs, whoever does it.

    unit: ms or us (time of one run), or MiB (peak extra memory of one run, and no time). axis: what
    the case is one point of a scaling curve over. threads: CPU threads that it is measured with, if
    not those of the process. memory: whether peak memory is metered beside the time. tokens: how
    many one run processes, for tokens/s. kernels: the ops of `drrlhf.backends` that do our work,
    where that is not `op`; each with those whose names continue its own. order: those with the
    smallest come first where time is short. seconds: with less time left it is not begun. note:
    what its records say about how it was measured.
    """

    op: str
    metric: str
    dtype: str
    shape: tuple[int, ...]
    build: Callable[[], Contest]
    head: str | None = None
    unit: str = "ms"
    bytes: int | None = None
    flops: int | None = None
    axis: str | None = None
    threads: int | None = None
    memory: bool = False
    tokens: int | None = None
    kernels: tuple[str, ...] = ()
    order: int = 5
    seconds: float = 1.0
    note: str | None = None

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        parts = [self.metric, self.dtype, shape]
        if self.head:
            parts.append(f"head {self.head}")
        if self.axis:
            parts.append(f"scaling over {self.axis}")
        return ", ".join(parts)


def on_backend(backend: str, make: Callable[[], Work]) -> Callable[[], Work]:
    """The work that `make` makes, forward and backward on one backend of ours."""

    def guarded(what: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            try:
                with backends.use(backend):
                    return what()
            except backends.BackendError as error:
                raise Unavailable(str(error)) from error

        return call

    def made() -> Work:
        work = guarded(make)()
        return Work(guarded(work.run), guarded(work.before), guarded(work.outputs))

    return made


def select(suite: str, ops: Iterable[str] = ()) -> list[Case]:
    """The cases of a suite, those of `ops` alone when any are named, in the order of `OPS`.

    Raises:
        ValueError: a suite or an op that there is not.
    """
    if suite not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    wanted = set(ops)
    if unknown := wanted - set(OPS):
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {min(unknown)!r}")
    cases: list[Case] = []
    for op in OPS:
        if not wanted or op in wanted:
            cases += importlib.import_module(f"drrlhf.bench.{op}").cases(suite)
    return cases


def most_valuable_first(cases: Iterable[Case]) -> list[Case]:
    """By their `order`; those of one order as they come."""
    return sorted(cases, key=lambda case: case.order)
