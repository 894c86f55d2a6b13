"""A model whose sequences lie in one row: without padding, and with common prompts once.

TRL's trainers hand a padded batch to the model and read padded outputs. `OneRow` stands in
between: it lays the tokens out (`layout`), calls the model on one row, and lays the outputs of each
token (or sequence) out as TRL expects them. Attention follows the layout block by block
(`attention`), or by flash attention where the model uses that. What a model does outside
of attention is not ours to know: before its first row it is probed (`probe`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from drrlhf import reward_inputs
from drrlhf.layouts import layout, probe
from drrlhf.layouts.attention import ATTENTION, BLOCKS, one_row
from drrlhf.layouts.layout import Block, Layout
from drrlhf.layouts.probe import Numbers

# What TRL's fused head gives for each token.
TOKEN_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Tensors (n, L) that are laid out as the tokens are.
PER_TOKEN = ("token_type_ids",)
# "auto" shares where at least this part of a batch's tokens is saved: see FACTS.md.
WORTH_SHARING = 0.05

# What each kind of row is called in messages.
_ROWS = {
    "packed": "a packed row",
    "shared": "a row with their common prompt once",
    "left": "a batch padded on the left",
}
# What the probe of each model said of a layout, for sequences of at most so many tokens: None, or
# in words how its numbers change there.
_verdicts: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, int | None], str | None]] = (
    weakref.WeakKeyDictionary()
)
# The last row with common prompts once, until it is asked for again: policy and reference ask for
# the same one in turn, and on a GPU each answer waits for all work before it.
_shared: Any = WeakTensorKeyDictionary()


def _shared_row(input_ids: Tensor, attention_mask: Tensor) -> Layout:
    known = _shared.pop(input_ids, None)
    # What is made in inference mode is written by nobody who counts.
    versions = (0 if x.is_inference() else x._version for x in (attention_mask, input_ids))
    asked = attention_mask, *versions
    if known is not None and known[0][0] is asked[0] and known[0][1:] == asked[1:]:
        return known[1]
    found = layout.shared(input_ids, attention_mask)
    _shared.clear()
    _shared[input_ids] = asked, found
    return found


def _without_adapters(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def obstacle(model: Any) -> str | None:
    """Why the attention of ``model`` cannot take rows of several sequences, as "for MODEL: …"; None
    if it can, as far as its configuration tells: it is no causal decoder, names no layers below its
    head, its attention is neither PyTorch's nor flash attention, or it puts tokens of its own
    before every sequence."""
    base = _without_adapters(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "with prompt-learning adapters, whose tokens it would lose"
    adapters = getattr(model, "peft_config", None) or {}
    if any(getattr(one, "alora_invocation_tokens", None) for one in adapters.values()):
        return "with activated LoRA, which looks for one invocation in each row"
    text = base.config.get_text_config()
    sequence = isinstance(base, GenericForSequenceClassification)
    causal = getattr(text, "is_causal", True) and (sequence or hasattr(base, "lm_head"))
    if not causal or text is not base.config or getattr(text, "is_encoder_decoder", False):
        return (
            f"for {type(base).__name__}: it needs a causal text decoder, whose last "
            "token alone sees the whole sequence"
        )
    if base.base_model is base:  # what it gives below its head cannot be asked for
        return f"for {type(base).__name__}: it has nothing under its base_model_prefix"
    used = base.config._attn_implementation
    if "flash" in used or used in ("sdpa", ATTENTION):
        return None
    return (
        f"with attn_implementation={used!r}, whose mask over a whole row costs "
        "more than padding does; or load the model with 'sdpa' or flash attention"
    )


def sharing_obstacle(model: Any) -> str | None:
    """As `obstacle`, for rows with common prompts once."""
    used = _without_adapters(model).config._attn_implementation
    if "flash" in used:
        return (
            f"with attn_implementation={used!r}, which cannot show a prompt to several answers; "
            "or load the model with 'sdpa'"
        )
    return obstacle(model)


def prepare(model: Any) -> None:
    """Let the attention of ``model``, of which `obstacle` says nothing, take rows."""
    base = _without_adapters(model)
    if base.config._attn_implementation == "sdpa":
        _verdicts.pop(base, None)
        base.set_attn_implementation(ATTENTION)


def _release(base: PreTrainedModel) -> None:
    """Undo `prepare`: some models read off the name of their attention what else they do."""
    if base.config._attn_implementation == ATTENTION:
        base.set_attn_implementation("sdpa")


def in_rows(model: Any, longest: int | None = None) -> OneRow | None:
    """A model to score texts with, by rows without padding in which prompts lie once; None if it
    does not keep its numbers there."""
    if sharing_obstacle(model) is not None:
        return None
    prepare(model)
    row = OneRow(model, packed="auto", share="auto", longest=longest)
    return row if row.keeps_numbers() else None


class OneRow:
    """Stands in for a model: takes and gives padded tensors, and runs it on one row of tokens.

    Args:
        model: prepared by `prepare`; what wraps it for adapters or several processes may be around.
        packed: batches without common prompts lie in one row too; "auto", if the model keeps its
            numbers in rows; else they go padded.
        share: "auto", common prompts lie in the row once where that saves enough tokens and the
            model keeps its numbers there; True, wherever two sequences begin alike; False, never.
        longest: the most tokens of a sequence, as far as the model is tried; None is any number.
        left: batches are padded on the left, and those that are not laid in a row must have the
            same numbers as those that are.
        notice: told, in a sentence, what becomes of common prompts.
        padded: what is called in place of the model for a batch that is not laid in a row.

    The first row of a model is preceded by a probe: whether it gives sequences in such a row the
    numbers that it gives them alone.

    Raises:
        ValueError: it does not, as models do that carry a state or a convolution along the row
            (with ``packed``, or ``share=True``).
    """

    def __init__(
        self,
        model: Any,
        *,
        packed: bool | str,
        share: bool | str,
        longest: int | None = None,
        left: bool = False,
        notice: Callable[[str], None] = lambda message: None,
        padded: Any = None,
    ) -> None:
        self.model = model
        self.padded = model if padded is None else padded
        # Without what wraps it for adapters or for several processes.
        self.base = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
        self.scoring = reward_inputs.scoring_layer(model)
        self.packed, self.share, self.longest, self.left = packed, share, longest, left
        self.notice = notice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        labelled = {} if labels is None else {"labels": labels}
        if labels is None and kwargs.get("fused_lm_head") is None and self.scoring is None:
            # logits that TRL only shows: padded, as it wants them
            return self.model(**given, **kwargs)
        asked = "score" if labels is None else "log_probs"
        found = self._layout(input_ids, attention_mask, asked, kwargs)
        if found is None:
            return self.padded(**given, **labelled, **kwargs)
        return self._in_row(found, input_ids, attention_mask, labels, kwargs)

    def predictions(self, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor) -> Tensor:
        """The logits (N, V) of a language model before the N tokens ``wanted`` (n, L - 1), of
        which that at place t is token t + 1."""
        found = self._layout(input_ids, attention_mask, "hidden", {})
        if found is None:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            return logits[:, :-1][wanted]
        row = self._row(found, input_ids, {})
        with one_row(), _only(self.base.base_model, found.places[:, :-1][wanted], found):
            return self.model(**row).logits[0]

    def keeps_numbers(self) -> bool:
        """Whether the model gives sequences in a row, prompts shared, what it gives them alone:
        hidden states, and a classifier's scores."""
        asked = "hidden" if self.scoring is None else "score"
        return self._keeps("shared", self.base.device, asked, {}) is None

    def _layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        asked: str,
        kwargs: Mapping[str, Any],
    ) -> Layout | None:
        """Where the tokens are to lie; None: padded."""
        unknown = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in PER_TOKEN]
        options = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}
        # Before anything of the batch is asked: every rank probes at the same call.
        kinds = ("shared", "left") if self.left else ("shared",)
        kept = self.share and all(
            self._keeps(kind, input_ids.device, asked, options) is None for kind in kinds
        )
        if kept:
            found = _shared_row(input_ids, attention_mask)
            enough = WORTH_SHARING if self.share == "auto" else 0.0
            if not unknown and found.saved > enough:
                self.notice(
                    f"share_prompts={self.share!r}: a batch of {found.total} tokens becomes a row "
                    f"of {len(found.tokens)}, its prompts once"
                )
                return found
        if not self.packed or (self.packed == "auto" and not kept):
            return None
        if not kept:  # rows with prompts once are more than rows without padding
            self._keeps("packed", input_ids.device, asked, options)
        return layout.packed(input_ids, attention_mask)

    def _keeps(
        self, kind: str, device: torch.device, asked: str, options: dict[str, Any]
    ) -> str | None:
        """None if the model keeps its numbers in a layout of that kind, else how they change.

        Raises:
            ValueError: it does not, and was asked to take such rows.
        """
        verdicts, tried = _verdicts.setdefault(self.base, {}), (kind, self.longest)
        if tried not in verdicts:
            verdicts[tried] = self._probe(kind, device, asked, options)
        words = verdicts[tried]
        if words is None:
            return None
        changed = (
            f"for {type(self.base).__name__}, which does not give the sequences of "
            f"{_ROWS[kind]} the numbers that they have alone: {words}"
        )
        if kind != "packed" and self.share == "auto":
            self.notice(f"share_prompts='auto': prompts are not shared {changed}")
            if self.packed is not True:  # then no row is left
                _release(self.base)
                for other in [one for one, said in verdicts.items() if said is None]:
                    del verdicts[other]  # said of the attention that is gone
            return words
        del verdicts[tried]  # what is refused is tried again
        option = "padding_free" if kind == "packed" else "share_prompts"
        raise ValueError(f"{option}: use {option}=False {changed}")

    def _row(self, found: Layout, input_ids: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What the model is called with for a row."""
        row: dict[str, Any] = {
            "input_ids": input_ids.flatten()[found.tokens][None],
            "position_ids": found.positions[None],
            "use_cache": False,  # a row is never gone on with
        }
        for name, given in kwargs.items():
            laid = name in PER_TOKEN and given is not None
            row[name] = given.flatten()[found.tokens][None] if laid else given
        if "flash" in self.base.config._attn_implementation:
            return row | _flash_arguments(found.blocks, input_ids.device)
        return row | {BLOCKS: found.blocks}

    def _in_row(
        self,
        found: Layout,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> Any:
        row = self._row(found, input_ids, kwargs)
        if labels is None:
            return self._scores(found, row, input_ids)
        # A token is predicted where the one before it lies, in its own sequence.
        wanted = (labels[:, 1:] != -100) & attention_mask[:, 1:].bool()
        wanted &= attention_mask[:, :-1].bool()
        predicting = found.places[:, :-1][wanted]
        asked = labels[:, 1:][wanted]
        if not len(asked):  # the outputs stay connected to the model
            predicting, asked = predicting.new_zeros(1), asked.new_full((1,), -100)
        with one_row(), _only(self.base.base_model, predicting, found):
            outputs = self.model(**row, shift_labels=asked[None])
        for name in TOKEN_OUTPUTS:
            given = getattr(outputs, name, None)
            if given is not None:
                laid = given.new_zeros(wanted.shape).masked_scatter(wanted, given[0])
                setattr(outputs, name, laid)
        return outputs

    def _scores(self, found: Layout, row: dict[str, Any], input_ids: Tensor) -> Any:
        """A reward model's outputs, with the scores that it would read in the padded batch."""
        with one_row(), _listening(self.scoring) as heard:
            outputs = self.model(**row)
        pad = reward_inputs.pad_token_id(self.model)
        if pad is None and len(input_ids) > 1:  # as the model itself says of a padded batch
            raise ValueError(
                "pad_token_id: expected the token that the batch is filled up with in the model's "
                "configuration, got None; set config.pad_token_id"
            )
        read = reward_inputs.score_positions(input_ids, pad).unsqueeze(1)
        outputs.logits = heard[-1][0][found.places.gather(1, read).squeeze(1)]
        return outputs

    def _probe(
        self, kind: str, device: torch.device, asked: str, options: dict[str, Any]
    ) -> str | None:
        """How a layout of that kind changes the model's numbers, in words; None if it does not."""

        def numbers(outputs: Any, hidden: list[Tensor]) -> list[Numbers]:
            if asked == "hidden" or kind == "left":
                return [Numbers(h.float(), h.float()) for h in hidden]
            found = outputs.log_probs if asked == "log_probs" else outputs.logits
            parts = (
                part[: len(h) - 1, None] if asked == "log_probs" else part.reshape(1, -1)
                for part, h in zip(found, hidden, strict=True)
            )
            return [Numbers(p.float(), h.float()) for p, h in zip(parts, hidden, strict=True)]

        def headless() -> contextlib.AbstractContextManager[None]:
            """Where hidden states are all that is asked for, a head has one token a row to read:
            the logits of thousands would take much memory, and nobody looks at them."""
            backbone = self.base.base_model
            return _first_token(backbone) if asked == "hidden" else contextlib.nullcontext()

        def alone(ids: Tensor) -> tuple[list[Numbers], float]:
            ids = ids.to(device)
            labels = {"labels": ids} if asked == "log_probs" else {}
            with (
                as_loaded(self.base),
                probe.listening(self.base.base_model) as heard,
                headless(),
                reward_inputs.filling_up(self.base, list(ids)),
            ):
                outputs = self.model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **labels, **options
                )
            return numbers(outputs, list(heard[-1].hidden)), heard[-1].unit

        def together(sequences: list[Tensor]) -> list[Numbers]:
            with (
                probe.listening(self.base.base_model) as heard,
                reward_inputs.filling_up(self.base, sequences) as pad,
            ):
                batch = reward_inputs.padded(sequences, pad, device)
                found = getattr(layout, kind)(**batch)
                if asked == "hidden":
                    with one_row(), headless():
                        outputs = self.model(**self._row(found, batch["input_ids"], options))
                else:
                    labels = batch["input_ids"] if asked == "log_probs" else None
                    outputs = self._in_row(found, **batch, labels=labels, kwargs=options)
            hidden = heard[-1].hidden[0]
            return numbers(
                outputs,
                [hidden[places[: len(ids)]] for places, ids in zip(found.places, sequences)],
            )

        def on_the_left(sequences: list[Tensor]) -> list[Numbers]:
            pad = reward_inputs.pad_token_id(self.base) or 0
            turned = reward_inputs.padded([ids.flip(0) for ids in sequences], pad, device)
            batch = {name: tensor.flip(1) for name, tensor in turned.items()}
            labels = {"labels": batch["input_ids"]} if asked == "log_probs" else {}
            with probe.listening(self.base.base_model) as heard:
                outputs = self.model(**batch, **labels, **options)
            of_all = zip(heard[-1].hidden, sequences, strict=True)
            return numbers(outputs, [hidden[-len(ids) :] for hidden, ids in of_all])

        class Refused(Exception):
            """The model raised an error at a row, which it did not alone."""

        def tried(sequences: list[Tensor]) -> list[Numbers]:
            try:
                return (on_the_left if kind == "left" else together)(sequences)
            except Exception as error:
                raise Refused(f"it raises {type(error).__name__}: {error}") from error

        # On the left a long sequence has only to be longer than the short ones: these are padded.
        longest = 2 * max(probe.SHORT) if kind == "left" else self.longest
        with probe.quietly(self.model, device):
            try:
                return probe.difference(
                    self.base.config, alone, tried, longest, common=kind == "shared"
                )
            except Refused as refused:
                return str(refused)


@contextlib.contextmanager
def _only(backbone: torch.nn.Module, predicting: Tensor, found: Layout) -> Iterator[None]:
    """Inside, a model without its head gives the hidden states (1, N, D) of N tokens of the row,
    and what routed every token of every sequence, as if each lay there for itself."""

    def select(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, predicting]
        routed = getattr(output, "router_logits", None)
        if routed is not None:
            every = found.places[found.places >= 0]
            output.router_logits = tuple(one[every] for one in routed)
        return output

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _first_token(backbone: torch.nn.Module) -> Iterator[None]:
    """Inside, a model without its head gives the hidden state of each row's first token."""

    def select(module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, tuple):
            output.last_hidden_state = output.last_hidden_state[:, :1]

    handle = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def as_loaded(model: Any) -> Iterator[None]:
    """The attention that the model had before `prepare`, for a while."""
    base = _without_adapters(model)
    if base.config._attn_implementation != ATTENTION:
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(ATTENTION)


@contextlib.contextmanager
def _listening(module: Any) -> Iterator[list[Tensor]]:
    """What a module gives while the block runs."""
    heard: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: heard.append(output))
    try:
        yield heard
    finally:
        handle.remove()


def _flash_arguments(blocks: tuple[Block, ...], device: torch.device) -> dict[str, Any]:
    bounds = torch.tensor([0, *(block.stop for block in blocks)], device=device, dtype=torch.int32)
    longest = max(block.stop - block.start for block in blocks)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
