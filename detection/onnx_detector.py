"""A detector exported to ONNX: needs onnxruntime, numpy and Pillow, and no torch.

Shapes: B images, S input size, D detections (padded), N detections of one image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from detection.errors import UserError
from detection.images import ImageLike, open_images

if TYPE_CHECKING:
    import onnxruntime


class ArrayDetections(NamedTuple):
    """`detection.structures.ImageDetections` in numpy: one image, best first, nothing padded.

    Args:
        boxes: (N, 4) float32, xyxy in pixels of the image as it was given.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64, contiguous from 0.
        names: the class names by label.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...] = ()


class OnnxDetector:
    """`detection.detector.Detector` for a file that `python -m detection.export` wrote.

    Args:
        session: of such a file, with `outputs=detections`.

    Raises:
        UserError: where the file has no metadata of an exported detector, or other outputs.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        properties = session.get_modelmeta().custom_metadata_map
        if not {"names", "input_size", "resize"} <= properties.keys():
            raise UserError("the model's metadata is not that of python -m detection.export")
        if properties["outputs"] != "detections":
            raise UserError(
                f"the model has outputs={properties['outputs']}: export it with outputs=detections"
            )
        self.session = session
        self.names: list[str] = json.loads(properties["names"])
        self.input_size = int(properties["input_size"])
        self.resize = properties["resize"]
        self.fill = tuple(json.loads(properties["fill"]))
        self.takes_floats = properties["images"] == "float32"
        self.mean, self.std = (
            np.array(json.loads(properties[key]), np.float32).reshape(3, 1, 1)
            for key in ("mean", "std")
        )

    @classmethod
    def from_file(
        cls, path: str | Path, *, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> OnnxDetector:
        """Open a file.

        Args:
            providers: ONNX Runtime's, the preferred ones first.

        Raises:
            UserError: where it cannot be run, or is no exported detector.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("onnxruntime is not installed: pip install -e '.[export]'") from error
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        try:
            session = onnxruntime.InferenceSession(path, providers=list(providers))
        except Exception as error:  # onnxruntime's own have no common ancestor but this
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: ONNX Runtime cannot open it: {reason}") from error
        try:
            return cls(session)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        score_threshold: float = 0.0,
        batch_size: int = 8,
    ) -> list[ArrayDetections]:
        """Detect on images given as paths, PIL images, or uint8 arrays (H, W, 3) or (H, W).

        Args:
            images: one or any number.
            score_threshold: only detections of at least this score are given.
            batch_size: images that the network sees at a time.

        Returns:
            For each image its detections, best first.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        waiting = iter([images] if isinstance(images, ImageLike) else images)
        found: list[ArrayDetections] = []
        while pictures := open_images(list(islice(waiting, batch_size))):
            found += self._predict(pictures, score_threshold)
        return found

    def _predict(
        self, pictures: Sequence[Image.Image], score_threshold: float
    ) -> list[ArrayDetections]:
        batch = np.stack([self._resize(picture) for picture in pictures])
        if self.takes_floats:
            batch = (batch - self.mean) / self.std
        names = ["boxes", "scores", "labels", "valid"]
        boxes, scores, labels, valid = map(np.asarray, self.session.run(names, {"images": batch}))
        # As `Detector`: what lies in the padding alone is no detection.
        boxes = np.stack([self._restore(*pair) for pair in zip(boxes, pictures, strict=True)])
        kept = valid & (scores >= score_threshold) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
        return [
            ArrayDetections(boxes[i][own], scores[i][own], labels[i][own], tuple(self.names))
            for i, own in enumerate(kept)
        ]

    def _resize(self, picture: Image.Image) -> np.ndarray:
        """The network's input: uint8 (3, S, S)."""
        (width, height), start = self._place(picture)
        resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        canvas = Image.new("RGB", (self.input_size, self.input_size), self.fill)
        canvas.paste(resized, start)
        return np.asarray(canvas).transpose(2, 0, 1)

    def _restore(self, boxes: np.ndarray, picture: Image.Image) -> np.ndarray:
        """Boxes (N, 4) of the network's input in pixels of the picture."""
        size, fitted, start = (
            np.array([*pair, *pair], np.float32) for pair in (picture.size, *self._place(picture))
        )
        return ((boxes - start) * (size / fitted)).clip(0, size)

    def _place(self, picture: Image.Image) -> tuple[tuple[int, int], tuple[int, int]]:
        """(width, height) of a picture in the network's input, and (left, top) of where it lies."""
        side = self.input_size
        if self.resize == "stretch":
            return (side, side), (0, 0)
        longer = max(picture.size)
        # In whole numbers, rounded as in `detection.preprocess.Letterbox`.
        width, height = (max((2 * n * side + longer) // (2 * longer), 1) for n in picture.size)
        if self.resize == "letterbox":
            return (width, height), (0, 0)
        return (width, height), ((side - width) // 2, (side - height) // 2)
