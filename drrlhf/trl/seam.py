"""Every place where we hold on to TRL and transformers, and the check that it is still there.

TRL renames its internals between minor releases. A seam that is gone must be one clear ImportError
at import, not a training run with the wrong loss: importing this module runs the check. What the
bodies of upstream's methods read is no user's business: tests/trl/test_trl_upstream.py holds the
versions in `TESTED` to it, and any other is warned of.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

SUPPORTED = ">=1.16,<2"
TESTED = ">=1.16,<1.17"  # as pyproject.toml asks for

# (class, method, its parameters in order)
_METHODS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "trl.trainer.dpo_trainer:DPOTrainer",
        "_compute_loss",
        ("self", "model", "inputs", "return_outputs"),
    ),
    (
        "trl.trainer.dpo_trainer:DPOTrainer",
        "compute_ref_log_probs",
        ("self", "model", "inputs"),
    ),
    (
        "trl.trainer.reward_trainer:RewardTrainer",
        "compute_loss",
        ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    ),
    (
        "trl.trainer.grpo_trainer:GRPOTrainer",
        "_compute_loss",
        ("self", "model", "inputs"),
    ),
    (
        "trl.trainer.grpo_trainer:GRPOTrainer",
        "_get_per_token_logps_and_entropies",
        (
            *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
            *("compute_entropy", "compute_aux_loss", "pixel_values", "image_grid_thw"),
            *("num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes"),
            *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
        ),
    ),
    (
        "trl.trainer.grpo_trainer:GRPOTrainer",
        "_generate_single_turn",
        (
            *("self", "prompt_ids", "images", "multimodal_fields", "num_generations"),
            "has_tool_images",
        ),
    ),
    (
        "trl.trainer.grpo_trainer:GRPOTrainer",
        "_generate_and_score_completions",
        ("self", "inputs"),
    ),
    (
        "trl.trainer.grpo_trainer:GRPOTrainer",
        "_prepare_inputs",
        ("self", "generation_batch"),
    ),
    (
        "trl.trainer.grpo_trainer:GRPOTrainer",
        "_get_train_sampler",
        ("self", "dataset"),
    ),
    (
        "trl.trainer.utils:RepeatSampler",
        "__init__",
        (
            *("self", "data_source", "mini_repeat_count", "batch_size", "repeat_count"),
            *("shuffle", "seed"),
        ),
    ),
    (
        "trl.trainer.grpo_trainer:GRPOTrainer",
        "training_step",
        ("self", "model", "inputs", "num_items_in_batch"),
    ),
    *(
        (trainer, "_set_signature_columns_if_needed", ("self",))
        for trainer in (
            "trl.trainer.dpo_trainer:DPOTrainer",
            "trl.trainer.reward_trainer:RewardTrainer",
            "trl.trainer.grpo_trainer:GRPOTrainer",
        )
    ),
    (
        "transformers.trainer:Trainer",
        "get_batch_samples",
        ("self", "epoch_iterator", "num_batches", "device"),
    ),
    (
        "transformers.trainer:Trainer",
        "training_step",
        ("self", "model", "inputs", "num_items_in_batch"),
    ),
    (
        "transformers.trainer:Trainer",
        "_run_epoch",
        (
            *("self", "model", "epoch", "train_dataloader", "steps_in_epoch"),
            *("num_update_steps_per_epoch", "trial", "ignore_keys_for_eval", "start_time"),
            *("resume_from_checkpoint", "epochs_trained", "steps_trained_in_current_epoch"),
        ),
    ),
    (
        "transformers.trainer:Trainer",
        "evaluation_loop",
        (
            *("self", "dataloader", "description", "prediction_loss_only", "ignore_keys"),
            "metric_key_prefix",
        ),
    ),
    (
        "transformers.trainer:Trainer",
        "_save_checkpoint",
        ("self", "model", "trial"),
    ),
    (
        "transformers.trainer:Trainer",
        "_save_optimizer_and_scheduler",
        ("self", "output_dir"),
    ),
    (
        "transformers.trainer:Trainer",
        "_load_optimizer_and_scheduler",
        ("self", "checkpoint"),
    ),
)

# (module or class, function, its parameters in order)
_FUNCTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "trl.trainer.utils",
        "add_fused_lm_head",
        ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    ),
    ("trl.trainer.utils", "maybe_gather_lm_head_ctx", ("params",)),
    ("trl.kernels.chunked_logprob", "_use_triton", ("device",)),
    (
        "trl.kernels.chunked_logprob:ChunkedLogProbFunction",
        "forward",
        (
            *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
            *("final_logit_softcapping", "logit_scale", "outputs"),
        ),
    ),
)
# What the fused forward looks up anew on every call, and what our head puts something else for.
HEAD_NAMES = ("_ChunkedLogProbFunction", "_use_triton")
HEAD_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# (configuration, the fields that are read from it)
_FIELDS: tuple[tuple[str, frozenset[str]], ...] = (
    (
        "trl.trainer.dpo_config:DPOConfig",
        frozenset({"loss_type", "loss_weights", "label_smoothing", "discopop_tau"})
        | frozenset({"beta", "f_divergence_type", "f_alpha_divergence_coef"})
        | frozenset({"gradient_accumulation_steps"}),
    ),
    (
        "trl.trainer.grpo_config:GRPOConfig",
        frozenset({"loss_type", "importance_sampling_level", "beta", "epsilon", "epsilon_high"})
        | frozenset({"delta", "top_entropy_quantile", "off_policy_mask_threshold", "entropy_coef"})
        | frozenset({"use_adaptive_entropy", "use_bias_correction_kl", "steps_per_generation"})
        | frozenset({"vllm_importance_sampling_correction", "max_completion_length"}),
    ),
    (
        "trl.trainer.reward_config:RewardConfig",
        frozenset({"center_rewards_coefficient", "gradient_accumulation_steps"}),
    ),
)


class SeamMovedError(ImportError):
    """A TRL or transformers internal that the trainers rest on is gone or has changed."""


def check() -> None:
    """Verify that TRL is installed, has a supported version and has every seam used here; warn of a
    version that is supported and not tested.

    Raises:
        ImportError: TRL is not installed, or its version is outside ``SUPPORTED``.
        SeamMovedError: (an ImportError) an attribute, a method or its parameters have changed; the
            message names it, the version found, the versions supported and what to do.
    """
    version = _trl_version()
    _warn_of_untested(version)
    for owner, method, parameters in _METHODS:
        _check_function(version, owner, method, parameters)
    check_head()
    for config, needed in _FIELDS:
        missing = needed - {field.name for field in fields(_find(version, config))}
        if missing:
            raise _moved(version, f"{config} no longer has the field {min(missing)!r}")


def check_head() -> None:
    """Verify that TRL's fused head is where `drrlhf.trl.head` replaces it, and takes what it took.

    Raises:
        ImportError, SeamMovedError: as `check`.
    """
    version = _trl_version()
    for owner, function, parameters in _FUNCTIONS:
        _check_function(version, owner, function, parameters)
    for name in HEAD_NAMES:
        _find(version, f"trl.trainer.utils:{name}")
    outputs = tuple(_find(version, "trl.kernels.chunked_logprob:OPTIONAL_OUTPUTS"))
    if outputs != HEAD_OUTPUTS:
        raise _moved(version, f"its head's outputs are {outputs}, expected {HEAD_OUTPUTS}")


def _trl_version() -> str:
    try:
        import trl
    except ModuleNotFoundError as error:
        if error.name != "trl":  # TRL is there, something below it is not: that name matters
            raise
        raise ImportError(
            "drrlhf.trl needs TRL, which is not installed. Run: pip install 'drrlhf[trl]'"
        ) from error
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    if not SpecifierSet(SUPPORTED).contains(Version(trl.__version__), prereleases=True):
        raise ImportError(
            f"drrlhf.trl supports trl{SUPPORTED}, found trl {trl.__version__}. "
            f"Run: pip install 'trl{TESTED}'"
        )
    return trl.__version__


def _warn_of_untested(version: str) -> None:
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(TESTED).contains(version, prereleases=True):
        warnings.warn(
            f"drrlhf.trl is tested with trl{TESTED}, found trl {version}, of which only names and "
            f"parameters were checked. For a tested one: pip install 'trl{TESTED}'",
            stacklevel=3,
        )


def _check_function(version: str, owner: str, method: str, parameters: tuple[str, ...]) -> None:
    function = getattr(_find(version, owner), method, None)
    if function is None:
        raise _moved(version, f"{owner}.{method} is gone")
    found = tuple(inspect.signature(function).parameters)
    if found != parameters:
        raise _moved(version, f"{owner}.{method} takes {found}, expected {parameters}")


def _find(version: str, owner: str) -> Any:
    module, _, name = owner.partition(":")
    try:
        found = importlib.import_module(module)
        return getattr(found, name) if name else found
    except (ModuleNotFoundError, AttributeError) as error:
        raise _moved(version, f"{owner} is gone") from error


def _moved(version: str, what: str) -> SeamMovedError:
    return SeamMovedError(
        f"drrlhf.trl cannot work with trl {version}: {what}. Supported: trl{SUPPORTED}, of which "
        f"{TESTED} is tested. Install such a one (pip install 'trl{TESTED}'), or a newer drrlhf."
    )


class Recorder:
    """Stands in for the model inside TRL's loss: forwards every call, keeps the first outputs.

    TRL calls the model once for the loss, and perhaps again for logits that are only shown.
    ``after`` runs right after that first call.
    """

    def __init__(self, model: Callable[..., Any], after: Callable[[], None] | None = None) -> None:
        self.model = model
        self._after = after
        self._outputs: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs)
        if self._outputs is None:
            self._outputs = outputs
            if self._after is not None:
                self._after()
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def output(self, name: str) -> Any:
        """The named field of the recorded outputs; SeamMovedError when it is not there."""
        value = getattr(self._outputs, name, None)
        if value is None:
            raise _moved(_trl_version(), f"the model's outputs in the loss have no {name!r}")
        return value


@contextlib.contextmanager
def overridden(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes of ``target`` for the length of a ``with`` block, whatever happens in it.

    Raises:
        SeamMovedError: ``target`` has none of such a name.
    """
    for name in values:
        if not hasattr(target, name):  # nothing would read it
            raise _moved(_trl_version(), f"{type(target).__name__} no longer has {name!r}")
    own = {name: vars(target)[name] for name in values if name in vars(target)}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name in values:
            if name in own:
                setattr(target, name, own[name])
            else:
                delattr(target, name)  # the class's shows again


check()
