"""Padding-free batches: the model sees the tokens of all sequences in one row, and no padding.

TRL's trainers hand a padded batch to the model and read padded outputs. `PaddingFree` stands in
between: it takes the padding out, calls the model on one packed row, and lays the outputs of each
token (or sequence) out as TRL expects them. Attention stays within a sequence: by flash attention
where the model uses that, else sequence by sequence with PyTorch's. What a model does outside
of attention is not ours to know: before its first packed row it is probed (`probe`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GenericForSequenceClassification

from drrlhf import reward_inputs
from drrlhf.trl import probe
from drrlhf.trl.probe import Numbers

ATTENTION = "drrlhf_packed"
# Keyword under which the lengths of the packed sequences travel to the attention layers.
LENGTHS = "packed_lengths"
# What TRL's fused head gives for each token.
TOKEN_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Models whose numbers a packed row has been seen to keep.
_believed: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


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
    _believed.discard(base)
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
    """Stands in for a model: takes and gives padded tensors, and runs it on one packed row.

    The first row of a model is preceded by a probe: whether it gives sequences in a packed row the
    numbers that it gives them alone, up to ``longest`` tokens (None: any number).

    Raises:
        ValueError: it does not, as models do that carry a state or a convolution along the row.
    """

    def __init__(self, model: Any, longest: int | None = None) -> None:
        self.model = model
        # Without what wraps it for adapters or for several processes.
        self.base = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
        self.longest = longest

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if labels is None and kwargs.get("fused_lm_head") is None and not _head_of(self.model):
            # logits that TRL only shows: padded, as it wants them
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if self.base not in _believed:
            options = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}
            self._probe(self.base, input_ids.device, labels is not None, options)
            _believed.add(self.base)
        return self._packed(input_ids, attention_mask, labels, kwargs)

    def _packed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Any:
        kept = attention_mask.bool()
        lengths = attention_mask.sum(1).tolist()
        row: dict[str, Any] = {
            "input_ids": input_ids[kept][None],
            "position_ids": (attention_mask.cumsum(1) - 1)[kept][None],
            LENGTHS: lengths,
        }
        if "flash" in self.base.config._attn_implementation:
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

    def _probe(
        self, base: PreTrainedModel, device: torch.device, labelled: bool, options: dict[str, Any]
    ) -> None:
        """ValueError if a packed row changes the model's numbers; `labelled` if these are those
        of tokens, not scores."""

        def numbers(outputs: Any, hidden: list[Tensor]) -> list[Numbers]:
            found = outputs.log_probs if labelled else outputs.logits
            parts = (
                part[: len(h) - 1, None] if labelled else part.reshape(1, -1)
                for part, h in zip(found, hidden, strict=True)
            )
            return [Numbers(p.float(), h.float()) for p, h in zip(parts, hidden, strict=True)]

        def alone(ids: Tensor) -> tuple[list[Numbers], float]:
            ids = ids.to(device)
            labels = {"labels": ids} if labelled else {}
            with _as_loaded(base), probe.listening(base.base_model) as heard:
                outputs = self.model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **labels, **options
                )
            return numbers(outputs, list(heard[-1].hidden)), heard[-1].unit

        def together(sequences: list[Tensor]) -> list[Numbers]:
            lengths = [len(ids) for ids in sequences]
            pad = reward_inputs.pad_token_id(base) or 0
            batch = reward_inputs.padded(sequences, pad, device)
            labels = batch["input_ids"] if labelled else None
            with probe.listening(base.base_model) as heard:
                outputs = self._packed(**batch, labels=labels, kwargs=options)
            return numbers(outputs, list(heard[-1].hidden[0].split(lengths)))

        with probe.quietly(self.model, device):
            words = probe.difference(base.config, alone, together, self.longest)
        if words is not None:
            raise ValueError(
                f"padding_free: use padding_free=False for {type(base).__name__}, which does not "
                f"give the sequences of a packed row the numbers that they have alone: {words}"
            )

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


@contextlib.contextmanager
def _as_loaded(base: PreTrainedModel) -> Iterator[None]:
    """The attention that the model had before `prepare`, for a while."""
    if base.config._attn_implementation != ATTENTION:
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(ATTENTION)


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
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
