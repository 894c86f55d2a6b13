"""What is known of the prompts of a step: in which order they come, and how well they went.

Every completion carries its prompt's facts beside TRL's own tensors, so that they follow TRL's
shuffling, splitting and buffering.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import RepeatSampler

from drrlhf.trl.weighted import Weighted

# Columns (B,) of a prepared batch: the prompt's number, mean reward, nominal weight and group, and
# the factor of the completion's contribution once it is known.
PROMPT, VALUE, NOMINAL, GROUP, FACTOR = (
    f"drrlhf_{name}" for name in ("prompt", "value", "nominal", "group", "factor")
)
COLUMNS = (PROMPT, VALUE, NOMINAL, GROUP)


class PromptSampler(RepeatSampler):
    """TRL's, whose order in an epoch does not depend on whether the earlier ones were drawn here:
    a run that was resumed goes on in the order of an uninterrupted one."""

    @classmethod
    def like(cls, other: Any) -> PromptSampler:
        cut = (other.data_source, other.mini_repeat_count, other.batch_size, other.repeat_count)
        return cls(*cut, shuffle=other.shuffle, seed=other.seed)

    def set_epoch(self, epoch: int) -> None:
        """Called before every epoch; TRL's draws one permutation for each, from one generator."""
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


def begin_epoch(loader: Any, epoch: int) -> None:
    """Tell the `PromptSampler` of a data loader, if there is one, which epoch begins.

    transformers reaches no deeper than two samplers: not the one of a run on several processes that
    is resumed, which lies within one that takes shares, within one that skips.
    """
    sampler = loader
    while sampler is not None and not isinstance(sampler, PromptSampler):
        # Asked for by None: that of a stream has no length, and so no truth value.
        within = (getattr(sampler, name, None) for name in ("batch_sampler", "sampler"))
        sampler = next((one for one in within if one is not None), None)
    if sampler is not None:
        sampler.set_epoch(epoch)


def together(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many batches of the same completions, and as large, in the order of their prompts: those
    of one prompt lie in as few batches as can be. What is no completion's stays where it is."""
    sizes = [len(batch["prompt_ids"]) for batch in batches]
    ids = torch.cat([batch["prompt_ids"] for batch in batches])
    order = ids.unique(dim=0, return_inverse=True)[1].argsort(stable=True)
    parts = order.split(sizes)
    made = [dict(batch) for batch in batches]
    for name, first in batches[0].items():
        if isinstance(first, Tensor) and first.ndim and len(first) == sizes[0]:
            whole = torch.cat([batch[name] for batch in batches])
            for batch, part in zip(made, parts, strict=True):
                batch[name] = whole[part]
    return made


def table(batches: Sequence[dict[str, Any]]) -> Tensor:
    """What a rank tells of the completions (n, 4) of its batches, in the order of `COLUMNS`."""
    columns = (torch.cat([batch[name].double() for batch in batches]) for name in COLUMNS)
    return torch.stack(tuple(columns), 1)


def from_table(rows: Tensor) -> tuple[Weighted, Tensor]:
    """The prompts of completions (n, 4), and which of them each completion (n,) belongs to.

    The loss of a prompt is minus its mean reward. A prompt whose completions could not be scored
    (its value is NaN) is masked.
    """
    numbers, place = rows[:, 0].unique(return_inverse=True)
    found = rows.new_zeros(len(numbers), rows.shape[1])
    found[place] = rows  # all completions of a prompt say the same
    _, values, nominal, groups = found.unbind(1)
    scored = ~values.isnan()
    values, nominal = torch.where(scored, values, 0), torch.where(scored, nominal, 0)
    return Weighted(-values, nominal, groups.long()), place


def identity(prompt: Any) -> int:
    """A number for a prompt that is the same in every process and run, below 2^63."""
    return (
        int.from_bytes(hashlib.blake2b(repr(prompt).encode(), digest_size=8).digest(), "big") >> 1
    )


class PassRates(nn.Module):
    """How often each prompt has passed so far: groups by running pass rate.

    Buffers ``known`` (k,) int64, the prompts' identities, and ``counts`` (k, 2) float64, passes and
    tries. They grow as prompts are met, and are saved with checkpoints.
    """

    grows = True  # a checkpoint's buffers are of whatever length
    known: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("known", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(0, 2, dtype=torch.float64))

    def record(self, identities: Tensor, passes: Tensor, tries: Tensor) -> None:
        """Add passes and tries (n,) of prompts (n,), the same one more than once or not."""
        every, place = torch.cat([self.known, identities.cpu()]).unique(return_inverse=True)
        counts = torch.cat([self.counts, torch.stack([passes, tries], 1).double().cpu()])
        self.counts = counts.new_zeros(len(every), 2).index_add(0, place, counts)
        self.known = every

    def rates(self, identities: Tensor) -> Tensor:
        """Passes / tries (n,) of prompts (n,), float64; NaN for one that has not been tried."""
        if not len(self.known):
            return torch.full(identities.shape, torch.nan, dtype=torch.float64)
        place = torch.searchsorted(self.known, identities.cpu()).clamp(max=len(self.known) - 1)
        passes, tries = self.counts[place].unbind(1)
        met = (self.known[place] == identities.cpu()) & (tries > 0)
        return torch.where(met, passes / tries, torch.nan)

    def groups(self, identities: Tensor, num_groups: int) -> Tensor:
        """Group floor(rate G) (n,) in [0, G), of G equal parts of [0, 1]; 0, the hardest, without
        a try."""
        rates = self.rates(identities).nan_to_num(0.0)
        return (rates * num_groups).long().clamp(0, num_groups - 1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in ("known", "counts"):
            setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *rest)
