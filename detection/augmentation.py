"""What may happen to a whole batch on the device, before it is normalised.

Shapes: B images, F side of the images as loaded, S input size, O output size, G ground truths
(padded), C candidate windows, D random numbers of an image. Sizes are (height, width). An image's
own unit is its width or height: 0 is its left or upper edge, 1 its right or lower one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.boxes import pairwise_coverage
from detection.errors import UserError
from detection.preprocess import Preprocess
from detection.structures import Targets

# Of SSD's crop, here and in the loader: `RandomObjectCoverageCrop` says what they are.
MIN_COVERAGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
KEEP_PROBABILITY = 0.15
NUM_WINDOWS = 100
# Random numbers of an image beside those of its windows.
NUM_CHOICES = 14
MAX_ZOOM_OUT = 4.0
# Bounds of the factors, those of torchvision's `RandomPhotometricDistort`.
BRIGHTNESS, CONTRAST, SATURATION = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5)
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to training images; the `data.augmentation` section of a config.

    Args:
        crop: "ssd" (`RandomObjectCoverageCrop`) or "none".
        crop_areas: least and most of the image's area that the crop takes.
        crop_aspect_ratios: least and most width / height of the crop in pixels.
        horizontal_flip: probability of a left-right flip.
        vertical_flip: probability of an upside-down flip.
        photometric: probability of each of the colour distortions of SSD.
        zoom_out: probability of placing the image on a canvas up to four times as wide and high.
        mosaic: probability of four images in one.
        mixup: probability of the mean of two images.
        multi_scale: least and most input size of a step, and the distance between those that may be
            drawn, in pixels; None is the detector's at every step.
        on_device: crop, flips, colours and zoom-out happen to the batch on the device; the loader
            resizes to this many times the input size. None has them happen in the loader.
        max_boxes: at most so many boxes of an image are kept, in the data set's order.

    Raises:
        UserError: an unknown crop, or a number out of range.
    """

    crop: str = "ssd"
    crop_areas: list[float] = field(default_factory=lambda: [0.1, 1.0])
    crop_aspect_ratios: list[float] = field(default_factory=lambda: [0.5, 2.0])
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    photometric: float = 0.0
    zoom_out: float = 0.0
    mosaic: float = 0.0
    mixup: float = 0.0
    multi_scale: list[int] | None = None
    on_device: float | None = None
    max_boxes: int = 100

    def __post_init__(self) -> None:
        if self.crop not in ("ssd", "none"):
            self._refuse("crop", 'it is "ssd" or "none"')
        flips = ("horizontal_flip", "vertical_flip")
        for name in (*flips, "photometric", "zoom_out", "mosaic", "mixup"):
            if not 0 <= getattr(self, name) <= 1:
                self._refuse(name, "it is a probability, 0 to 1")
        for name in ("crop_areas", "crop_aspect_ratios"):
            ends = getattr(self, name)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
                self._refuse(name, "it is [least,most], 0 < least <= most")
        if self.multi_scale is not None:
            sizes = self.multi_scale
            if len(sizes) != 3 or not 0 < sizes[0] <= sizes[1] or sizes[2] < 1:
                self._refuse(
                    "multi_scale",
                    "it is null, or [least,most,step], 0 < least <= most, and a step from 1 on",
                )
        if self.on_device is not None and self.on_device < 1:
            self._refuse(
                "on_device",
                "it is null, or the size that the loader resizes to relative to model.input_size, "
                "1 or more",
            )
        if self.max_boxes < 1:
            self._refuse("max_boxes", "it is at least 1")

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise UserError(f"data.augmentation.{name}={getattr(self, name)}: {reason}")


def resize_batch(images: Tensor, targets: Targets, size: int) -> tuple[Tensor, Targets]:
    """Square images (B, 3, H, H) and their boxes at another size: float32 (B, 3, size, size)."""
    scale = size / images.shape[-1]
    resized = F.interpolate(
        images.float(), [size, size], mode="bilinear", align_corners=False, antialias=True
    )
    return resized, targets._replace(boxes=targets.boxes * scale)


class BatchAugmentation(nn.Module):
    """Zoom-out, crop, flips and resize of a batch as one affine sample, and its colours.

    It does what `TrainTransform` does, with the same settings, but for this: the loader has resized
    the images already, so that a crop has no more detail than that left; windows are not of whole
    pixels; hue and the order of the channels stay as they are; all beside an image has the mean
    colour of the preprocessing. `RandomObjectCoverageCrop` says which window is taken, and
    which boxes stay.

    Sampling is bilinear. It passes over no pixel where an image shrinks to no less than half; where
    the settings allow of more (`on_device` above 2, or any zoom-out), the sample is taken on a
    grid so many times finer, and its cells are averaged.

    An image's outcome depends on its own random numbers alone.

    Args:
        settings: what may happen.
        preprocess: the detector's: how an image comes to lie in the input.
    """

    num_draws = NUM_CHOICES + 4 * NUM_WINDOWS
    min_coverages: Tensor
    grey: Tensor

    def __init__(self, settings: Augmentation, preprocess: Preprocess) -> None:
        super().__init__()
        self.register_buffer("min_coverages", torch.tensor(MIN_COVERAGES), persistent=False)
        self.register_buffer("grey", torch.tensor(GREY).view(3, 1, 1), persistent=False)
        self.settings = settings
        size = preprocess.input_size
        self.input = preprocess.at_size(size)
        self.loaded = preprocess.at_size(round(size * (settings.on_device or 1)))

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        targets: Targets,
        sizes: Tensor,
        draws: Tensor,
        output_size: int | None = None,
    ) -> tuple[Tensor, Targets]:
        """Augment a batch.

        Args:
            images: (B, 3, F, F) uint8, as `loaded` resizes.
            targets: boxes in their pixels.
            sizes: (B, 2), of the images before that.
            draws: (B, D), uniform in [0, 1).
            output_size: O; None is S.

        Returns:
            float32 (B, 3, O, O) on the scale 0 to 255; and the targets in its pixels, those that
            are no longer there marked as padding.
        """
        size = self.input.input_size
        output_size = output_size or size
        settings = self.settings
        coverage, keep, zooms, scale, at_x, at_y, flip_x, flip_y, *colours = draws[
            :, :NUM_CHOICES
        ].unbind(1)
        region = _place(self.loaded, sizes)
        boxes = _to_units(targets.boxes, region)

        scale = torch.where(zooms < settings.zoom_out, 1 + (MAX_ZOOM_OUT - 1) * scale, 1.0)[:, None]
        corner = (1 - scale) * torch.stack([at_x, at_y], 1)
        canvas = torch.cat([corner, corner + scale], 1)
        window, min_coverage = canvas, torch.zeros_like(keep)
        if settings.crop == "ssd":
            windows, fit = self.draw_windows(canvas, sizes, draws[:, NUM_CHOICES:])
            chosen = self.min_coverages[(coverage * len(MIN_COVERAGES)).long()]
            # An image without boxes counts as one box.
            empty = ~targets.valid.any(1)[:, None, None]
            objects = torch.where(empty, canvas[:, None], boxes)
            first, found = _find_window(windows, fit, chosen, objects)
            crops = found & (keep >= KEEP_PROBABILITY)
            window = torch.where(crops[:, None], first, canvas)
            min_coverage = torch.where(crops, chosen, 0.0)

        place = _place(self.input, (window[:, 2:] - window[:, :2]).flip(1) * sizes)
        flips = torch.stack([flip_x < settings.horizontal_flip, flip_y < settings.vertical_flip], 1)
        moved = self._move(targets, boxes, window, min_coverage, flips, place)
        moved = moved._replace(boxes=moved.boxes * (output_size / size))
        pixels = self._sample(images, window, region, flips, place, output_size)
        return self._distort_colours(pixels, colours), moved

    def draw_windows(self, canvas: Tensor, sizes: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Windows as `RandomObjectCoverageCrop` draws them, but for the whole pixels.

        Args:
            canvas: (B, 4), what they lie in.
            sizes: (B, 2), of the images, whose aspect it has.
            draws: (B, 4C), uniform.

        Returns:
            (B, C, 4), and (B, C): whether their area is within the bounds.
        """
        ratio, at_height, at_x, at_y = draws.unflatten(1, (4, -1)).unbind(1)
        least_ratio, most_ratio = self.settings.crop_aspect_ratios
        least, most = self.settings.crop_areas
        height, width = sizes[:, None].unbind(2)
        # Width over height in shares of the canvas.
        ratio = (least_ratio + ratio * (most_ratio - least_ratio)) * height / width
        highest = torch.minimum((most / ratio).sqrt(), 1 / ratio).clamp(max=1)
        lowest = torch.minimum((least / ratio).sqrt(), highest)
        h = lowest + at_height * (highest - lowest)
        w = (h * ratio).clamp(max=1)
        fit = h * w >= least * (1 - 1e-5)
        x, y = at_x * (1 - w), at_y * (1 - h)
        return _from_units(torch.stack([x, y, x + w, y + h], 2), canvas), fit

    def _move(
        self,
        targets: Targets,
        boxes: Tensor,
        window: Tensor,
        min_coverage: Tensor,
        flips: Tensor,
        place: Tensor,
    ) -> Targets:
        """What stays of boxes (B, G, 4) in windows (B, 4) that come to lie in places (B, 4)."""
        coverage = pairwise_coverage(window[:, None], boxes)[:, 0]
        valid = targets.valid & (coverage > 0) & (coverage >= min_coverage[:, None])
        inside = _to_units(boxes, window).clamp(0, 1)
        flipped = 1 - inside[..., [2, 3, 0, 1]]
        moved = _from_units(torch.where(flips.repeat(1, 2)[:, None], flipped, inside), place)
        valid &= (moved[..., 2:] > moved[..., :2]).all(2)
        valid &= valid.cumsum(1) <= self.settings.max_boxes
        return Targets(boxes=moved * valid[..., None], labels=targets.labels * valid, valid=valid)

    def _sample(
        self,
        images: Tensor,
        window: Tensor,
        region: Tensor,
        flips: Tensor,
        place: Tensor,
        output_size: int,
    ) -> Tensor:
        """(B, 3, O, O): what is seen through the windows (B, 4); the mean colour beside images.

        Args:
            region: (B, 4), where the images lie in what was loaded, in its pixels.
            place: (B, 4), where the windows come to lie, in pixels of S.
        """
        size, loaded = self.input.input_size, self.loaded.input_size
        # Two corners of the output tell the whole map: where do they come from?
        ends = _to_units(place.new_tensor([0.0, 0.0, size, size]).expand(len(place), 4), place)
        ends = torch.where(flips.repeat(1, 2), 1 - ends, ends)
        ends = _from_units(_from_units(ends, window), region) * 2 / loaded - 1
        theta = torch.diag_embed((ends[:, 2:] - ends[:, :2]) / 2)
        theta = torch.cat([theta, (ends[:, 2:] + ends[:, :2])[..., None] / 2], 2)

        shrink = loaded / output_size * (MAX_ZOOM_OUT if self.settings.zoom_out else 1.0)
        finer = max(1, math.ceil(shrink / 2))
        side = output_size * finer
        grid = F.affine_grid(theta, [len(images), 3, side, side], align_corners=False)
        seen = torch.cat([window[:, :2].clamp(min=0), window[:, 2:].clamp(max=1)], 1)
        seen = (_from_units(seen, region) * 2 / loaded - 1)[:, None, None]
        inside = ((grid >= seen[..., :2]) & (grid <= seen[..., 2:])).all(3)
        mean = self.input.mean.round()  # as `Letterbox` pads
        pixels = F.grid_sample(
            images.float() - mean, grid, padding_mode="border", align_corners=False
        )
        pixels = pixels * inside[:, None]
        return F.avg_pool2d(pixels, finer) + mean if finer > 1 else pixels + mean

    def _distort_colours(self, images: Tensor, draws: Sequence[Tensor]) -> Tensor:
        probability = self.settings.photometric
        if not probability:
            return images
        bounds = (BRIGHTNESS, CONTRAST, SATURATION)
        brightness, contrast, saturation = (
            torch.where(happens < probability, least + amount * (most - least), 1.0).view(
                -1, 1, 1, 1
            )
            for happens, amount, (least, most) in zip(draws[::2], draws[1::2], bounds, strict=True)
        )
        images = images * brightness
        grey = (images * self.grey).sum(1, keepdim=True)
        average = grey.mean((2, 3), keepdim=True)
        images = grey + saturation * (images - grey)
        return (average + contrast * (images - average)).clamp(0, 255)


def _find_window(
    windows: Tensor, fit: Tensor, min_coverage: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, 4) and (B,): the first window that holds enough of some box, and whether there is one.

    Padding counts for nothing: it has no area, and where a coverage of 0 suffices any window does.
    """
    accepted = (pairwise_coverage(windows, boxes) >= min_coverage[:, None, None]).any(2) & fit
    first = accepted.int().argmax(1)
    return windows[torch.arange(len(windows), device=windows.device), first], accepted.any(1)


def _place(preprocess: Preprocess, sizes: Tensor) -> Tensor:
    """(B, 4) xyxy: where images of these sizes (B, 2) come to lie in an input, in its pixels."""
    fitted, start = (values.flip(1).float() for values in preprocess.fit(sizes))
    return torch.cat([start, start + fitted], 1)


def _to_units(boxes: Tensor, frame: Tensor) -> Tensor:
    """Boxes (B, ..., 4) in units of a frame (B, 4): 0 to 1 from its one side to the other."""
    frame = frame.view(len(frame), *[1] * (boxes.dim() - 2), 4)
    corner, size = frame[..., :2], frame[..., 2:] - frame[..., :2]
    return (boxes - corner.tile(2)) / size.tile(2)


def _from_units(boxes: Tensor, frame: Tensor) -> Tensor:
    """The inverse of `_to_units`."""
    frame = frame.view(len(frame), *[1] * (boxes.dim() - 2), 4)
    corner, size = frame[..., :2], frame[..., 2:] - frame[..., :2]
    return boxes * size.tile(2) + corner.tile(2)
