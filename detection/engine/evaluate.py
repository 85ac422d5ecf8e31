"""The evaluation loop: a detector over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset, collate
from detection.data.sampler import split_evaluation
from detection.data.transforms import EvalTransform
from detection.detector import Detector, match_categories, unbatch
from detection.engine.processes import Processes
from detection.engine.run_folder import LOGGER
from detection.engine.stop import start_loader
from detection.errors import UserError
from detection.evaluation.coco import CocoEvaluator, coco_results
from detection.images import UnreadableImage
from detection.onnx_detector import OnnxDetector
from detection.structures import Category


class Evaluation(NamedTuple):
    """What an evaluation found.

    Args:
        metrics: the evaluator's, and `loss` with its named parts where a criterion was given.
        results: all detections in the COCO results format, in rank 0; none in other processes.
    """

    metrics: dict[str, Any]
    results: list[dict[str, Any]]

    @property
    def scalars(self) -> dict[str, float]:
        """The metrics that are one number."""
        return {name: value for name, value in self.metrics.items() if isinstance(value, float)}


@torch.no_grad()
def evaluate(
    detector: Detector,
    index: CocoIndex,
    evaluator: CocoEvaluator,
    *,
    processes: Processes,
    criterion: nn.Module | None = None,
    batch_size: int = 16,
    num_workers: int = 2,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Run a detector over a split and measure it.

    Every process runs its share of the images; all of them return the same metrics.
    Classes are matched by name; detections of classes that the data has not are left out.

    Args:
        criterion: gives the loss of the split.
        should_stop: asked before each batch.

    Returns:
        None, in every process, where any was told to stop.

    Raises:
        UserError: where the folder of the images has vanished, no image can be read, or a loss is
            not finite.
    """
    transform = EvalTransform(resize=detector.preprocess.for_loading().resize)
    dataset = DetectionDataset(index, transform, seed=0, training=False)
    batches = split_evaluation(
        len(index), batch_size=batch_size, rank=processes.rank, world_size=processes.world_size
    )
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),
        pin_memory=processes.device.type == "cuda",
    )
    own_labels = detector.match_categories(index.categories)
    # The data's category by the detector's label; a detector may know classes the data has not.
    categories = dict(zip(own_labels.tolist(), index.categories, strict=True))
    results: list[dict[str, Any]] = []
    sums: dict[str, float] = {}
    unreadable: list[str] = []
    stopped = False
    with start_loader(loader) as loaded:
        for batch in loaded:
            stopped = should_stop()
            if stopped:
                break
            predictions = detector.forward(batch.images)
            if criterion is not None:
                targets = batch.targets._replace(labels=own_labels[batch.targets.labels])
                losses = criterion(predictions, targets.to(processes.device))
                for name, value in {**losses.sums, "divisor": losses.divisor}.items():
                    sums[name] = sums.get(name, 0.0) + value.item()
            detections = unbatch(detector.decode(predictions, batch.sizes))
            for image_id, found, names in zip(
                batch.image_ids.tolist(), detections, batch.unreadable, strict=True
            ):
                unreadable += names
                if not names:  # else it was of a black image in its place
                    results += _known_results(found, image_id, categories)

    if processes.any(stopped):
        return None
    shares = processes.gather((results, sums, unreadable))
    results = [result for share in shares for result in share[0]]
    unreadable = processes.share([name for share in shares for name in share[2]])
    _check_any_is_read(index, unreadable)
    metrics: dict[str, Any] = {}
    if processes.is_main:
        _warn_of_unreadable(unreadable)
        metrics = evaluator.evaluate(results) | _mean_losses([share[1] for share in shares])
    found = Evaluation(processes.share(metrics), results)
    broken = [name for name, value in found.scalars.items() if not math.isfinite(value)]
    if broken:
        raise UserError(
            f"the network's {broken[0]} on these images is {found.scalars[broken[0]]}: it has "
            "diverged (lower optimizer.lr), or its weights are damaged"
        )
    return found


def evaluate_exported(
    detector: OnnxDetector, index: CocoIndex, evaluator: CocoEvaluator, *, batch_size: int = 16
) -> Evaluation:
    """`evaluate` for an exported detector, which resizes in its own way; in this process alone."""
    own_labels = match_categories(detector.names, index.categories)
    categories = dict(zip(own_labels.tolist(), index.categories, strict=True))
    results: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for start in range(0, len(index), batch_size):
        images, image_ids = [], []
        for i in range(start, min(start + batch_size, len(index))):
            try:
                images.append(index.load_image(i))
                image_ids.append(index.image_ids[i])
            except UnreadableImage as error:
                unreadable.append(f"{index.file_names[i]}: {error}")
        detections = detector.predict(images, batch_size=batch_size)
        for image_id, found in zip(image_ids, detections, strict=True):
            results += _known_results(map(torch.from_numpy, found[:3]), image_id, categories)
    if unreadable and not index.images_dir.is_dir():
        raise UserError(f"{index.images_dir}: the folder of images is gone: bring it back")
    _check_any_is_read(index, unreadable)
    _warn_of_unreadable(unreadable)
    return Evaluation(evaluator.evaluate(results), results)


def _known_results(
    found: Iterable[Any], image_id: int, categories: dict[int, Category]
) -> list[dict[str, Any]]:
    """`coco_results` of `ImageDetections`, without those of labels that are no categories."""
    boxes, scores, labels, *_ = found
    known = torch.isin(labels, torch.tensor(list(categories)))
    return coco_results(boxes[known], scores[known], labels[known], image_id, categories)


def _check_any_is_read(index: CocoIndex, unreadable: list[str]) -> None:
    if len(unreadable) == len(index):
        raise UserError(
            f"{index.images_dir}: none of its {len(index)} images can be read "
            f"(first: {unreadable[0]})"
        )


def _warn_of_unreadable(names: list[str]) -> None:
    for name in names:
        LOGGER.warning("cannot read %s: evaluated as an image without detections", name)


def _mean_losses(shares: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name in max(shares, key=len) if name != "divisor"]
    if not names:
        return {}
    divisor = max(sum(share.get("divisor", 0.0) for share in shares), 1.0)
    parts = {name: sum(s.get(name, 0.0) for s in shares) / divisor for name in names}
    return {"loss": sum(parts.values()), **{f"loss_{name}": part for name, part in parts.items()}}
