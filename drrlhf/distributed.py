"""One batch over several processes: agree on the question, then gather what the adversary must see.

Every rank gets the losses of all ranks, in rank order, and solves the same problem; this module
only moves them. It is `torch.distributed` and nothing else: any backend, uneven numbers of pairs,
ranks without pairs. Each gather is two collectives, the first of them a few integers that every
rank reads on the host: it costs a synchronisation, and ends all ranks together where they differ.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Gathered(NamedTuple):
    """The pairs of all ranks in rank order, and which of them are this rank's.

    losses (N,), nominal (N,) or None, groups (N,) or None; sizes: pairs of each rank.
    """

    losses: Tensor
    nominal: Tensor | None
    groups: Tensor | None
    sizes: tuple[int, ...]
    rank: int

    def mine(self, of_all: Tensor) -> Tensor:
        """This rank's part of a tensor (N, ...) over the pairs of all."""
        return of_all.split(self.sizes)[self.rank]

    def place(self, index: int) -> str:
        """In words, where pair `index` of all came from."""
        for rank, size in enumerate(self.sizes):
            if index < size:
                return f"index {index} of rank {rank}"
            index -= size
        raise IndexError("beyond the last pair")


def agreement(process_group: Any, on: Any) -> contextlib.AbstractContextManager[None]:
    """Around the checks before a gather: what one rank refuses ends all ranks, with its words.

    The rank that refuses raises its own error; the others, waiting in `gather`, a RuntimeError
    that quotes it. Without a process group nothing happens. `on` is whatever the caller gave where
    a tensor of its device belongs.
    """
    return contextlib.nullcontext() if process_group is None else _agreement(process_group, on)


@contextlib.contextmanager
def _agreement(process_group: Any, on: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        device = on.device if isinstance(on, Tensor) else torch.device("cpu")
        _headers(process_group, device, refusal=f"{type(error).__name__}: {error}")
        raise


def gather(
    losses: Tensor,
    nominal: Tensor | None,
    groups: Tensor | None,
    process_group: Any,
    facts: dict[str, str],
) -> Gathered:
    """Detached losses (n,), nominal weights (n,) and group ids (n,) of all ranks, bit for bit.

    n may differ between ranks and may be 0. `facts` are what must be equal on all ranks, in words:
    the ambiguity set, say.

    Raises:
        RuntimeError: on every rank, where a fact differs between them or another rank refused its
            arguments; and where a collective fails, because a rank died or did not come within the
            process group's timeout.
    """
    facts = facts | {
        "dtype of the losses": str(losses.dtype),
        "nominal weights": "none" if nominal is None else str(nominal.dtype),
        "groups": "given" if groups is not None else "none",
    }
    sizes = _headers(process_group, losses.device, losses.numel(), facts)
    # float64 holds every narrower dtype, and ids below 2^53, exactly.
    columns = [losses.detach(), *(x for x in (nominal, groups) if x is not None)]
    local = torch.zeros(max(sizes), len(columns), dtype=torch.float64, device=losses.device)
    for place, column in enumerate(columns):
        local[: len(column), place] = column
    table = _all_gather(local, process_group)
    rows = torch.cat([part[:size] for part, size in zip(table, sizes, strict=True)])
    back = iter(rows.unbind(1))
    return Gathered(
        next(back).to(losses.dtype),
        None if nominal is None else next(back).to(nominal.dtype),
        None if groups is None else next(back).to(groups.dtype),
        sizes,
        dist.get_rank(process_group),
    )


def total(numbers: Tensor, process_group: Any) -> Tensor:
    """The sum (k,) of numbers (k,) over all ranks, float64: one order of adding on every rank."""
    return torch.stack(_all_gather(numbers.detach().double(), process_group)).sum(0)


def _headers(
    process_group: Any,
    device: torch.device,
    n: int = 0,
    facts: Mapping[str, str] = MappingProxyType({}),
    refusal: str | None = None,
) -> tuple[int, ...]:
    """The pairs of each rank, which all tell each other before anything else; RuntimeError on every
    rank that did not refuse, where their facts differ or one refused."""
    text = repr(sorted(facts.items())).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
    numbers = [0 if refusal is None else 1, n, digest]
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    table = torch.stack(_all_gather(own, process_group)).tolist()
    if any(row[0] for row in table) or len({row[2] for row in table}) > 1:
        # All ranks read the same table, so all come here, to hear it in words.
        told: list[Any] = [None] * len(table)
        _guarded(
            process_group,
            lambda: dist.all_gather_object(told, (refusal, dict(facts)), process_group),
        )
        if refusal is None:
            raise RuntimeError(_difference(told, [row[1] for row in table]))
    return tuple(row[1] for row in table)


def _difference(told: list[tuple[str | None, dict[str, str]]], sizes: list[int]) -> str:
    refusals = [f"rank {rank}: {refusal}" for rank, (refusal, _) in enumerate(told) if refusal]
    if refusals:
        return f"process_group: another rank refused its arguments. {'; '.join(refusals)}"
    for name in told[0][1]:
        found = [facts.get(name, "unknown") for _, facts in told]
        if len(set(found)) > 1:
            words = ", ".join(f"rank {rank} {fact}" for rank, fact in enumerate(found))
            return (
                f"process_group: the ranks must agree on the {name}, got {words} (with {sizes} "
                "pairs): the objective would differ between them. Give every rank the same."
            )
    return "process_group: the ranks were asked different questions"


def _all_gather(local: Tensor, process_group: Any) -> list[Tensor]:
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(process_group))]
    _guarded(process_group, lambda: dist.all_gather(parts, local, group=process_group))
    return parts


def _guarded(process_group: Any, collective: Callable[[], Any]) -> None:
    """Run a collective; say in our words what its failure means, with torch's own behind them."""
    try:
        collective()
    except RuntimeError as error:
        raise RuntimeError(
            f"process_group: rank {dist.get_rank(process_group)} of "
            f"{dist.get_world_size(process_group)} could not gather the losses of this step: a "
            "rank died, or did not come within the group's timeout "
            "(torch.distributed.init_process_group(timeout=...)), or called something else. The "
            "first error of any rank is the cause."
        ) from error
