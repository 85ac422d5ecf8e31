"""What a user can set of a run: sections of the config, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detection.errors import UserError, first_line

PRECISIONS = ("fp32", "bf16", "fp16")

Section = TypeVar("Section")


def read_section(kind: type[Section], name: str, config: Mapping[str, Any]) -> Section:
    """A section of a config as the dataclass that says what may be in it.

    Args:
        kind: of fields that OmegaConf knows; it checks their ranges itself.
        name: of the section, for messages.

    Raises:
        UserError: naming the key and what it takes.
    """
    try:
        section = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), config))
    except OmegaConfBaseException as error:
        raise UserError(f"{name}.{error.full_key}: {first_line(error)}") from error
    assert isinstance(section, kind)
    return section


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How to evaluate; the `evaluation` section of a config.

    Args:
        batch_size: images at a time.
        num_workers: loader processes.
        backend: what computes AP: "pycocotools" or "hotcoco".
        num_pictures: so many images are drawn.
        picture_score_threshold: least score of a detection that is drawn.
    """

    batch_size: int = 16
    num_workers: int = 2
    backend: str = "pycocotools"
    num_pictures: int = 12
    picture_score_threshold: float = 0.4

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_workers", 0), ("num_pictures", 0)):
            if getattr(self, name) < least:
                raise UserError(f"evaluation.{name}={getattr(self, name)}: give at least {least}")
        threshold = self.picture_score_threshold
        if not 0 <= threshold <= 1:
            raise UserError(f"evaluation.picture_score_threshold={threshold}: give one from 0 to 1")


@dataclass(kw_only=True)
class TrainerSettings:
    """How to train, counted in optimizer steps; the `trainer` section of a config.

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
    ema_decay: float | None = 0.999
    channels_last: bool = True
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

    def __post_init__(self) -> None:
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
