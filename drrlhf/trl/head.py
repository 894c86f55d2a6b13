"""TRL's fused LM head on `drrlhf.linear_token_logprobs`, and how it gets into TRL.

A model that TRL gave a fused head to (`trl.trainer.utils.add_fused_lm_head`) looks the head up by
name on every call. `patch_head` puts ours under that name, so that it serves every trainer of TRL
that uses the fused head (SFT, DPO, KTO, GRPO, RLOO), models prepared before it included. Our own
trainers put it there for the length of their loss alone.

Beside the head itself one more name is replaced: TRL scores every position, prompts and padding
included, on devices where it has no Triton, and only the counted ones elsewhere. Ours takes the
counted ones on the CPU too.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import _use_triton
from trl.trainer import utils

from drrlhf import backends, linear_token_logprobs
from drrlhf.checks import check_choice
from drrlhf.precision import multiplied_in
from drrlhf.trl import seam

HEADS = ("auto", "drrlhf", "trl")
_READ = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes of heads

# TRL's names of the outputs, and ours; log_probs always comes.
_OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


@dataclass(frozen=True)
class TokenLogprobHead:
    """What stands in for TRL's ``ChunkedLogProbFunction``: `apply` takes and gives the same.

    ``memory_budget`` is that of `drrlhf.linear_token_logprobs`, in bytes; None is its default.
    Without ``extras`` it gives log-probs alone, whatever else the model was prepared for.
    """

    memory_budget: int | None = None
    extras: bool = True

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = seam.HEAD_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs (N,) of the targets, and what else of each token's distribution is asked for.

        The logits are softcap(logit_scale (hidden weight^T + bias)) / temperature; they are never
        rounded to a narrow dtype, as TRL's are.

        Args:
            hidden: (N, D), floating; weight: (V, D); bias: (V,) or None. The products run in
                autocast's dtype where autocast is on, else in the hidden states', to which the
                weight is cast.
            targets: (N,) integers in [0, V); -100 gives 0 and no gradient.
            chunk_size: TRL's tile width; without effect here, the tiles are chosen for the caches.
            outputs: of ``entropy``, ``log_sum_sq_probs``, ``mean_logits``, ``is_top1``;
                ``log_probs`` may be named and always comes.

        Returns:
            (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (N,) or None where
            not asked for; float32 (float64 for float64 hidden states), is_top1 bool. Gradients of
            log_probs and entropy flow to hidden, weight and bias, in their dtypes.

        Raises:
            ValueError: shapes, dtypes, targets outside [0, V), temperature or softcap not in
                (0, inf), logit_scale 0 or not finite, an unknown output.
        """
        for name in outputs:
            check_choice("outputs", name, ("log_probs", *_OUTPUTS))
        wanted = tuple(_OUTPUTS[name] for name in outputs if self.extras and name != "log_probs")
        device, dtype = hidden.device.type, multiplied_in(hidden)
        cast = weight.to(dtype)
        # Where plain PyTorch serves, autocast left on would round its float32 logits as well.
        with (
            torch.autocast(device, enabled=False),
            _recompute_cast_in_backward((weight, cast), (bias, bias)),
        ):
            found = linear_token_logprobs(
                hidden.to(dtype),
                cast,
                targets,
                bias=bias,
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                outputs=wanted,
                memory_budget=self.memory_budget,
            )
        if isinstance(found, Tensor):
            return found, None, None, None, None
        return (
            found.logps,
            found.entropy,
            found.log_sum_sq_probs,
            found.mean_logit,
            found.is_top1,
        )


def _recompute_cast_in_backward(*pairs: tuple[Tensor | None, Tensor | None]) -> Any:
    """A context in which the backward keeps each parameter itself, not what was made of it.

    ``pairs`` are (parameter, what is read of it). Two cases need it. A cast copy of the head is as
    large as the head, and would live from the forward to the backward: casting again is cheap. (A
    compiled graph plans that itself.) And under DeepSpeed ZeRO-3 a parameter is whole only inside
    TRL's gathering context, which is over by the time of the backward: it is entered again there.
    """
    compiling = torch.compiler.is_compiling()
    kept = [
        (parameter, read)
        for parameter, read in pairs
        if parameter is not None
        and read is not None
        and (hasattr(parameter, "ds_status") or (read is not parameter and not compiling))
    ]
    if not kept:
        return contextlib.nullcontext()

    def pack(saved: Tensor) -> Tensor | _DeferredCast:
        for parameter, read in kept:
            if saved.data_ptr() == read.data_ptr() and saved.shape == read.shape:
                return _DeferredCast(parameter, read.dtype, parameter._version)
        return saved

    def unpack(saved: Tensor | _DeferredCast) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved.read()

    return saved_tensors_hooks(pack, unpack)


@dataclass(frozen=True)
class _DeferredCast:
    """A parameter to be read anew in the backward, as `dtype`."""

    parameter: Any
    dtype: torch.dtype
    version: int

    def read(self) -> Tensor:
        # what autograd checks for the tensors that it keeps itself
        if self.parameter._version != self.version:
            raise RuntimeError(
                "the output head was modified in place between its forward and its backward "
                f"(version {self.parameter._version}, expected {self.version}): run the backward "
                "before the optimizer step"
            )
        # The result outlives the context: DeepSpeed frees a parameter by pointing it elsewhere.
        with utils.maybe_gather_lm_head_ctx(self.parameter):
            return self.parameter.detach().to(self.dtype)


# -- where it stands -------------------------------------------------------------------------------


def _only_counted(device: torch.device) -> bool:
    """Stands in for TRL's ``_use_triton`` where that decides whether to leave out positions."""
    return device.type in ("cpu", "cuda") or _use_triton(device)


class HeadPatch:
    """One replacement of TRL's head, from `patch_head`: ends with `remove` or a ``with`` block."""

    def __init__(self, head: Any) -> None:
        _check_place()
        self.head = head
        _patches.append(self)
        _settle()

    def remove(self) -> None:
        """Undo this replacement; what other ones put there stays. A second call does nothing.

        Raises:
            RuntimeError: something else has replaced the head since.
        """
        if self in _patches:
            _check_place()
            _patches.remove(self)
            _settle()

    def __enter__(self) -> HeadPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


# Those in force; the last one's head is in place.
_patches: list[HeadPatch] = []


def patch_head(memory_budget: int | None = None) -> HeadPatch:
    """Give our head to every TRL trainer in this process, until it is undone.

    ::

        patch_head()                    # until unpatch_head()
        with patch_head():              # or for the length of a block
            trl.DPOTrainer(...).train()

    Models that TRL prepared before use it too, at their next call. Calling it again changes nothing
    but the budget. The handle that it returns ends this one call, `unpatch_head` ends all. Code
    that does not go through TRL's fused head, such as its distillation trainer, stays as it is.

    Args:
        memory_budget: of `drrlhf.linear_token_logprobs`, in bytes; None is its default.

    Raises:
        ImportError: TRL is not ``>=1.16,<2``.
        SeamMovedError: (an ImportError) its fused head has moved or changed.
        RuntimeError: something else already stands in the place of TRL's head.
        ValueError: memory_budget is negative.
    """
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget: expected bytes >= 0, got {memory_budget!r}")
    seam.check_head()
    return HeadPatch(TokenLogprobHead(memory_budget))


def unpatch_head() -> None:
    """Put TRL's own head back, however often `patch_head` was called. Without a patch, nothing.

    Raises:
        RuntimeError: something else has replaced the head since.
    """
    if _patches:
        _check_place()
        _patches.clear()
        _settle()


def asked(config: Any) -> str:
    """``config.head``; TRL's own configuration has none, and gets the default."""
    return getattr(config, "head", "auto")


def resolve(head: str, device: str) -> str:
    """``"drrlhf"`` or ``"trl"``, for one of `HEADS` on a type of device."""
    if head != "auto":
        return head
    op = "linear_token_logprobs"
    serving = (row for row in backends.explain() if (row.op, row.device) == (op, device))
    compiled = any(row.chosen and row.backend != "reference" for row in serving)
    return "drrlhf" if compiled else "trl"


def using(head: str, extras: bool = True) -> contextlib.AbstractContextManager[Any]:
    """A ``with`` block in which TRL's models use ``head``, as `resolve` gives it.

    A head of ours that is in place already serves ``"drrlhf"`` with its budget. Without ``extras``
    it gives log-probs alone: a policy with adapters is the reference too, and what TRL prepared it
    to say of each token for its metrics is not read there.

    Raises:
        RuntimeError: something else stands in the place of TRL's head (not for ``"trl"``).
    """
    now: Any = utils._ChunkedLogProbFunction
    ours = isinstance(now, TokenLogprobHead)
    if head == "drrlhf" and not extras:
        return HeadPatch(TokenLogprobHead(now.memory_budget if ours else None, extras=False))
    if ours == (head == "drrlhf"):
        return contextlib.nullcontext()
    return HeadPatch(TokenLogprobHead() if head == "drrlhf" else ChunkedLogProbFunction)


def check(head: str) -> None:
    """Raise what `using` would, so that a trainer can fail before it loads a model."""
    with using(head):
        pass


def check_weights(*models: Any) -> None:
    """ValueError where the numbers of a model's head mean nothing without their scales: TRL and
    we read them as they are, and would take a code for the number itself."""
    for model in models:
        weight = getattr(model.get_output_embeddings(), "weight", None)
        if weight is not None and weight.dtype not in _READ:
            raise ValueError(
                f"model: expected an output head in one of {', '.join(map(str, _READ))}, got "
                f"{weight.dtype}, which is read as it is; leave the head out of the quantization, "
                "as with llm_int8_skip_modules=['lm_head'] in a BitsAndBytesConfig"
            )


def _in_place() -> tuple[Any, Any]:
    """What the two names hold, by what TRL and we put there."""
    head = _patches[-1].head if _patches else ChunkedLogProbFunction
    return head, _only_counted if isinstance(head, TokenLogprobHead) else _use_triton


def _settle() -> None:
    for name, value in zip(seam.HEAD_NAMES, _in_place(), strict=True):
        setattr(utils, name, value)


def _check_place() -> None:
    """RuntimeError unless the two names hold what TRL or our last patch put there."""
    for name, expected in zip(seam.HEAD_NAMES, _in_place(), strict=True):
        found = getattr(utils, name)
        if found is not expected:
            what = f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', found)}"
            raise RuntimeError(
                f"trl.trainer.utils.{name}: expected {expected!r}, found {what}, which something "
                "other than drrlhf put there. Undo that first, or keep it and leave this head out "
                "(head='trl' in drrlhf.trl.DPOConfig)."
            )
