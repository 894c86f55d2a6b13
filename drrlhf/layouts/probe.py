"""Whether a layout of rows leaves a model's numbers as they are.

A layout (`drrlhf.layouts.layout`) saves work by putting several sequences into one row. Whether a
model keeps them apart there cannot be read off its configuration. Attention does where it takes
part; convolutions, recurrences and state-space layers run on from one sequence into the next, and
a window may get lost. So the model is tried: a few short sequences and a long one, each in a row
of its own and all together in the layout, must give the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Lengths of the short sequences in turn, and how many there are.
SHORT = (4, 6)
COUNT = 6
# Windows of attention are 128 to 4096 tokens wide in most models that have any.
LONGEST = 4200


class Numbers(NamedTuple):
    """What a model gives for one sequence of L tokens: its outputs (k, m), which are log-probs of
    tokens (L - 1, 1) or a score (1, labels), and the last hidden states (L, D)."""

    outputs: Tensor
    hidden: Tensor


class Heard(NamedTuple):
    """Hidden states (rows, L, D) of one call of a model, and the unit of rounding behind them."""

    hidden: Tensor
    unit: float


# Numbers of each of the sequences (n, L), one in a row, no padding; with the unit of rounding.
Alone = Callable[[Tensor], tuple[list[Numbers], float]]
# Numbers of each of the sequences [(L,), ...] when they lie in the layout.
Together = Callable[[list[Tensor]], list[Numbers]]


def difference(
    config: Any, alone: Alone, together: Together, longest: int | None, common: bool = False
) -> str | None:
    """How the model's numbers differ in a layout, in words; None if they do not.

    Outputs and hidden states are both compared: a head that is still zero gives equal outputs for
    everything. How far a sequence's numbers in the layout are from those that it has alone may be
    at most `tolerance` of how large they are, both as root mean squares over tokens. Of the short
    sequences the median counts, which an expert (of a mixture) that changes with a rounding error
    does not move; the long one counts by itself.

    Args:
        config: the model's configuration, for its vocabulary and its number of positions.
        longest: the most tokens that training will put into a sequence; None is any number.
        common: sequences begin alike by twos, the long one like one more that lies before it.
    """
    short = [row[: SHORT[i % 2]] for i, row in enumerate(tokens(config, COUNT, max(SHORT)))]
    # Where a layout wrongly numbers positions through the row, the row must not run out of them.
    room = positions(config) - sum(len(row) for row in short)
    rest = max(SHORT) if common else 0  # what the other long one has for itself
    length = max(SHORT[0], min(longest or LONGEST, LONGEST, room - rest))
    long, other = tokens(config, 2, length)
    if common:
        for one, two in zip(short[::2], short[1::2], strict=True):
            two[: SHORT[0] // 2] = one[: SHORT[0] // 2]
        other[: max(length - rest, 1)] = long[: max(length - rest, 1)]
    expected: list[Any] = [None] * COUNT
    for start in range(len(SHORT)):
        rows = torch.stack(short[start :: len(SHORT)])
        expected[start :: len(SHORT)], unit = alone(rows)
    expected += alone(long[None])[0]
    half = COUNT // 2  # the long one among the short ones: something precedes it and follows
    longs = [other, long] if common else [long]
    found = together([*short[:half], *longs, *short[half:]])
    found = [*found[:half], *found[half + len(longs) :], found[half + len(longs) - 1]]
    for name in Numbers._fields:
        own, laid = ([getattr(n, name) for n in numbers] for numbers in (expected, found))
        sizes = torch.stack([_norm(x) for x in own])
        bound = tolerance(unit) * _norm(sizes[:, None])
        distances = torch.stack([_norm(y - x) for x, y in zip(own, laid, strict=True)])
        apart = torch.stack([distances[:COUNT].median(), distances[COUNT]])
        # Not "any is greater": numbers in the layout may be NaN. Without numbers none can differ.
        if sizes.isfinite().all() and not (apart <= bound).all():
            worst = int(distances.nan_to_num(torch.inf).argmax())
            return _words(name, own[worst], laid[worst])
    return None


def tolerance(unit: float) -> float:
    """The share of a number by which rounding may move it, for a unit of rounding.

    In models of 24 to 64 layers, rounding moves hidden states by 1e-6 to 1e-5 in float32 and by
    0.02 to 0.1 in bfloat16: less than in proportion, since products of narrow numbers are summed in
    float32. Models that carry a state along the row move them by about 1; freshly initialised ones,
    whose layers hardly matter yet, by 1e-4 and more. The limits lie in between: 6e-5 for float32,
    0.05 for float16 and TF32, 0.25 for bfloat16.
    """
    return 16 * unit**0.75


def _words(name: str, alone: Tensor, together: Tensor) -> str:
    apart = (together - alone).abs().nan_to_num(torch.inf)
    place = divmod(int(apart.argmax()), apart.size(1))
    what = {"outputs": "a log-prob or score", "hidden": "a hidden state"}[name]
    return f"{what} is {float(together[place]):.6g} there and {float(alone[place]):.6g} alone"


def _norm(numbers: Tensor) -> Tensor:
    """The root mean square () over tokens of what a token's numbers (L, m) amount to."""
    return numbers.square().sum(1).mean().sqrt()


def tokens(config: Any, n: int, length: int) -> Tensor:
    """Token ids (n, length) that `config` has and gives no special meaning; always the same."""
    config = config.get_text_config()
    named = [value for name, value in config.to_dict().items() if name.endswith("_token_id")]
    special = {i for value in named for i in (value if isinstance(value, list) else [value])}
    plain = [i for i in range(config.vocab_size) if i not in special]
    draws = torch.rand(n, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.tensor(plain or range(config.vocab_size))[(draws * len(plain)).long()]


def positions(config: Any) -> int:
    """How many tokens a row can have at most."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else LONGEST


def unit_of(dtype: torch.dtype, device: torch.device) -> float:
    """The unit of rounding of products in `dtype` under autocast and the precision as set."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype is torch.float32:
        backend = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
        narrower = {"tf32": torch.float16, "bf16": torch.bfloat16}  # tf32 has as many bits
        dtype = narrower.get(backend.matmul.fp32_precision, dtype)
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 2  # compared in float32


@contextlib.contextmanager
def listening(backbone: torch.nn.Module) -> Iterator[list[Heard]]:
    """What a model without its head gives for each call while the block runs."""
    heard: list[Heard] = []

    def hear(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        dtypes = hidden.dtype, getattr(backbone, "dtype", hidden.dtype)
        heard.append(Heard(hidden, max(unit_of(dtype, hidden.device) for dtype in dtypes)))

    handle = backbone.register_forward_hook(hear)
    try:
        yield heard
    finally:
        handle.remove()


@contextlib.contextmanager
def quietly(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, nothing compiled (a graph would keep what listens to it);
    afterwards modes and random numbers as they were before."""
    modes = {module: module.training for module in model.modules()}
    generators = (
        torch.random.fork_rng([])
        if device.type == "cpu"
        else torch.random.fork_rng([device], device_type=device.type)
    )
    try:
        model.eval()
        with torch.no_grad(), generators, torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
