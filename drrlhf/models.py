"""Models in directories or on the hub, whole or as adapters of another: what they are, and loading.

Training, stress test and rewards ask this module, so that each reads what the others leave.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

ADAPTER = "adapter_config.json"
# Beside trained adapters those that training began with, as TRL saves them: the policy's reference.
REFERENCE = "ref"
REWARD, POLICY = "SequenceClassification", "CausalLM"
_TASKS = {"SEQ_CLS": REWARD, "CAUSAL_LM": POLICY}
_ENDS = {"ForSequenceClassification": REWARD, "ForCausalLM": POLICY, "HeadModel": POLICY}


class Description(NamedTuple):
    """What lies under a name: ``kind`` is `REWARD`, `POLICY`, or None for anything else;
    ``found`` the architecture or the task of adapters; ``labels`` those of a whole reward model;
    ``adapters`` the settings of adapters, None for a whole model."""

    kind: str | None
    found: str
    labels: int | None
    adapters: dict[str, Any] | None


def describe(name: str | Path) -> Description:
    """What lies in a directory or, for what is none, under a hub name.

    Raises:
        ValueError: a directory without a model.
        OSError: no such name on the hub, or no way to ask it.
    """
    from transformers import AutoConfig

    try:
        if (adapters := adapters_of(name)) is not None:
            found = str(adapters.get("task_type"))
            return Description(_TASKS.get(found), found, None, adapters)
        folder = Path(name)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(f"{name}: no directory with a config.json or {ADAPTER} in it")
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise OSError(
            f"{name}: neither a directory here nor a model that the hub gives: {error}"
        ) from error
    found = (config.architectures or ["?"])[0]
    kind = next((kind for end, kind in _ENDS.items() if found.endswith(end)), None)
    return Description(kind, found, config.num_labels if kind == REWARD else None, None)


def kind_of(directory: str | Path) -> str:
    """Whether a reward model or a policy lies in a directory, whole or as adapters.

    Raises:
        ValueError: neither.
    """
    if not Path(directory).is_dir():
        raise ValueError(f"{directory}: no directory with a config.json or {ADAPTER} in it")
    described = describe(directory)
    if described.kind is None:
        raise ValueError(
            f"{directory}: expected a reward model (sequence classification) or a causal language "
            f"model, got {described.found}"
        )
    return described.kind


def adapters_of(name: str | Path) -> dict[str, Any] | None:
    """The settings of adapters in a directory or under a hub name; None where there are none."""
    path: Any = Path(name) / ADAPTER
    if not Path(name).is_dir():
        from transformers.utils.peft_utils import find_adapter_config_file

        path = find_adapter_config_file(str(name))
    if path is None or not Path(path).is_file():
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))


def has_reference(directory: str | Path) -> bool:
    """Whether a directory holds, beside adapters, those that their training began with."""
    return (Path(directory) / REFERENCE / ADAPTER).is_file()


def is_path(name: str) -> bool:
    """Whether a name is that of a directory, which may be missing, and none of the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def base_of(name: str | Path) -> str:
    """The model under adapters; the name itself of a whole model.

    Raises:
        ValueError: the directory of the model under adapters is not there.
    """
    adapters = adapters_of(name)
    if adapters is None:
        return str(name)
    base = str(adapters["base_model_name_or_path"])
    if is_path(base) and not Path(base).is_dir():
        raise ValueError(
            f"{name}: adapters of the model in {base}, which is not there; put it there, or its "
            f"new place into base_model_name_or_path of {ADAPTER}"
        )
    return base


def pad_token_id_of(name: str | Path, **found: Any) -> int | None:
    """The pad token that a saved reward model was trained with; ``found`` says how transformers
    finds it: ``revision``, ``trust_remote_code`` and the like.

    Its configuration says it. A trainer sets it on the model in memory, and saves it beside
    adapters only with the tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    if adapters_of(name) is not None:
        return AutoTokenizer.from_pretrained(name, **found).pad_token_id
    return AutoConfig.from_pretrained(name, **found).get_text_config().pad_token_id


def load(name: str | Path, kind: str, dtype: Any = None, *, trainable: bool = False) -> Any:
    """A model of a kind: a whole one of transformers, or a ``PeftModel`` of adapters on theirs.

    A reward model has one label. A policy's adapters become a reward model's with a new head.

    Raises:
        ValueError: the directory of the model under adapters is not there, or they do not fit it.
    """
    import transformers

    auto = getattr(transformers, f"AutoModelFor{kind}")
    adapters = adapters_of(name)
    if adapters is None:
        return auto.from_pretrained(name, dtype=dtype)
    import peft

    # A base model of adapters does not say how many labels it gets; a reward model has one.
    labels = {"num_labels": 1} if kind == REWARD else {}
    base, noise = base_of(name), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # of a new head: that of the adapters replaces it
    try:
        model = auto.from_pretrained(base, dtype=dtype, **labels)
    finally:
        transformers.logging.set_verbosity(noise)
    if kind == REWARD:
        model.config.get_text_config().pad_token_id = pad_token_id_of(name)
    config = peft.PeftConfig.from_pretrained(str(name))
    config.inference_mode = not trainable
    task = next(task for task, one in _TASKS.items() if one == kind)
    try:
        if config.task_type != task:  # the head is new, and one of the adapters' own
            config.task_type = task
            adapted = peft.get_peft_model(model, config)
            began = peft.get_peft_model_state_dict(adapted) | peft.load_peft_weights(str(name))
            peft.set_peft_model_state_dict(adapted, began)
            return adapted
        return peft.PeftModel.from_pretrained(
            model, str(name), config=config, is_trainable=trainable
        )
    except RuntimeError as error:  # shapes
        raise ValueError(f"{name}: its adapters do not fit {base}: {error}") from error
