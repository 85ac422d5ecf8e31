"""Images from disk to batches.

Shapes: B images, S input size, N boxes of an image, G box slots of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detection.data.coco import CocoIndex
from detection.data.image_cache import ImageCache
from detection.data.mixing import Mixing
from detection.data.sampler import derive_seed
from detection.data.transforms import Example
from detection.errors import UserError
from detection.images import UnreadableImage, shrink_size
from detection.structures import Targets

Transform = Callable[[tv_tensors.Image, tv_tensors.BoundingBoxes, Tensor], Example]


class Sample(NamedTuple):
    """One image, ready for the network.

    Args:
        image: (3, S, S) uint8.
        boxes: (N, 4) float32, xyxy in input pixels.
        labels: (N,) int64, contiguous from 0.
        image_id: the data set's own id.
        size: (height, width) of the image as the data set states them, and of several put together,
            of what they became; with `draws`, of the image as it was read, shrunk or not.
        unreadable: "file: reason" of each image that could not be read on the way.
        draws: (D,) float32 uniform in [0, 1), the item's randomness for what is done to a batch on
            the device; None where nothing is.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    image_id: int
    size: tuple[int, int]
    unreadable: tuple[str, ...]
    draws: Tensor | None = None


class Picture(NamedTuple):
    """One image and what is on it, as read: not yet transformed.

    Args:
        image: (3, H, W) uint8.
        boxes: (N, 4), xyxy in its pixels.
        labels: (N,) int64.
        i: its place in the index: not that asked for, where that one could not be read.
        unreadable: "file: reason" of each image that could not be read on the way.
    """

    image: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes
    labels: Tensor
    i: int
    unreadable: tuple[str, ...]


class Batch(NamedTuple):
    """Samples put together.

    Args:
        images: (B, 3, S, S) uint8.
        targets: boxes and labels, padded.
        image_ids: (B,) int64.
        sizes: (B, 2) int64, height and width of the originals.
        unreadable: those of each sample.
        draws: (B, D), or None.
    """

    images: Tensor
    targets: Targets
    image_ids: Tensor
    sizes: Tensor
    unreadable: tuple[tuple[str, ...], ...]
    draws: Tensor | None = None


class DetectionDataset(Dataset[Sample]):
    """The images of an index, decoded and transformed.

    An item is asked for by `(epoch, i)`, or by `i` alone, which means epoch 0. What it holds
    depends on the seed, the epoch and `i` only: not on the process, nor on earlier items.

    Args:
        index: the split.
        transform: from (image, boxes, labels) to the same at the input size.
        seed: what the randomness of the transform depends on.
        training: if an image cannot be read, take the next one that can (True), or a black
            image without boxes in its place (False). Either way the sample names it.
        mixing: puts several images together; None takes each alone.
        num_draws: D, random numbers that go with each item to the device.
        shorter_side: images are read at the size that `shrink_size` gives for it.
        cache: of the index at this `shorter_side`; changes nothing but the time.

    Raises:
        UserError: on access, if no image at all can be read (training), or the folder is gone.
    """

    def __init__(
        self,
        index: CocoIndex,
        transform: Transform,
        *,
        seed: int,
        training: bool,
        mixing: Mixing | None = None,
        num_draws: int = 0,
        shorter_side: int | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        self.index = index
        self.transform = transform
        self.seed = seed
        self.training = training
        self.mixing = mixing or Mixing(side=1)
        self.num_draws = num_draws
        self.shorter_side = shorter_side
        self.cache = cache

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        with _isolated(derive_seed(self.seed, epoch, i)):
            return self._load(i)

    def _load(self, i: int) -> Sample:
        pictures: list[Picture] = []

        def read(i: int) -> Example:
            pictures.append(self._read(i))
            return pictures[-1].image, pictures[-1].boxes, pictures[-1].labels

        pixels, boxes, labels = self.mixing.load(i, len(self), read, self.transform)
        first = pictures[0].i
        return Sample(
            image=pixels.as_subclass(Tensor),
            boxes=boxes.as_subclass(Tensor),
            labels=labels,
            image_id=self.index.image_ids[first],
            size=self._original_size(pictures, boxes),
            unreadable=tuple(name for picture in pictures for name in picture.unreadable),
            draws=torch.rand(self.num_draws) if self.num_draws else None,
        )

    def _original_size(
        self, pictures: list[Picture], boxes: tv_tensors.BoundingBoxes
    ) -> tuple[int, int]:
        if len(pictures) > 1:
            return boxes.canvas_size
        # What happens on the device starts from the image as it was read.
        return pictures[0].boxes.canvas_size if self.num_draws else self.index.sizes[pictures[0].i]

    def _read(self, first: int) -> Picture:
        unreadable: list[str] = []
        for shift in range(len(self)):
            i = (first + shift) % len(self)
            boxes, labels = self.index.boxes(i), self.index.labels(i)
            stated, size = self.index.sizes[i], shrink_size(self.index.sizes[i], self.shorter_side)
            try:
                image = self._pixels(i)
            except UnreadableImage as error:
                self._check_folder(self.index.image_path(i).parent)
                unreadable.append(f"{self.index.file_names[i]}: {error}")
                if self.training:
                    continue
                image = torch.zeros(3, *size, dtype=torch.uint8)
                boxes, labels = boxes[:0], labels[:0]
            if size != stated:
                (height, width), (stated_height, stated_width) = size, stated
                boxes = boxes * torch.tensor([width, height] * 2)
                boxes = boxes / torch.tensor([stated_width, stated_height] * 2)
            return Picture(
                tv_tensors.Image(image),
                tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # pyright: ignore
                labels,
                i,
                tuple(unreadable),
            )
        raise UserError(
            f"{self.index.images_dir}: none of its {len(self)} images can be read "
            f"(first: {unreadable[0]})"
        )

    def _pixels(self, i: int) -> Tensor:
        """Image `i`, (3, H, W) uint8, decoded and shrunk, or from the cache."""

        def decode() -> Tensor:
            stated = self.index.sizes[i]
            size = shrink_size(stated, self.shorter_side)
            image = F.pil_to_tensor(self.index.load_image(i, least_side=self.shorter_side))
            return image if size == stated else F.resize(image, list(size), antialias=True)

        if self.cache is None:
            return decode()
        return self.cache.load(i, self.index.image_path(i), decode)

    def _check_folder(self, folder: Path) -> None:
        """A folder that goes away, or a mount that leaves it empty, is no case of broken images."""
        if not folder.is_dir() or next(folder.iterdir(), None) is None:
            raise UserError(
                f"{folder}: the folder of images is gone or empty: bring it back; a run goes on "
                "with resume=true"
            )


def find_shorter_side(shrink: float | None, input_size: int) -> int | None:
    """`DetectionDataset`'s `shorter_side` for images of so many times the input size.

    Raises:
        UserError: `shrink` is no such number.
    """
    if shrink is None:
        return None
    if not isinstance(shrink, (int, float)) or not 0 < shrink < math.inf:
        raise UserError(f"data.shrink={shrink}: give how many times the input size, or null")
    return max(1, round(shrink * input_size))


@contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """Seeds torch's default CPU generator and restores it after, on one thread.

    One thread as in a worker process, since float reductions inside colour transforms depend on
    it, and since sharing out operations this small takes longer than doing them.
    """
    state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    # torch.manual_seed would seed the GPU generators as well, and nothing would restore those.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        torch.set_num_threads(num_threads)


def collate(samples: list[Sample]) -> Batch:
    """Stacks samples; G is the largest number of boxes, and at least 1."""
    counts = [len(sample.boxes) for sample in samples]
    draws = [sample.draws for sample in samples if sample.draws is not None]
    num_slots = max(1, *counts)
    targets = Targets(
        boxes=torch.zeros(len(samples), num_slots, 4),
        labels=torch.zeros(len(samples), num_slots, dtype=torch.int64),
        valid=torch.arange(num_slots) < torch.tensor(counts)[:, None],
    )
    for row, (sample, count) in enumerate(zip(samples, counts, strict=True)):
        targets.boxes[row, :count] = sample.boxes
        targets.labels[row, :count] = sample.labels
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        targets=targets,
        image_ids=torch.tensor([sample.image_id for sample in samples]),
        sizes=torch.tensor([sample.size for sample in samples]),
        unreadable=tuple(sample.unreadable for sample in samples),
        draws=torch.stack(draws) if draws else None,
    )
