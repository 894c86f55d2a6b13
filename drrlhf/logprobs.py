"""Log-probabilities of tokens and sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from drrlhf import head_memory, ops
from drrlhf.checks import (
    check_choice,
    check_device,
    check_floating,
    check_none,
    check_tensor,
    integers,
)
from drrlhf.conventions import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGIT
from drrlhf.precision import multiplied_in

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _checked_labels(
    labels: Tensor, lead: tuple[int, ...], vocabulary: int, ignore_index: int
) -> Tensor:
    """The labels in int64; ValueError unless they are one for each row, and known or ignored."""
    labels = integers("labels", labels)
    if tuple(labels.shape) != lead:
        raise ValueError(
            f"labels: expected shape {lead}, one label for each row, got {tuple(labels.shape)}"
        )
    check_none(
        lambda: (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary)),
        lambda read, *place: (
            f"labels: expected values in [0, {vocabulary}) or ignore_index={ignore_index}, got "
            f"{int(read(labels)[place])} at position {place}"
        ),
        labels,
    )
    return labels


def _check_options(temperature: float, softcap: float | None) -> None:
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def _check_spendable(logits: Tensor) -> None:
    """ValueError unless the gradient may be written over logits that have one."""
    if not logits.requires_grad:
        return
    view = logits._is_view()
    if (logits._base if view else logits).is_leaf:  # type: ignore[union-attr]
        raise ValueError(
            f"inplace_backward: expected logits that an operation made, got a "
            f"{'view of a ' if view else ''}leaf tensor, whose values the backward would destroy; "
            "leave it False"
        )
    # Every dimension must step over all that those of smaller strides reach.
    reach = 0
    for stride, size in sorted(zip(logits.stride(), logits.shape)):
        if size > 1 and stride <= reach and logits.numel():
            raise ValueError(
                "inplace_backward: expected logits whose entries have memory of their own, got "
                f"shape {tuple(logits.shape)} with strides {logits.stride()}, whose entries share "
                "some; call .contiguous() or leave it False"
            )
        reach += (size - 1) * stride


class TokenLogprobs(NamedTuple):
    """What the token log-probs come with when `outputs` asks for more; None where it did not.

    logps (...), entropy (...), logsumexp (...), mean_logit (...) and log_sum_sq_probs (...) =
    log sum_v p_v^2, all of the transformed logits z; is_top1 (...) bool: the label is the first of
    the largest. 0 (False) where the label is ignored. Gradients flow to logps and entropy alone.
    """

    logps: Tensor
    entropy: Tensor | None
    logsumexp: Tensor | None
    mean_logit: Tensor | None
    is_top1: Tensor | None
    log_sum_sq_probs: Tensor | None


# Of each output, what the ops are asked for it, and what they call it.
_OUTPUTS = {
    "entropy": (ENTROPY, "entropy"),
    "logsumexp": (0, "lse"),
    "mean_logit": (MEAN_LOGIT, "mean_logit"),
    "is_top1": (IS_TOP1, "is_top1"),
    "log_sum_sq_probs": (LOG_SUM_SQ_PROBS, "log_sum_sq_probs"),
}


def _check_outputs(outputs: Sequence[str]) -> int:
    if isinstance(outputs, str):
        raise ValueError(
            f"outputs: expected a sequence of names such as {(outputs,)}, got a string"
        )
    bits = 0
    for name in outputs:
        check_choice("outputs", name, tuple(_OUTPUTS))
        bits |= _OUTPUTS[name][0]
    return bits


def _result(found: Any, outputs: Sequence[str]) -> Tensor | TokenLogprobs:
    if not outputs:
        return found.logp
    wanted = {
        name: getattr(found, op_name) if name in outputs else None
        for name, (_, op_name) in _OUTPUTS.items()
    }
    return TokenLogprobs(found.logp, **wanted)


class LogitOptions(TypedDict, total=False):
    """Options of the logits, see `token_logprobs`."""

    ignore_index: int
    temperature: float
    softcap: float | None


class TokenOptions(LogitOptions, total=False):
    """The options of `token_logprobs`."""

    inplace_backward: bool


class HeadOptions(LogitOptions, total=False):
    """The options of `linear_token_logprobs`."""

    logit_scale: float
    memory_budget: int | None


@overload
def token_logprobs(  # type: ignore[overload-overlap]
    logits: Tensor, labels: Tensor, *, outputs: tuple[()] = ..., **options: Unpack[TokenOptions]
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor, labels: Tensor, *, outputs: Sequence[str], **options: Unpack[TokenOptions]
) -> TokenLogprobs: ...
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = (),
    inplace_backward: bool = False,
) -> Tensor | TokenLogprobs:
    """Log-probability of each label under its row of logits, in one pass over them.

    logp_t = z_t[y_t] - log sum_v exp z_t[v], z = softcap tanh(logits / softcap) / temperature.
    Equal inputs give equal bits; a row's do not depend on the others, if all begin on 16 bytes.

    Args:
        logits: (..., V), aligned with the labels (already shifted); float32, bfloat16, float16
            or float64. Statistics are float32 (float64 for float64).
        labels: (...), any integer dtype. `ignore_index` gives exactly 0 and no gradient.
        outputs: names of `TokenLogprobs` wanted besides the log-probs, from the same pass.
        inplace_backward: write the gradient over the logits, which are then spent: no second
            tensor of their size, unless neighbouring entries of a row lie apart or, on a GPU, rows
            in groups of fewer than 16; such logits are copied. The gradient of a part such as
            x[:, :-1] PyTorch copies into one of the whole: rather give all of x, with labels
            shifted and the last ignored. Logits must be neither a leaf nor a view of one, nor share
            memory among their entries; a second backward raises. Compiled graphs plan their own
            memory and ignore it, as `torch.func` does.

    Returns:
        (...), float32, or float64 for float64 logits; a `TokenLogprobs` of such if `outputs` names
        any. Differentiable once by the logits.

    Raises:
        ValueError: shapes, dtypes, labels outside [0, V), temperature or softcap not in (0, inf),
            unknown outputs, logits that inplace_backward must not write over.
    """
    check_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    _check_options(temperature, softcap)
    bits = _check_outputs(outputs)
    check_device("labels", labels, "logits", logits)
    labels = _checked_labels(labels, tuple(logits.shape[:-1]), logits.shape[-1], ignore_index)
    op: Any = ops.token_logprobs
    if inplace_backward and not torch.compiler.is_compiling() and not ops.transformed():
        _check_spendable(logits)
        op = ops.token_logprobs_in_place
    return _result(op(logits, labels, ignore_index, float(temperature), softcap, bits), outputs)


@overload
def linear_token_logprobs(  # type: ignore[overload-overlap]
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    outputs: tuple[()] = ...,
    **options: Unpack[HeadOptions],
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    outputs: Sequence[str],
    **options: Unpack[HeadOptions],
) -> TokenLogprobs: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: Sequence[str] = (),
    memory_budget: int | None = None,
) -> Tensor | TokenLogprobs:
    """Token log-probs from hidden states and the output head: `token_logprobs` of
    (hidden weight^T + bias) logit_scale, which are never held all at once and never rounded to a
    narrow dtype (but by the backend `cuda`, which works on what the library's product gives).

    In units of one product hidden weight^T: scoring without gradients costs 1; with a head that
    needs no gradient (LoRA) forward and backward cost 2, for the forward keeps
    weight[y] - softmax weight for every token and the backward scales its rows; with a trained
    head 4, or 3 where the budget holds all tokens' softmax. Ignored labels, and in the backward
    tokens whose upstream gradient is exactly 0, take no part in any product.

    Equal inputs give equal bits. A token's log-prob does not depend on who else is in the batch
    where Triton serves; elsewhere the library orders its sums by the size of a product.

    Args:
        hidden: (..., D) hidden states that predict the labels.
        weight: (V, D) output head, of the hidden states' dtype; bias (V,).
        labels: (...), any integer dtype; `ignore_index` gives exactly 0 and no gradient.
        outputs: names of `TokenLogprobs` wanted besides the log-probs, from the same pass.
        memory_budget: bytes to hold beside the inputs, the gradients, float32 sums of those of
            `hidden`, and copies of its counted rows; default 256 MiB, on a GPU 576 MiB. Of it at
            most 48 MiB (512 MiB) are logits on their way. The softmax of a trained head, tokens V
            itemsize bytes, is kept if it fits in the rest, and computed again otherwise. One row
            of logits, on a GPU one row of tiles, is always held.

    Returns:
        (...), float32, or float64 for float64 inputs; a `TokenLogprobs` of such if `outputs` names
        any. Under autocast the inputs are taken in its dtype, but for float64. Differentiable once.

    Raises:
        ValueError: shapes, dtypes that differ, labels outside [0, V), options not > 0, unknown
            outputs.
    """
    for name, value in (("hidden", hidden), ("weight", weight)):
        check_floating(name, value)
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected shape (V, D) with D = {hidden.shape[-1] if hidden.dim() else '?'} "
            f"as hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(
            f"weight: expected shape (V, D) with V >= 1 and D >= 1, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor("bias", bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale: expected a finite number but 0, got {logit_scale!r}")
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget: expected bytes >= 0, got {memory_budget!r}")
    _check_options(temperature, softcap)
    bits = _check_outputs(outputs)
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        check_device(name, tensor, "hidden", hidden)
    labels = _checked_labels(labels, tuple(hidden.shape[:-1]), weight.shape[0], ignore_index)
    if not hidden.is_meta:
        hidden, weight = (one.to(multiplied_in(one)) for one in (hidden, weight))
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"weight: expected {hidden.dtype} as hidden, got {weight.dtype}; cast one of them"
        )
    learning = torch.is_grad_enabled()
    need_head = learning and (weight.requires_grad or (bias is not None and bias.requires_grad))
    need_hidden = learning and hidden.requires_grad
    plan = head_memory.plan(labels.numel(), weight, need_hidden, need_head, memory_budget)
    found = ops.linear_token_logprobs(
        hidden,
        weight,
        bias,
        labels,
        ignore_index,
        float(temperature),
        softcap,
        float(logit_scale),
        bits,
        *plan,
    )
    return _result(found, outputs)


def sequence_logprobs(
    logps: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    reduction: str = "sum",
    ignore_index: int = -100,
) -> Tensor:
    """Log-probability of each sequence: the sum (or mean) of its tokens' log-probs.

    Args:
        logps: (B, L) padded, or (T,) packed with `cu_seqlens`. Entries whose label is
            `ignore_index` do not count, even when NaN.
        labels: the labels that `logps` belong to, same shape, any integer dtype.
        cu_seqlens: (S+1,) integer boundaries: 0, ..., T, not decreasing; sequence s is
            logps[cu_seqlens[s]:cu_seqlens[s+1]].
        reduction: "sum", or "mean" over counted tokens (0 for a sequence that has none).

    Returns:
        (B,) or (S,), float32, or float64 for float64 logps.

    Raises:
        ValueError: shapes, dtypes, an unknown reduction, boundaries that are not as above.
    """
    check_floating("logps", logps)
    labels = integers("labels", labels)
    if labels.shape != logps.shape:
        raise ValueError(
            f"labels: expected shape {tuple(logps.shape)} as logps, got {tuple(labels.shape)}"
        )
    check_device("labels", labels, "logps", logps)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    check_layout("logps", logps, cu_seqlens)
    return ops.sequence_logprobs(logps, labels, cu_seqlens, ignore_index, reduction == "mean")


def check_layout(
    name: str, x: Tensor, cu_seqlens: Tensor | None, padded: str = "(B, L)", hint: str = ""
) -> int:
    """The number of sequences that x, called `name`, has the tokens of.

    ValueError unless it is padded (B, L), which messages call `padded`, or packed (T,) with
    `cu_seqlens` (S+1,) that run from 0 to T and never decrease; `hint`: what else to do.
    """
    if cu_seqlens is None:
        if x.dim() != 2:
            raise ValueError(
                f"{name}: expected padded {padded}, got {tuple(x.shape)}; packed (T,) needs "
                "cu_seqlens"
            )
        return x.shape[0]
    if x.dim() != 1:
        raise ValueError(
            f"{name}: expected packed (T,) with cu_seqlens, got {tuple(x.shape)}{hint}"
        )
    check_device("cu_seqlens", cu_seqlens, name, x)
    cu_seqlens = integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens: expected shape (S+1,), got {tuple(cu_seqlens.shape)}")
    check_none(
        lambda: (
            (cu_seqlens[0] != 0)
            | (cu_seqlens[-1] != x.shape[0])
            | (cu_seqlens[1:] < cu_seqlens[:-1]).any()
        ),
        lambda read: (
            f"cu_seqlens: expected boundaries from 0 to {x.shape[0]}, not decreasing, got "
            f"{read(cu_seqlens).tolist()[:8]}{'...' if cu_seqlens.numel() > 8 else ''}"
        ),
        cu_seqlens,
    )
    return cu_seqlens.shape[0] - 1
