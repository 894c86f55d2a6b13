"""What a reward model is given, and where it reads its score.

A sequence classifier of transformers scores the last token that is not its pad token, whatever the
attention mask says. With pad = eos, as for tokenizers without a pad token of their own, that is the
token before the end; with another filling than its pad token it is some token of the padding.
Training, stress test and GRPO's rewards ask this module, so that a text has one score everywhere.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def reward_ids(tokenizer: Any, prompt: Any, answer: Any, **template: Any) -> list[int]:
    """Tokens of a prompt followed by an answer, as TRL's ``RewardTrainer`` makes them.

    A standard answer (a string) ends with the end token, where the tokenizer has one; messages are
    laid out by the chat template. ``template`` goes to `apply_chat_template`.

    Raises:
        ValueError: there is no token that a score could be read at.
    """
    if isinstance(answer, str):
        end = tokenizer.eos_token or ""
        text = (prompt or "") + answer
        ids: list[int] = tokenizer(text if text.endswith(end) else text + end)["input_ids"]
        if not ids:
            raise ValueError(
                f"answer: expected a text of at least one token, got {text!r} for a tokenizer that "
                "begins and ends none; leave such texts out"
            )
        return ids
    messages = [*(prompt or []), *answer]
    return tokenizer.apply_chat_template(messages, return_dict=True, **template)["input_ids"]


def pair_ids(tokenizer: Any, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """`reward_ids` of both answers of a row, in the columns in which TRL takes them."""
    template = template_arguments(row)
    return {
        f"{side}_ids": reward_ids(tokenizer, row.get("prompt"), row[side], **template)
        for side in ("chosen", "rejected")
    }


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns ``tools`` (a list, or its JSON) and ``chat_template_kwargs`` of a row say to
    the chat template."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}


def pad_token_id(model: Any) -> int | None:
    """The id that a classifier skips when it looks for the last token; None: it skips nothing."""
    return _text_config(model).pad_token_id


def score_positions(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """Where a sequence classifier reads the score of each row: (n,) positions in (n, L) tokens.

    It is the last token that is not ``pad_token_id``, the first one where every token is, and the
    last one of the row without a pad token
    (``transformers.modeling_layers.GenericForSequenceClassification``).
    """
    n, length = input_ids.shape
    if pad_token_id is None:
        return torch.full((n,), length - 1, device=input_ids.device)
    places = torch.arange(length, device=input_ids.device)
    return (places * (input_ids != pad_token_id)).amax(1)


def scoring_layer(model: Any) -> Any:
    """The layer that scores each token in a causal reward model; None in any other model."""
    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "score"]
    return found[0] if found else None


def check_adapters(model: Any) -> None:
    """ValueError for adapters with which a reward model does not find the last token of a row.

    Those that put learned tokens before a prompt hand the model embeddings in place of ids, among
    which it knows no padding: it scores the last place of the row, whatever stands there.
    """
    config: Any = getattr(_unwrapped(model), "active_peft_config", None)
    learns_prompt = getattr(config, "is_prompt_learning", False)
    if not learns_prompt or config.peft_type == "PREFIX_TUNING":  # which leaves the ids as they are
        return
    if scoring_layer(model) is not None:
        raise ValueError(
            f"peft_config: expected adapters that leave the ids of tokens to a reward model that "
            f"scores the last one, got {config.peft_type.value}, with which it would score the "
            "padding behind a shorter answer; use LoRA, or an encoder as the reward model"
        )


def padded(ids: Sequence[Any], filling: int, device: Any) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (n, L) of sequences, filled up on the right."""
    rows = [torch.as_tensor(one) for one in ids]

    def laid_out(tensors: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, True, value).to(device)

    return {
        "input_ids": laid_out(rows, filling),
        "attention_mask": laid_out([torch.ones_like(row) for row in rows], 0),
    }


@torch.inference_mode()
def scores(model: Any, ids: Sequence[Sequence[int]], device: Any) -> Tensor:
    """The scores (n,) that a classifier of one label gives sequences, in one padded batch: each is
    the one that the sequence has alone. Raises what `check_adapters` does."""
    check_adapters(model)
    with filling_up(model, ids) as filling:
        return model(**padded(ids, filling, device)).logits[:, 0]


@contextlib.contextmanager
def filling_up(model: Any, ids: Sequence[Any]) -> Iterator[int]:
    """The token with which a batch of sequences is filled up and that the model skips meanwhile:
    its pad token, or one with which no sequence ends, for without a pad token a classifier reads
    the last token of a row, and takes no batch."""
    config = _text_config(model)
    own = config.pad_token_id
    filling = _ends_none(ids) if own is None else own
    try:
        config.pad_token_id = filling
        yield filling
    finally:
        config.pad_token_id = own


def check_padding(batch: Mapping[str, Any], pad_token_id: int | None) -> None:
    """ValueError where a batch of several rows is filled up with what the model does not skip."""
    ids = batch["input_ids"]
    filling = ids[batch["attention_mask"] == 0]
    if pad_token_id is not None and not bool((filling == pad_token_id).all()):
        wrong = int(filling[filling != pad_token_id][0])
        raise ValueError(
            f"data_collator: it pads with token {wrong}, and the model scores the last token that "
            f"is not its pad token {pad_token_id}: it would score padding. Let the collator pad "
            f"with {pad_token_id}, or set config.pad_token_id of the model to {wrong}."
        )


def _ends_none(ids: Sequence[Any]) -> int:
    """The smallest token id with which no sequence ends."""
    ends = {int(one[-1]) for one in ids}
    return next(i for i in range(len(ends) + 1) if i not in ends)


def _text_config(model: Any) -> Any:
    return _unwrapped(model).config.get_text_config()


def _unwrapped(model: Any) -> Any:
    """The model without what wraps it for several processes."""
    while hasattr(model, "module"):
        model = model.module
    return model
