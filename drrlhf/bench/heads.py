"""One problem of the output head: inputs, its float64 truth, and everyone who computes it.

All compute token log-probs (N,) of labels under hidden (N, D) and weight (V, D), and their
gradients for a given gradient of each log-prob.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import drrlhf as dr
from drrlhf.bench import peers
from drrlhf.bench.gate import Gate
from drrlhf.bench.registry import (
    OURS,
    SUITES,
    Unavailable,
    Work,
    on_backend,
    other_backends,
    variant,
)

# hidden (N, D), weight (V, D), labels (N,) -> log-probs (N,), and the extras of `EXTRAS` behind
# them where the problem asks for them.
Head = Callable[[Tensor, Tensor, Tensor], Any]

CHECKED_ROWS = 256
CHECKED_WORDS = 256
_TRUTH_ROWS = 512  # at once, in float64
SMALL_BUDGET = 48 << 20  # bytes: the products' own workspace, so that the softmax is recomputed
LARGE_BUDGET = 1 << 40  # bytes: whatever is worth keeping fits
RECOMPUTE, KEPT = variant("recompute"), variant("slab kept")
# Budgets of the head by suite, beside the default.
BUDGETS: dict[str, dict[str, int]] = {
    "cpu": {RECOMPUTE: SMALL_BUDGET, KEPT: LARGE_BUDGET},
    "gpu": {KEPT: LARGE_BUDGET, variant("48 MiB"): 48 << 20, variant("256 MiB"): 256 << 20},
}
BUDGETS["quick"] = BUDGETS["cpu"] | BUDGETS["gpu"]
# What TRL's DPO trainer asks of the head besides log-probs: by our names, and by TRL's.
EXTRAS = ("entropy", "mean_logit", "is_top1")
TRL_EXTRAS = ("entropy", "mean_logits", "is_top1")
JUDGED_EXTRAS = ("entropy", "mean logit")  # a bool has no rounding error to be judged by

GEMM = "gemm"
PLAIN = "plain"
COMPILED = "torch.compile"
TRL = "trl"
TORCH = "linear_cross_entropy"
LIGER = "liger"
CCE = "cut-cross-entropy"


@dataclass
class Problem:
    """Inputs of the head on one device; `trained` says whether the head's gradient is wanted,
    `extras` whether the statistics of `EXTRAS` are, too."""

    n: int
    vocabulary: int
    depth: int
    dtype: torch.dtype
    device: str
    trained: bool
    backward: bool = True
    extras: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        n, v, d = self.n, self.vocabulary, self.depth
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        self.hidden = torch.empty(n, d, **options).normal_()
        # Logits of standard deviation 2: neither uniform nor saturated.
        self.weight = torch.empty(v, d, **options).normal_(std=2 * d**-0.5)
        self.hidden.requires_grad_(self.backward)
        self.weight.requires_grad_(self.backward and self.trained)
        self.labels = torch.randint(v, (n,), device=self.device)
        self.upstream = torch.randn(n, device=self.device)

    @property
    def plain(self) -> Head:
        """Plain PyTorch for it."""
        return plain_extras if self.extras else plain

    def clear(self) -> None:
        """Forget gradients."""
        self.hidden.grad = self.weight.grad = None

    @property
    def rows(self) -> Tensor:
        """The tokens whose results are checked."""
        return torch.linspace(0, self.n - 1, min(self.n, CHECKED_ROWS), device=self.device).long()

    @property
    def words(self) -> Tensor:
        """The rows of the head whose gradient is checked: some labels, and some in between."""
        half = CHECKED_WORDS // 2
        spread = torch.linspace(0, self.vocabulary - 1, half, device=self.device).long()
        return torch.cat([self.labels[:half], spread]).unique()

    def gradients(self) -> dict[str, Tensor]:
        """The checked parts of the gradients that the last backward left."""
        result = {}
        if self.hidden.grad is not None:
            result["d hidden"] = self.hidden.grad[self.rows]
        if self.weight.grad is not None:
            result["d weight"] = self.weight.grad[self.words]
        return result

    def judged(self, made: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Of what a head gave the log-probs, and by name all that is checked."""
        logps, *more = made if self.extras else (made,)
        return logps, {k: x.detach() for k, x in zip(("log-probs", *JUDGED_EXTRAS), (logps, *more))}

    def work(self, head: Head, upstream: Tensor | None = None) -> Work:
        """Forward, and backward where the problem has one."""
        upstream = self.upstream if upstream is None else upstream
        found: dict[str, Tensor] = {}

        def before() -> None:
            self.clear()
            found.clear()

        def run() -> None:
            logps, values = self.judged(head(self.hidden, self.weight, self.labels))
            found.update(values)
            if self.backward:
                logps.backward(upstream.to(logps.dtype))

        def outputs() -> Mapping[str, Tensor]:
            return {**{k: x[self.rows] for k, x in found.items()}, **self.gradients()}

        return Work(run, before, outputs)

    def backward_work(self, head: Head, upstream: Tensor) -> Work:
        """The backward alone; its graph is built outside the timing."""
        graph: dict[str, Tensor] = {}

        def before() -> None:
            self.clear()
            graph["logps"] = head(self.hidden, self.weight, self.labels)

        def run() -> None:
            logps = graph.pop("logps")
            logps.backward(upstream.to(logps.dtype))

        return Work(run, before, self.gradients)

    def gate(self, upstream: Tensor | None = None, *, values: bool = True) -> Gate:
        """Checked against float64 on `rows` and `words`, beside plain PyTorch on the whole."""
        upstream = self.upstream if upstream is None else upstream

        def truth() -> Mapping[str, Tensor]:
            found = self.truth(lambda _: upstream)
            return found if values else {k: v for k, v in found.items() if k != "log-probs"}

        def by_plain() -> Mapping[str, Tensor]:
            if self.trained:
                return self.work(self.plain, upstream).result()
            # No row's result depends on another's: the checked ones are enough.
            hidden = self.hidden.detach()[self.rows].requires_grad_(self.backward)
            made = self.plain(hidden, self.weight, self.labels[self.rows])
            logps, result = self.judged(made)
            if self.backward:
                logps.backward(upstream[self.rows])
                assert hidden.grad is not None
                result["d hidden"] = hidden.grad
            return result

        return Gate(truth, by_plain)

    @torch.no_grad()
    def truth(
        self, upstream_of: Callable[[Tensor], Tensor], *, everything: bool = False
    ) -> dict[str, Tensor]:
        """Log-probs and gradients in float64, on `rows` and `words`.

        upstream_of: from log-probs to the gradient of each of the N. Of log-probs it is given all
        N where `everything` says so or the head's gradient is wanted, else those of `rows`.
        """
        everything |= self.trained and self.backward
        chosen = torch.arange(self.n, device=self.device) if everything else self.rows
        weight = self.weight.double()
        hidden, labels = self.hidden[chosen].double(), self.labels[chosen]
        words = self.words
        normaliser, at_words, entropies, means = [], [], [], []
        for part in hidden.split(_TRUTH_ROWS):
            logits = part @ weight.T
            normaliser.append(logits.logsumexp(-1))
            at_words.append(logits[:, words])
            if self.extras:
                means.append(logits.mean(-1))
                logp = logits.log_softmax(-1)
                entropies.append(-(logp.exp() * logp).sum(-1))
        log_z = torch.cat(normaliser)
        logps = (hidden * weight[labels]).sum(-1) - log_z
        place = self.rows if everything else torch.arange(len(chosen), device=self.device)
        result = {"log-probs": logps[place]}
        if self.extras:
            result |= {
                name: torch.cat(parts)[place]
                for name, parts in zip(JUDGED_EXTRAS, (entropies, means))
            }
        if not self.backward:
            return result
        upstream = upstream_of(logps).double()[chosen]
        expected = [
            (part @ weight.T).softmax(-1) @ weight for part in hidden[place].split(_TRUTH_ROWS)
        ]
        slope = weight[labels[place]] - torch.cat(expected)
        result["d hidden"] = upstream[place, None] * slope
        if self.trained:
            p = (torch.cat(at_words) - log_z[:, None]).exp()
            one_hot = (labels[:, None] == words).double()
            result["d weight"] = (upstream[:, None] * (one_hot - p)).T @ hidden
        return result


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Full logits, then log-softmax in float32."""
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def plain_extras(
    hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with `EXTRAS`, without a gradient."""
    logits = (hidden @ weight.T).float()
    logp = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
        mean, top = logits.mean(-1), logits.argmax(-1) == labels
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy, mean, top


def ours_extras(*inputs: Tensor) -> Any:
    """`linear_token_logprobs` with `EXTRAS`."""
    found = dr.linear_token_logprobs(*inputs, outputs=EXTRAS)
    return found.logps, found.entropy, found.mean_logit, found.is_top1


def trl_extras() -> Head:
    """TRL's with `EXTRAS`, called as its DPO trainer's policy does; or `Unavailable`."""
    head = trl(TRL_EXTRAS)

    def extras(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logps, entropy, _, mean, top = head(*inputs)
        return logps, entropy, mean, top

    return extras


def trl(extras: tuple[str, ...] = ()) -> Head:
    """TRL's chunked log-probs, called as its `add_fused_lm_head` does; or `Unavailable`. With
    `extras` what it gives in full: log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1."""
    function = peers.load("trl.kernels", "trl").ChunkedLogProbFunction
    chunk = peers.load("trl.trainer.utils", "trl")._CHUNKED_LOGPROB_CHUNK_SIZE
    wanted = ("log_probs", *extras)

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        found = function.apply(hidden, weight, None, labels, 1.0, chunk, None, 1.0, wanted)
        return found if extras else found[0]

    return head


def linear_cross_entropy() -> Head:
    """torch's own chunked head with no reduction; or `Unavailable`."""
    options_type = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    function = getattr(functional, "linear_cross_entropy", None)
    if options_type is None or function is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy with options")
    options = options_type()
    return lambda hidden, weight, labels: (
        -function(hidden, weight, labels, reduction="none", options=options)
    )


def liger() -> Head:
    """Liger's scaled cross-entropy by token; or `Unavailable`."""
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    function = peers.load(module, "liger-kernel").LigerFusedLinearScaledCrossEntropyFunction
    return lambda hidden, weight, labels: -function.apply(hidden, weight, labels)


def cut_cross_entropy(suite: str) -> Head:
    """Apple's, which recomputes its tiles, by token; or `Unavailable`."""
    if SUITES[suite] == "cpu":
        raise Unavailable("its kernels are a GPU's")
    function = peers.load("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return lambda hidden, weight, labels: -function(hidden, weight, labels, reduction="none")


def everyone(problem: Problem, suite: str) -> tuple[dict[str, Callable[[], Work]], dict[str, str]]:
    """Every way to compute the problem, the unit of measure, one bare product, among them; and
    the backend of those of ours that are not the automatic choice."""

    def product() -> Work:
        hidden, head = problem.hidden.detach(), problem.weight.detach().T
        return Work(lambda: torch.mm(hidden, head))

    def of_ours(**options: Any) -> Callable[[], Work]:
        return lambda: problem.work(partial(dr.linear_token_logprobs, **options))

    trained = problem.trained and problem.backward
    mine = {OURS: (lambda: problem.work(ours_extras)) if problem.extras else of_ours()}
    if trained:
        # On a CPU the default is one of these two, as the problem's size decides.
        mine = {} if suite == "cpu" else mine
        mine |= {name: of_ours(memory_budget=bytes_) for name, bytes_ in BUDGETS[suite].items()}
    named = {}
    for backend in other_backends("linear_token_logprobs", suite):
        for name in [name for name in (OURS, KEPT) if name in mine]:
            what = name.removeprefix(OURS).strip(" ()")
            other = variant(backend, what) if what else variant(backend)
            mine[other] = on_backend(backend, mine[name])
            named[other] = backend
    found = {
        **mine,
        GEMM: product,
        PLAIN: lambda: problem.work(problem.plain),
        TRL: lambda: problem.work(trl_extras() if problem.extras else trl()),
    }
    if not problem.extras:  # which these do not give
        found |= {
            TORCH: lambda: problem.work(linear_cross_entropy()),
            LIGER: lambda: problem.work(liger()),
            CCE: lambda: problem.work(cut_cross_entropy(suite)),
        }
    # Last: compiling takes long, and must not cost the others their turn where time is short.
    found[COMPILED] = lambda: problem.work(peers.compiled(problem.plain, suite))
    return found, named
