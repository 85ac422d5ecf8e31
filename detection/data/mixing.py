"""Training images put together from several: mosaic and mixup, on uint8 and the item's randomness.

Shapes: N boxes of an image, S side of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detection.boxes import box_area, clip_boxes
from detection.data.transforms import FILL, Example, wrap_boxes

# A box of a mosaic is dropped where less of its area stays: `box_candidates` of YOLOv5.
MIN_COVERAGE = 0.1


class Mixing:
    """Makes an item of a data set of one image or of several.

    A mosaic takes the place of an image as it was read, so that crop, flips and all else work on
    the whole of it. Mixup blends two images as they come out of the transform, mosaics among them.

    Args:
        side: S, of the square that the longer side of an image fills in a mosaic: the input size.
        mosaic: probability of a mosaic in place of an image.
        mixup: probability of blending with a second image.
        max_boxes: at most so many boxes of a blend are kept, those of the first image first; None
            keeps all.
    """

    def __init__(
        self, *, side: int, mosaic: float = 0.0, mixup: float = 0.0, max_boxes: int | None = None
    ) -> None:
        self.side = side
        self.mosaic = mosaic
        self.mixup = mixup
        self.max_boxes = max_boxes

    def load(
        self,
        i: int,
        num_images: int,
        read: Callable[[int], Example],
        transform: Callable[..., Example],
    ) -> Example:
        """Item `i` of `num_images`, what else it needs drawn from all of them.

        Args:
            read: gives an image as it is on disk, with its boxes.
            transform: augments and resizes.
        """
        example = transform(*self._read(i, num_images, read))
        if not _happens(self.mixup):
            return example
        (other,) = torch.randint(num_images, (1,)).tolist()
        return blend(
            example, transform(*self._read(other, num_images, read)), max_boxes=self.max_boxes
        )

    def _read(self, i: int, num_images: int, read: Callable[[int], Example]) -> Example:
        if not _happens(self.mosaic):
            return read(i)
        others = torch.randint(num_images, (3,)).tolist()
        return make_mosaic([read(place) for place in (i, *others)], side=self.side)


def make_mosaic(examples: Sequence[Example], *, side: int) -> Example:
    """Four images around a point of a canvas: (3, 2S, 2S).

    This is YOLOv5's `load_mosaic` (after Bochkovskiy et al., 2020): the longer side of each image
    is scaled to S; the point is uniform in the middle square of the canvas, S wide; the images,
    upper left, upper right, lower left and lower right, have a corner there, and what reaches out
    of the canvas is cut off. Boxes are clipped, and those of which less than `MIN_COVERAGE` of the
    area stays are dropped. Where YOLOv5 then takes a window of the canvas, the transform's crop
    does.

    Args:
        examples: four (image, boxes, labels).
        side: S.
    """
    size = 2 * side
    x, y = torch.randint(side // 2, side + side // 2 + 1, (2,)).tolist()
    canvas = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, size, size)
    all_boxes, all_labels = [], []
    for place, (image, boxes, labels) in enumerate(examples):
        longer = max(image.shape[-2:])
        height, width = (max(1, round(length * side / longer)) for length in image.shape[-2:])
        left, top = x - width * (place % 2 == 0), y - height * (place < 2)
        first_row, first_column = max(top, 0), max(left, 0)
        last_row, last_column = min(top + height, size), min(left + width, size)
        resized = F.resize(image, [height, width], antialias=True)
        canvas[:, first_row:last_row, first_column:last_column] = resized[
            :, first_row - top : last_row - top, first_column - left : last_column - left
        ]
        moved = F.resize(boxes, [height, width]).as_subclass(Tensor)
        moved = moved + torch.tensor([left, top, left, top])
        clipped = clip_boxes(moved, size, size)
        areas = box_area(clipped)
        kept = (areas > 0) & (areas >= MIN_COVERAGE * box_area(moved))
        all_boxes.append(clipped[kept])
        all_labels.append(labels[kept])
    boxes = wrap_boxes(torch.cat(all_boxes), (size, size))
    return tv_tensors.Image(canvas), boxes, torch.cat(all_labels)


def blend(first: Example, second: Example, *, max_boxes: int | None = None) -> Example:
    """The mean of two images of one size, with the boxes of both, all counted fully.

    Mixup for detection (Zhang et al., 2019, "Bag of Freebies"), at the constant ratio of a half
    that YOLOX blends with: both images stay visible, so that no loss needs a weight.
    """
    pixels = (first[0].as_subclass(Tensor).short() + second[0].as_subclass(Tensor)) // 2
    boxes = torch.cat([example[1].as_subclass(Tensor) for example in (first, second)])
    labels = torch.cat([first[2], second[2]])
    return (
        tv_tensors.Image(pixels.byte()),
        wrap_boxes(boxes[:max_boxes], first[1].canvas_size),
        labels[:max_boxes],
    )


def _happens(probability: float) -> bool:
    # Nothing is drawn for what is off, so that it changes no item.
    return probability > 0 and bool(torch.rand(()) < probability)
