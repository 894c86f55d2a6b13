"""What `padding_free` and `share_prompts` mean to a trainer: how its models are called."""

from __future__ import annotations

from typing import Any

from accelerate.logging import get_logger

from drrlhf.layouts import model as layouts

logger = get_logger(__name__)


class OneRowMixin:
    """Reads ``args.padding_free`` and ``args.share_prompts``, and runs the models accordingly."""

    args: Any
    accelerator: Any
    _padding_free = False
    _share: bool | str = False
    _noticed = False
    _rows_ready = False
    _pads_left = False  # whether the trainer fills batches up on the left

    def _read_rows(self, config: Any) -> None:
        self._padding_free = bool(getattr(config, "padding_free", False))
        # TRL's own configuration has none, and gets the default.
        self._share = getattr(config, "share_prompts", "auto")
        if self._share == "auto" and getattr(config, "torch_compile", False):
            self._share = False
            self._notice(
                "share_prompts='auto': prompts are not shared with torch_compile, which would "
                "compile anew for every row"
            )
        if getattr(config, "neftune_noise_alpha", None) is None:
            return
        why = "with neftune_noise_alpha, whose noise is smaller the longer a row is"
        if self._share == "auto":
            self._share = False
            self._notice(f"share_prompts='auto': prompts are not shared {why}")
        for option, taken in (("padding_free", self._padding_free), ("share_prompts", self._share)):
            if taken:
                raise ValueError(f"{option}: use {option}=False {why}")

    def _prepare_rows(self, *models: Any) -> None:
        """Let the models (or None) take rows of several sequences.

        Raises:
            ValueError: one cannot, and was asked to.
        """
        unwrapped = self._unwrapped(*models)
        for model in unwrapped:
            if self._padding_free and (why := layouts.obstacle(model)):
                raise ValueError(f"padding_free: use padding_free=False {why}")
            if not self._share or not (why := layouts.sharing_obstacle(model)):
                continue
            if self._share is True:
                raise ValueError(f"share_prompts: use share_prompts=False {why}")
            self._share = False
            self._notice(f"share_prompts='auto': prompts are not shared {why}")
        if self._in_rows:
            for model in unwrapped:
                layouts.prepare(model)
        self._rows_ready = True

    def _unwrapped(self, *models: Any) -> list[Any]:
        """The models, or None, without what wraps them for several processes."""
        return [self.accelerator.unwrap_model(m) for m in models if m is not None]

    @property
    def _in_rows(self) -> bool:
        """Whether batches may lie in one row."""
        return bool(self._padding_free or self._share)

    def _runner(self, model: Any) -> Any:
        """What to call for the outputs of a padded batch."""
        if not self._rows_ready:  # TRL may ask the reference before the trainer is made
            self._prepare_rows(model)
            self._rows_ready = False
        padded = self._for_padded(model)
        if not self._in_rows:
            return padded
        return layouts.OneRow(
            model,
            padded=padded,
            packed=self._padding_free,
            share=self._share,
            longest=getattr(self.args, "max_length", None),
            left=self._pads_left,
            notice=self._notice,
        )

    def _for_padded(self, model: Any) -> Any:
        """What to call for a batch that is not laid in a row."""
        return model

    def _notice(self, message: str) -> None:
        """Says once what becomes of common prompts."""
        if not self._noticed:
            logger.info(message)
        self._noticed = True
