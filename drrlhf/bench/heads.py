"""One problem of the output head: inputs, its float64 truth, and everyone who computes it.

All compute token log-probs (N,) of labels under hidden (N, D) and weight (V, D), and their
gradients for a given gradient of each log-prob.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from drrlhf.bench import peers
from drrlhf.bench.gate import Gate
from drrlhf.bench.registry import OURS, SUITES, Unavailable, Work, our

Head = Callable[[Tensor, Tensor, Tensor], Tensor]

CHECKED_ROWS = 256
CHECKED_WORDS = 256
_TRUTH_ROWS = 512  # at once, in float64
SMALL_BUDGET = 48 << 20  # bytes: the products' own workspace, so that the softmax is recomputed
LARGE_BUDGET = 1 << 40  # bytes: whatever is worth keeping fits

GEMM = "gemm"
PLAIN = "plain"
COMPILED = "torch.compile"
TRL = "trl"
TORCH = "linear_cross_entropy"
LIGER = "liger"
CCE = "cut-cross-entropy"


@dataclass
class Problem:
    """Inputs of the head on one device; `trained` says whether the head's gradient is wanted."""

    n: int
    vocabulary: int
    depth: int
    dtype: torch.dtype
    device: str
    trained: bool
    backward: bool = True
    hidden: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    labels: Tensor = field(init=False)
    upstream: Tensor = field(init=False)

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

    def work(self, head: Head, upstream: Tensor | None = None) -> Work:
        """Forward, and backward where the problem has one."""
        upstream = self.upstream if upstream is None else upstream
        found: dict[str, Tensor] = {}

        def before() -> None:
            self.clear()
            found.clear()

        def run() -> None:
            logps = head(self.hidden, self.weight, self.labels)
            found["log-probs"] = logps.detach()
            if self.backward:
                logps.backward(upstream.to(logps.dtype))

        def outputs() -> Mapping[str, Tensor]:
            return {"log-probs": found["log-probs"][self.rows], **self.gradients()}

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
                work = self.work(plain, upstream)
                work.once()
                assert work.outputs is not None
                return work.outputs()
            # No row's result depends on another's: the checked ones are enough.
            hidden = self.hidden.detach()[self.rows].requires_grad_(self.backward)
            logps = plain(hidden, self.weight, self.labels[self.rows])
            result = {"log-probs": logps.detach()}
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
        normaliser, at_words = [], []
        for part in hidden.split(_TRUTH_ROWS):
            logits = part @ weight.T
            normaliser.append(logits.logsumexp(-1))
            at_words.append(logits[:, words])
        log_z = torch.cat(normaliser)
        logps = (hidden * weight[labels]).sum(-1) - log_z
        place = self.rows if everything else torch.arange(len(chosen), device=self.device)
        result = {"log-probs": logps[place]}
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


def ours(**options: Any) -> Head:
    """`linear_token_logprobs` with options, or `Unavailable`."""
    function = our("linear_token_logprobs", *options)
    return lambda hidden, weight, labels: function(hidden, weight, labels, **options)


def trl() -> Head:
    """TRL's chunked log-probs, called as its `add_fused_lm_head` does; or `Unavailable`."""
    function = peers.load("trl.kernels", "trl").ChunkedLogProbFunction
    chunk = peers.load("trl.trainer.utils", "trl")._CHUNKED_LOGPROB_CHUNK_SIZE
    wanted = ("log_probs",)
    return lambda hidden, weight, labels: function.apply(
        hidden, weight, None, labels, 1.0, chunk, None, 1.0, wanted
    )[0]


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


def everyone(problem: Problem, suite: str) -> dict[str, Callable[[], Work]]:
    """Every way to compute the problem; the unit of measure, one bare product, among them."""

    def product() -> Work:
        hidden, head = problem.hidden.detach(), problem.weight.detach().T
        return Work(lambda: torch.mm(hidden, head))

    def of_ours(**options: Any) -> Callable[[], Work]:
        return lambda: problem.work(ours(**options))

    mine = {OURS: of_ours()}
    if problem.trained and problem.backward:
        mine = {
            f"{OURS} (recompute)": of_ours(memory_budget=SMALL_BUDGET),
            f"{OURS} (slab kept)": of_ours(memory_budget=LARGE_BUDGET),
        }
    return {
        **mine,
        GEMM: product,
        PLAIN: lambda: problem.work(plain),
        COMPILED: lambda: problem.work(peers.compiled(plain, suite)),
        TRL: lambda: problem.work(trl()),
        TORCH: lambda: problem.work(linear_cross_entropy()),
        LIGER: lambda: problem.work(liger()),
        CCE: lambda: problem.work(cut_cross_entropy(suite)),
    }
