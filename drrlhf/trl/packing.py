"""Padding-free batches: the model sees the tokens of all sequences in one row, and no padding.

TRL's trainers hand a padded batch to the model and read padded outputs. `PaddingFree` stands in
between: it takes the padding out, calls the model on one packed row, and lays the outputs of each
token (or sequence) out as TRL expects them. Attention stays within a sequence: by flash attention
where the model uses that, else sequence by sequence with PyTorch's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GenericForSequenceClassification

from drrlhf import reward_inputs

ATTENTION = "drrlhf_packed"
# Keyword under which the lengths of the packed sequences travel to the attention layers.
LENGTHS = "packed_lengths"
# What TRL's fused head gives for each token.
TOKEN_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention (1, heads, T, width) -> (1, T, heads, width), each packed
    sequence to itself; without packed sequences it is transformers' own."""
    lengths = kwargs.pop(LENGTHS, None)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    parts = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    found = [
        sdpa_attention_forward(module, q, k, v, _band(q, window), **kwargs)[0]
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(found, dim=1), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """The mask (1, 1, L, L) of causal attention to the last `window` tokens; None: just causal."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return (ones.tril() & ~ones.tril(-window))[None, None]


def packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for a packed row, whose sequences are cut apart; else transformers' own."""
    row = kwargs["batch_size"] == 1 and kwargs["q_length"] == kwargs["kv_length"]
    if row and kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, packed_mask)


def prepare(model: Any, argument: str) -> None:
    """Let the attention of `model` take packed rows.

    Raises:
        ValueError: the model cannot: its attention is neither PyTorch's nor flash attention, it is
            no causal decoder, or it puts tokens of its own before every sequence.
    """
    remedy = f"{argument}: use padding_free=False"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(f"{remedy} with prompt-learning adapters, whose tokens it would lose")
    text = base.config.get_text_config()
    sequence = isinstance(base, GenericForSequenceClassification)
    causal = getattr(text, "is_causal", True) and (sequence or hasattr(base, "lm_head"))
    if not causal or text is not base.config or getattr(text, "is_encoder_decoder", False):
        raise ValueError(
            f"{remedy} for {type(base).__name__}: packing needs a causal text decoder, whose last "
            "token alone sees the whole sequence"
        )
    used = base.config._attn_implementation
    if "flash" in used or used == ATTENTION:
        return
    if used != "sdpa":
        raise ValueError(
            f"{remedy} with attn_implementation={used!r}, whose mask over a whole packed row costs "
            "more than padding does; or load the model with 'sdpa' or flash attention"
        )
    base.set_attn_implementation(ATTENTION)


class PaddingFree:
    """Stands in for a model: takes and gives padded tensors, and runs it on one packed row."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if labels is None and kwargs.get("fused_lm_head") is None and not _head_of(self.model):
            # logits that TRL only shows: padded, as it wants them
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        kept = attention_mask.bool()
        lengths = attention_mask.sum(1).tolist()
        row: dict[str, Any] = {
            "input_ids": input_ids[kept][None],
            "position_ids": (attention_mask.cumsum(1) - 1)[kept][None],
            LENGTHS: lengths,
        }
        if "flash" in self.model.config._attn_implementation:
            row |= _flash_arguments(row.pop(LENGTHS), input_ids.device)
        if labels is None:
            return self._scores(row, input_ids, kept, kwargs)
        labels = labels.clone()
        labels[:, 0] = -100  # nothing precedes a first token: before it lies another sequence
        outputs = self.model(**row, labels=labels[kept][None], **kwargs)
        for name in TOKEN_OUTPUTS:
            found = getattr(outputs, name, None)
            if found is not None:
                setattr(outputs, name, _padded(found[0], kept))
        return outputs

    def _scores(
        self, row: dict[str, Any], input_ids: Tensor, kept: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """A reward model's outputs, with the scores that it would read in the padded batch."""
        with _listening(_head_of(self.model)) as heard:
            outputs = self.model(**row, **kwargs)
        pad = reward_inputs.pad_token_id(self.model)
        read = reward_inputs.score_positions(input_ids, pad).unsqueeze(1)
        places = (kept.flatten().cumsum(0) - 1).view_as(kept)  # of each token in the packed row
        outputs.logits = heard[-1][0][places.gather(1, read).squeeze(1)]
        return outputs


def _padded(tokens: Tensor, kept: Tensor) -> Tensor:
    """Outputs (T - 1,) of a packed row, one for each next token, as (2n, L - 1); 0 elsewhere."""
    # Token t was predicted at t - 1; first tokens have no place in the padded layout.
    predicted = torch.ones_like(kept)
    predicted[:, 0] = False
    places = predicted[kept].nonzero().squeeze(1) - 1
    mask = kept[:, 1:]
    return tokens.new_zeros(mask.shape).masked_scatter(mask, tokens[places])


def _head_of(model: Any) -> Any:
    """The layer that scores each token in a reward model; None in a language model."""
    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "score"]
    return found[0] if found else None


@contextlib.contextmanager
def _listening(module: Any) -> Iterator[list[Tensor]]:
    """What a module gives while the block runs."""
    heard: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: heard.append(output))
    try:
        yield heard
    finally:
        handle.remove()


def _flash_arguments(lengths: list[int], device: torch.device) -> dict[str, Any]:
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip
