"""Log-probabilities of tokens and sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from drrlhf import ops, reference
from drrlhf.checks import check_floating, check_integer, check_value


def _check_labels(
    labels: Tensor, lead: tuple[int, ...], vocabulary: int, ignore_index: int
) -> None:
    check_integer("labels", labels)
    if tuple(labels.shape) != lead:
        raise ValueError(
            f"labels: expected shape {lead}, one label for each row, got {tuple(labels.shape)}"
        )
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    check_value(
        ~outside.any(),
        lambda: (
            f"labels: expected values in [0, {vocabulary}) or ignore_index={ignore_index}, got "
            f"{int(labels[outside][0])} at position {tuple(outside.nonzero()[0].tolist())}"
        ),
        labels,
    )


def _check_options(temperature: float, softcap: float | None) -> None:
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a number > 0, got {value!r}")


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability of each label under its row of logits.

    logp_t = z_t[y_t] - log sum_v exp z_t[v], z = softcap tanh(logits / softcap) / temperature.

    Args:
        logits: (..., V), aligned with the labels (already shifted); float32, bfloat16, float16
            or float64. Statistics are float32 (float64 for float64).
        labels: (...), any integer dtype. `ignore_index` gives exactly 0 and no gradient.

    Returns:
        (...), float32, or float64 for float64 logits. Differentiable once by the logits.

    Raises:
        ValueError: shapes, dtypes, labels outside [0, V), temperature or softcap not > 0.
    """
    check_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    _check_options(temperature, softcap)
    _check_labels(labels, tuple(logits.shape[:-1]), logits.shape[-1], ignore_index)
    return ops.token_logprobs(logits, labels, ignore_index, float(temperature), softcap)[0]


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
) -> Tensor:
    """Token log-probs from hidden states and the output head: `token_logprobs` of
    (hidden weight^T + bias) logit_scale, whose products and sums stay in float32.

    Args:
        hidden: (..., D) hidden states that predict the labels.
        weight: (V, D) output head, of the hidden states' dtype; bias (V,).
        labels: (...), any integer dtype; `ignore_index` gives exactly 0 and no gradient.

    Returns:
        (...), float32, or float64 for float64 inputs. Under autocast the inputs are taken in its
        dtype, and the logits are still float32.

    Raises:
        ValueError: shapes, dtypes that differ, labels outside [0, V), options not > 0.
    """
    for name, value in (("hidden", hidden), ("weight", weight)):
        check_floating(name, value)
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected shape (V, D) with D = {hidden.shape[-1] if hidden.dim() else '?'} "
            f"as hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise ValueError(
            f"weight: expected {hidden.dtype} as hidden, got {weight.dtype}; cast one of them"
        )
    with torch.autocast(hidden.device.type, enabled=False):
        logits = reference.linear_logits(hidden, weight, bias, logit_scale)
        return token_logprobs(
            logits, labels, ignore_index=ignore_index, temperature=temperature, softcap=softcap
        )


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
        labels: the labels that `logps` belong to, same shape.
        cu_seqlens: (S+1,) integer boundaries: 0, ..., T, not decreasing; sequence s is
            logps[cu_seqlens[s]:cu_seqlens[s+1]].
        reduction: "sum", or "mean" over counted tokens (0 for a sequence that has none).

    Returns:
        (B,) or (S,), float32, or float64 for float64 logps.

    Raises:
        ValueError: shapes, dtypes, an unknown reduction, boundaries that are not as above.
    """
    check_floating("logps", logps)
    if labels.shape != logps.shape:
        raise ValueError(
            f"labels: expected shape {tuple(logps.shape)} as logps, got {tuple(labels.shape)}"
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    if cu_seqlens is None:
        if logps.dim() != 2:
            raise ValueError(
                f"logps: expected padded (B, L), got {tuple(logps.shape)}; packed (T,) needs "
                "cu_seqlens"
            )
    else:
        _check_boundaries(cu_seqlens, logps)
    valid = labels != ignore_index
    return reference.sequence_logprobs(logps, valid, cu_seqlens, reduction == "mean")


def _check_boundaries(cu_seqlens: Tensor, logps: Tensor) -> None:
    if logps.dim() != 1:
        raise ValueError(f"logps: expected packed (T,) with cu_seqlens, got {tuple(logps.shape)}")
    check_integer("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens: expected shape (S+1,), got {tuple(cu_seqlens.shape)}")
    ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == logps.numel())
    check_value(
        ends & (cu_seqlens[1:] >= cu_seqlens[:-1]).all(),
        lambda: (
            f"cu_seqlens: expected boundaries from 0 to {logps.numel()}, not decreasing, got "
            f"{cu_seqlens.tolist()[:8]}{'...' if cu_seqlens.numel() > 8 else ''}"
        ),
        cu_seqlens,
    )
