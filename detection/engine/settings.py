"""What a user can set of a training run; the `trainer` section of the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detection.errors import UserError, first_line

PRECISIONS = ("fp32", "bf16", "fp16")


def check_evaluation(config: Mapping[str, Any]) -> None:
    """See that the numbers of an `evaluation` section are in range.

    Raises:
        UserError: naming the key and what it takes.
    """
    for name, least in (("batch_size", 1), ("num_workers", 0), ("num_pictures", 0)):
        if not isinstance(config[name], int) or config[name] < least:
            raise UserError(
                f"evaluation.{name}={config[name]}: give a whole number from {least} on"
            )
    threshold = config["picture_score_threshold"]
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise UserError(f"evaluation.picture_score_threshold={threshold}: give one from 0 to 1")


@dataclass(kw_only=True)
class TrainerSettings:
    """How to train, counted in optimizer steps.

    Args:
        steps: length of the run.
        batch_size: images a step, over all processes and micro-batches.
        num_micro_batches: a step's batch is run in so many parts (gradient accumulation).
        num_workers: loader processes for each training process; changes no result.
        image_cache: keep decoded training images in "ram" or on "disk"; changes no result.
        image_cache_folder: of "disk"; None is in the user's cache folder.
        precision: "fp32", or mixed "bf16" or "fp16".
        gradient_clip_norm: largest norm of the gradient; None does not clip.
        ema_decay: of the moving average of the weights; None keeps none.
        channels_last: run the network in this memory format.
        keep_memory: on a CPU, memory freed in a step stays with the process for the next; changes
            no result.
        freeze_batch_norm: batch norm in inference mode from the start.
        sync_batch_norm: batch statistics over all processes (GPU only).
        deterministic: only deterministic kernels (matters on a GPU).
        log_every: steps between lines of metrics.
        evaluate_every: steps between evaluations; the last step always has one.
        checkpoint_every: steps between writes of last.pt; None writes at evaluations.
        keep_last: so many of the newest checkpoints are kept, last.pt among them; best.pt besides.
        early_stopping: stop after so many evaluations without a better AP; None never does.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    steps: int
    batch_size: int
    num_micro_batches: int = 1
    num_workers: int = 2
    image_cache: str | None = None
    image_cache_folder: str | None = None
    precision: str = "fp32"
    gradient_clip_norm: float | None = None
    ema_decay: float | None = None
    channels_last: bool = False
    keep_memory: bool = True
    freeze_batch_norm: bool = False
    sync_batch_norm: bool = False
    deterministic: bool = False
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int | None = None
    keep_last: int = 2
    early_stopping: int | None = None
    device: str = "auto"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TrainerSettings:
        """Check types and ranges.

        Raises:
            UserError: naming the key and what it takes.
        """
        try:
            settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), config))
        except OmegaConfBaseException as error:
            reason = first_line(error)
            raise UserError(f"trainer.{error.full_key}: {reason}") from error
        assert isinstance(settings, cls)
        settings._check()
        return settings

    def check_shares(self, world_size: int) -> None:
        """See that the batch can be shared out to processes and micro-batches.

        Raises:
            UserError: where a share is uneven, or too small for batch norm.
        """
        num_shares = world_size * self.num_micro_batches
        if self.batch_size % num_shares:
            raise UserError(
                f"trainer.batch_size={self.batch_size} cannot be shared by {world_size} "
                f"process(es) with {self.num_micro_batches} micro-batch(es) each: "
                f"give a multiple of {num_shares}"
            )
        if self.batch_size == num_shares and not self.freeze_batch_norm:
            raise UserError(
                f"trainer.batch_size={self.batch_size} leaves one image a micro-batch, and batch "
                "norm needs two: give a larger batch, or trainer.freeze_batch_norm=true"
            )

    def _check(self) -> None:
        counts = ("steps", "batch_size", "num_micro_batches", "log_every", "evaluate_every")
        for name in (*counts, "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name}={getattr(self, name)}: give at least 1")
        for name in ("checkpoint_every", "early_stopping"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"trainer.{name}={getattr(self, name)}: give at least 1, or null")
        if self.num_workers < 0:
            raise UserError(f"trainer.num_workers={self.num_workers}: give 0 or more")
        if self.image_cache not in (None, "ram", "disk"):
            raise UserError(f"trainer.image_cache={self.image_cache}: give ram, disk or null")
        if self.image_cache_folder is not None and self.image_cache != "disk":
            raise UserError(
                "trainer.image_cache_folder is for trainer.image_cache=disk: set both or neither"
            )
        if self.precision not in PRECISIONS:
            raise UserError(
                f"trainer.precision={self.precision}: give one of {', '.join(PRECISIONS)}"
            )
        if self.gradient_clip_norm is not None and self.gradient_clip_norm <= 0:
            raise UserError("trainer.gradient_clip_norm: give a positive norm, or null")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError("trainer.ema_decay: give a number between 0 and 1, or null")
