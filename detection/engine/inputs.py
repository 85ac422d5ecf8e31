"""What training steps are given: the images, and what happens to a batch on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from detection.augmentation import Augmentation, BatchAugmentation, resize_batch
from detection.data.coco import CocoIndex
from detection.data.dataset import Batch, DetectionDataset
from detection.data.image_cache import ImageCache
from detection.data.mixing import Mixing
from detection.data.sampler import derive_seed
from detection.data.transforms import EvalTransform, TrainTransform
from detection.preprocess import Preprocess
from detection.structures import Targets


class TrainingInputs:
    """The images of a split, augmented.

    Args:
        index: the split.
        preprocess: the detector's.
        augmentation: what may happen to them.
        seed: what all randomness depends on; beside it, that of an item on its epoch and index, the
            input size of a step on the step.
        shorter_side: as in `DetectionDataset`.
        cache: as in `DetectionDataset`.
    """

    def __init__(
        self,
        index: CocoIndex,
        preprocess: Preprocess,
        augmentation: Augmentation,
        *,
        seed: int,
        shorter_side: int | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        self.seed = seed
        self.max_boxes = augmentation.max_boxes
        self.input_size = preprocess.input_size
        self.input_sizes = [preprocess.input_size]
        if augmentation.multi_scale is not None:
            least, most, step = augmentation.multi_scale
            self.input_sizes = list(range(least, most + 1, step))
        preprocess = preprocess.for_loading()
        self.on_device: BatchAugmentation | None = None
        transform = TrainTransform(augmentation, resize=preprocess.resize)
        if augmentation.on_device is not None:
            self.on_device = BatchAugmentation(augmentation, preprocess)
            transform = EvalTransform(resize=self.on_device.loaded.for_loading().resize)
        self.dataset = DetectionDataset(
            index,
            transform,
            seed=seed,
            training=True,
            shorter_side=shorter_side,
            cache=cache,
            mixing=Mixing(
                side=preprocess.input_size,
                mosaic=augmentation.mosaic,
                mixup=augmentation.mixup,
                # On the device some of them may yet fall out.
                max_boxes=augmentation.max_boxes if self.on_device is None else None,
            ),
            num_draws=0 if self.on_device is None else self.on_device.num_draws,
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
        if self.on_device is not None:
            assert batch.draws is not None
            sizes, draws = (
                part.to(device, non_blocking=True) for part in (batch.sizes, batch.draws)
            )
            return self.on_device.to(device)(images, targets, sizes, draws, size)
        return (images, targets) if size == self.input_size else resize_batch(images, targets, size)
