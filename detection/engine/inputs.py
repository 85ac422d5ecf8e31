"""What training steps are given: the images, and what happens to a batch on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detection.augmentation import BatchAugmentation, resize_batch
from detection.data.coco import CocoIndex
from detection.data.dataset import Batch, DetectionDataset
from detection.data.image_cache import ImageCache
from detection.data.mixing import Mixing
from detection.data.sampler import derive_seed
from detection.data.transforms import EvalTransform, TrainTransform
from detection.errors import UserError
from detection.preprocess import Preprocess
from detection.structures import Targets


class TrainingInputs:
    """The images of a split, augmented as the `data.augmentation` section of a config says.

    Args:
        index: the split.
        preprocess: the detector's.
        seed: what all randomness depends on; beside it, that of an item on its epoch and index, the
            input size of a step on the step.
        shorter_side: as in `DetectionDataset`.
        cache: as in `DetectionDataset`.
        mosaic: as in `Mixing`.
        mixup: as in `Mixing`.
        multi_scale: least and most input size of a step, and the distance between those that may be
            drawn, in pixels; None is the detector's at every step.
        on_device: augment on the device, with `BatchAugmentation`; the loader resizes to this many
            times the input size. None augments in the loader, with `TrainTransform`.
        max_boxes: at most so many boxes of an image are kept.
        augmentation: what those two take.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        index: CocoIndex,
        preprocess: Preprocess,
        *,
        seed: int,
        shorter_side: int | None = None,
        cache: ImageCache | None = None,
        mosaic: float = 0.0,
        mixup: float = 0.0,
        multi_scale: Sequence[int] | None = None,
        on_device: float | None = None,
        max_boxes: int = 100,
        **augmentation: Any,
    ) -> None:
        self.seed = seed
        self.max_boxes = max_boxes
        self.input_size = preprocess.input_size
        self.input_sizes = _list_sizes(multi_scale) if multi_scale else [preprocess.input_size]
        # It checks the settings for both.
        preprocess = preprocess.for_loading()
        transform = TrainTransform(resize=preprocess.resize, max_boxes=max_boxes, **augmentation)
        self.augmentation = None
        if on_device is not None:
            self.augmentation = BatchAugmentation(
                preprocess=preprocess,
                resize_factor=on_device,
                max_boxes=max_boxes,
                **augmentation,
            )
            transform = EvalTransform(resize=self.augmentation.loaded.for_loading().resize)
        self.dataset = DetectionDataset(
            index,
            transform,
            seed=seed,
            training=True,
            shorter_side=shorter_side,
            cache=cache,
            mixing=Mixing(
                side=preprocess.input_size,
                mosaic=mosaic,
                mixup=mixup,
                # On the device some of them may yet fall out.
                max_boxes=max_boxes if on_device is None else None,
            ),
            num_draws=0 if self.augmentation is None else self.augmentation.num_draws,
        )

    def draw_size(self, step: int) -> int:
        """The input size of a step, in all its processes and micro-batches."""
        return self.input_sizes[derive_seed(self.seed, step) % len(self.input_sizes)]

    def to_device(self, batch: Batch, step: int, device: torch.device) -> tuple[Tensor, Targets]:
        """A batch of a step as it is to be normalised.

        Returns:
            (B, 3, S, S) uint8, or float32 on its scale; and the targets in its pixels.
        """
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        size = self.draw_size(step)
        if self.augmentation is not None:
            assert batch.draws is not None
            sizes, draws = (
                part.to(device, non_blocking=True) for part in (batch.sizes, batch.draws)
            )
            return self.augmentation.to(device)(images, targets, sizes, draws, size)
        return (images, targets) if size == self.input_size else resize_batch(images, targets, size)


def _list_sizes(multi_scale: Sequence[int]) -> list[int]:
    is_list = isinstance(multi_scale, Sequence)
    whole = is_list and all(isinstance(value, int) for value in multi_scale)
    if not whole or len(multi_scale) != 3 or not 0 < multi_scale[0] <= multi_scale[1]:
        raise UserError(
            f"augmentation.multi_scale={multi_scale}: it is null, or [least,most,step], "
            "whole pixels with 0 < least <= most"
        )
    least, most, step = multi_scale
    if step < 1:
        raise UserError(f"augmentation.multi_scale={list(multi_scale)}: its step is at least 1")
    return list(range(least, most + 1, step))
