"""What happens to an image and its boxes on the way into the network.

Everything works on uint8 images and draws only from torch's default generator, so that a seed
fixes the outcome. Shapes: N boxes of the image, C candidate crops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detection.augmentation import KEEP_PROBABILITY, MIN_COVERAGES, NUM_WINDOWS, Augmentation
from detection.boxes import pairwise_coverage

Resize = Callable[
    [tv_tensors.Image, tv_tensors.BoundingBoxes], tuple[tv_tensors.Image, tv_tensors.BoundingBoxes]
]
Example = tuple[tv_tensors.Image, tv_tensors.BoundingBoxes, Tensor]
# What lies beside a picture on a larger canvas: the mean colour of ImageNet.
FILL = (123, 117, 104)


class RandomObjectCoverageCrop(v2.Transform):
    """Crops to a random window that holds enough of some object.

    This is `ssd_random_crop` of the TensorFlow Object Detection API (`core/preprocessor.py`). One
    of the seven minimum coverages is chosen, coverage being the share of a box that lies inside
    the window. With probability `keep_probability` the image stays whole; otherwise the first of
    `num_attempts` windows in which any box reaches the coverage is taken, and the image stays
    whole if there is none. Boxes below the coverage become empty (all zeros), for the caller to
    remove with their labels; the others are clipped to the window. An image without boxes
    counts as one box.

    Args:
        min_coverages: the minimum coverages to choose from.
        aspect_ratios: bounds of the window's width / height.
        areas: bounds of the window's share of the image.
        keep_probability: how often the image stays whole.
        num_attempts: how many windows are tried.
    """

    def __init__(
        self,
        *,
        min_coverages: tuple[float, ...] = MIN_COVERAGES,
        aspect_ratios: tuple[float, float] = (0.5, 2.0),
        areas: tuple[float, float] = (0.1, 1.0),
        keep_probability: float = KEEP_PROBABILITY,
        num_attempts: int = NUM_WINDOWS,
    ) -> None:
        super().__init__()
        self.min_coverages = min_coverages
        self.aspect_ratios = aspect_ratios
        self.areas = areas
        self.keep_probability = keep_probability
        self.num_attempts = num_attempts

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        boxes = next(x for x in flat_inputs if isinstance(x, tv_tensors.BoundingBoxes))
        whole = {"window": None, "kept": None}
        min_coverage = self.min_coverages[int(torch.randint(len(self.min_coverages), ()))]
        if torch.rand(()) < self.keep_probability:
            return whole
        windows = self.draw_windows(height, width)
        objects = boxes.as_subclass(Tensor)
        if not len(objects):
            objects = torch.tensor([[0.0, 0.0, width, height]])
        coverages = pairwise_coverage(windows, objects)  # (C, N)
        accepted = (coverages >= min_coverage).any(1)
        if not accepted.any():
            return whole
        chosen = int(accepted.long().argmax())
        kept = (coverages[chosen] >= min_coverage) & (coverages[chosen] > 0)
        return {"window": windows[chosen].long().tolist(), "kept": kept[: len(boxes)]}

    def draw_windows(self, height: int, width: int) -> Tensor:
        """(C, 4) xyxy, C <= num_attempts: whole pixels, drawn as `sample_distorted_bounding_box`.

        The aspect ratio is uniform, then the height is uniform over the whole numbers that keep the
        area in bounds and the window in the image, then the place is uniform (the last row and
        column excepted, as in TensorFlow's kernel).
        """
        ratio, at_height, at_x, at_y = torch.rand(4, self.num_attempts, dtype=torch.float64)
        ratio = self.aspect_ratios[0] + ratio * (self.aspect_ratios[1] - self.aspect_ratios[0])
        min_area, max_area = (area * height * width for area in self.areas)
        lowest = (min_area / ratio).sqrt().round()
        highest = (max_area / ratio).sqrt().round()
        highest = highest.minimum(((width + 0.5 - 1e-7) / ratio).floor()).clamp(max=height)
        lowest = lowest.minimum(highest)
        h = lowest + (at_height * (highest - lowest + 1)).floor()
        w = (h * ratio).round()
        # Rounding may leave the bounds by a row; one row more or less mends it where it can be.
        h = h + (h * w < min_area).double()
        w = (h * ratio).round()
        h = h - (h * w > max_area).double()
        w = (h * ratio).round()
        fits = (h * w >= min_area) & (h * w <= max_area) & (h <= height) & (w <= width)
        fits &= (h > 0) & (w > 0)
        x, y = (at_x * (width - w)).floor(), (at_y * (height - h)).floor()
        return torch.stack([x, y, x + w, y + h], 1)[fits].float()

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if params["window"] is None:
            return inpt
        left, top, right, bottom = params["window"]
        height, width = bottom - top, right - left
        if not isinstance(inpt, tv_tensors.BoundingBoxes):
            return self._call_kernel(F.crop, inpt, top, left, height, width)
        shifted = inpt.as_subclass(Tensor) - torch.tensor([left, top, left, top])
        clipped = shifted.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        clipped = torch.where(params["kept"][:, None], clipped, 0.0)
        return wrap_boxes(clipped, (height, width))


class ZoomOut(v2.RandomZoomOut):
    """torchvision's, with the canvas laid out as decoded images are: resizing is quicker so."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return super().transform(inpt, params)
        left, top, right, bottom = params["padding"]
        height, width = inpt.shape[-2:]
        row = torch.tensor(self.fill, dtype=torch.uint8).repeat(left + width + right)
        canvas = row.repeat(top + height + bottom, 1).unflatten(1, (-1, 3))
        canvas[top : top + height, left : left + width] = inpt.permute(1, 2, 0)
        return tv_tensors.Image(canvas.permute(2, 0, 1))


class TrainTransform:
    """Augmentation and resize: (image, boxes, labels) in, the same triple out.

    Colours are distorted last, on the resized image, where that costs least.

    Args:
        settings: what may happen.
        resize: brings image and boxes to the input size.
    """

    def __init__(self, settings: Augmentation, *, resize: Resize) -> None:
        ssd_crop = RandomObjectCoverageCrop(
            areas=(settings.crop_areas[0], settings.crop_areas[1]),
            aspect_ratios=(settings.crop_aspect_ratios[0], settings.crop_aspect_ratios[1]),
        )
        steps: list[tuple[float, Resize]] = [
            (settings.zoom_out, ZoomOut(fill=FILL, p=settings.zoom_out)),
            (float(settings.crop == "ssd"), ssd_crop),
            (1.0, resize),
            (settings.horizontal_flip, v2.RandomHorizontalFlip(settings.horizontal_flip)),
            (settings.vertical_flip, v2.RandomVerticalFlip(settings.vertical_flip)),
            (settings.photometric, self._distort_colours),
        ]
        self._photometric_distort = v2.RandomPhotometricDistort(p=settings.photometric)
        self.steps = [step for probability, step in steps if probability > 0]
        self.max_boxes = settings.max_boxes

    def __call__(
        self, image: tv_tensors.Image, boxes: tv_tensors.BoundingBoxes, labels: Tensor
    ) -> Example:
        for step in self.steps:
            image, boxes = step(image, boxes)
        return _remove_empty(image, boxes, labels, self.max_boxes)

    def _distort_colours(
        self, image: tv_tensors.Image, boxes: tv_tensors.BoundingBoxes
    ) -> tuple[tv_tensors.Image, tv_tensors.BoundingBoxes]:
        # Pillow's own colour kernels work on uint8 throughout and are several times as fast.
        picture = self._photometric_distort(F.to_pil_image(image))
        return tv_tensors.Image(F.pil_to_tensor(picture)), boxes


class EvalTransform:
    """Resize alone: (image, boxes, labels) in, the same triple out."""

    def __init__(self, *, resize: Resize) -> None:
        self.resize = resize

    def __call__(
        self, image: tv_tensors.Image, boxes: tv_tensors.BoundingBoxes, labels: Tensor
    ) -> Example:
        return _remove_empty(*self.resize(image, boxes), labels)


def _remove_empty(
    image: tv_tensors.Image,
    boxes: tv_tensors.BoundingBoxes,
    labels: Tensor,
    max_boxes: int | None = None,
) -> Example:
    plain = boxes.as_subclass(Tensor)
    kept = (plain[:, 2:] > plain[:, :2]).all(1).nonzero()[:max_boxes, 0]
    return image, wrap_boxes(plain[kept], boxes.canvas_size), labels[kept]


def wrap_boxes(boxes_xyxy: Tensor, canvas_size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    """Boxes (N, 4) in an image of (height, width), as torchvision's transforms know them."""
    return tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue]
        boxes_xyxy, format="XYXY", canvas_size=canvas_size
    )
