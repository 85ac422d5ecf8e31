"""The facade: images of any size in, detections in their pixels out."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from detection.build import ModelParts
from detection.checkpoint import load_checkpoint, load_model, read_categories
from detection.errors import UserError
from detection.images import ImageLike, open_images
from detection.structures import Category, Detections, ImageDetections, RawPredictions


class Detector:
    """A network with its pre- and post-processing and its category table.

    Args:
        parts: as `build_model` gives them; put into inference mode.
        categories: a class's place is its label.
        device: where the network runs.
    """

    def __init__(
        self,
        parts: ModelParts,
        categories: Sequence[Category],
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.network: nn.Module = parts.network.to(self.device).eval()
        self.preprocess = parts.preprocess.to(self.device)
        self.postprocess = parts.postprocess
        self.categories = tuple(categories)

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Detector:
        """Load a checkpoint file, its moving average where it has one.

        Raises:
            UserError: where the file is no checkpoint of this project.
        """
        checkpoint = load_checkpoint(path)
        return cls(load_model(checkpoint), read_categories(checkpoint), device=device)

    @property
    def names(self) -> list[str]:
        """Class names by label."""
        return [category.name for category in self.categories]

    def match_categories(self, categories: Sequence[Category]) -> Tensor:
        """This detector's label of each class of a data set, matched by name: (K,) int64.

        The data set may have fewer classes, and another order and other ids.

        Raises:
            UserError: naming the classes that the detector does not know.
        """
        return match_categories(self.names, categories)

    @torch.no_grad()
    def forward(self, images: Tensor) -> RawPredictions:
        """Run the network on resized images, uint8 (B, 3, S, S)."""
        return self.network(self.preprocess(images.to(self.device, non_blocking=True)))

    def decode(self, predictions: RawPredictions, sizes: Tensor) -> Detections:
        """Detections in pixels of the original images, whose (height, width) are `sizes` (B, 2).

        What lies in the padding alone is none.
        """
        detections = self.postprocess(predictions, self.preprocess.input_size)
        boxes = self.preprocess.restore(detections.boxes, sizes.to(detections.boxes.device))
        valid = detections.valid & (boxes[..., 2:] > boxes[..., :2]).all(-1)
        return detections._replace(boxes=boxes, valid=valid)

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        score_threshold: float = 0.0,
        batch_size: int = 8,
    ) -> list[ImageDetections]:
        """Detect on images given as paths, PIL images, or uint8 arrays (H, W, 3) or (H, W).

        Args:
            images: one or any number.
            score_threshold: only detections of at least this score are given.
            batch_size: images that the network sees at a time.

        Returns:
            For each image its detections, best first.
        """
        several = [images] if isinstance(images, ImageLike) else images
        pairs = self.stream(several, score_threshold=score_threshold, batch_size=batch_size)
        return [detections for _, detections in pairs]

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        score_threshold: float = 0.0,
        batch_size: int = 8,
    ) -> Generator[tuple[Image.Image, ImageDetections]]:
        """`predict` for images that need not be in memory together: each with its detections.

        A thread reads, decodes and resizes ahead, at most two batches, while the network runs.

        Args:
            images: read in that thread; may be endless.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        waiting = iter(images)

        def read() -> tuple[Image.Image, Tensor] | None:
            for image in waiting:
                (picture,) = open_images(image)
                return picture, self.preprocess.resize_image(F.pil_to_tensor(picture))
            return None

        reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        try:
            ahead = deque(reader.submit(read) for _ in range(2 * batch_size))
            while True:
                batch = []
                while len(batch) < batch_size and (one := ahead.popleft().result()):
                    batch.append(one)
                    ahead.append(reader.submit(read))
                if not batch:
                    return
                pictures, resized = zip(*batch, strict=True)
                sizes = torch.tensor([[picture.height, picture.width] for picture in pictures])
                found = self.decode(self.forward(torch.stack(resized)), sizes)
                yield from zip(
                    pictures,
                    unbatch(found, score_threshold=score_threshold, names=self.names),
                    strict=True,
                )
        finally:
            reader.shutdown(cancel_futures=True)

    def warm_up(self, batch_size: int = 8) -> None:
        """Run once on nothing, since the first batch of a size takes longer."""
        size = self.preprocess.input_size
        images = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8)
        unbatch(self.decode(self.forward(images), torch.full((batch_size, 2), size)))


def match_categories(names: Sequence[str], categories: Sequence[Category]) -> Tensor:
    """The label of each class of a data set in a detector's `names`: (K,) int64.

    Raises:
        UserError: naming the classes that the detector does not know.
    """
    labels = {name: label for label, name in enumerate(names)}
    unknown = [category.name for category in categories if category.name not in labels]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"the checkpoint detects {len(names)} classes, and none named "
            f"{', '.join(map(repr, unknown[:3]))}{more}, which the data has: "
            "evaluate on the data set it was trained for"
        )
    return torch.tensor([labels[category.name] for category in categories])


def unbatch(
    detections: Detections, *, score_threshold: float = 0.0, names: Sequence[str] = ()
) -> list[ImageDetections]:
    """Cut the padding off: one `ImageDetections` an image, on the CPU."""
    boxes, scores, labels, valid = (field.cpu() for field in detections)
    kept = valid & (scores >= score_threshold)
    return [
        ImageDetections(boxes[i][kept[i]], scores[i][kept[i]], labels[i][kept[i]], tuple(names))
        for i in range(len(boxes))
    ]
