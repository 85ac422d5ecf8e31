"""Time of the COCO metrics with pycocotools and with hotcoco, on a set of the size of COCO val.

    python benchmarks/bench_evaluation.py [--images 5000] [--rounds 3]

Both sides get the same Python lists and give the same dict of metrics; indexing the ground truth,
which is done once a training, is timed apart. hotcoco uses all cores, pycocotools has no threads.
hotcoco's time is the median of its rounds; pycocotools runs once, since it takes minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from detection.evaluation.coco import METRIC_NAMES, CocoEvaluator

NUM_CLASSES = 80
NUM_BOXES = 7  # an image
NUM_DETECTIONS = 95  # an image


def make_set(num_images: int, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Boxes of all sizes; two detections of three lie near a box, one anywhere."""
    rng = np.random.default_rng(seed)
    # As in COCO, few classes have most of the boxes, and an image holds few classes.
    weights = 1 / np.arange(1, NUM_CLASSES + 1)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        own_classes = rng.choice(NUM_CLASSES, 3, p=weights / weights.sum()) + 1
        sizes = np.exp(rng.uniform(np.log(8), np.log(400), (NUM_BOXES, 2)))
        boxes = np.concatenate([rng.uniform(0, 1, (NUM_BOXES, 2)) * (640 - sizes), sizes], 1)
        labels = rng.choice(own_classes, NUM_BOXES)
        annotations += [
            {
                "id": len(annotations) + number,
                "image_id": image_id,
                "category_id": int(label),
                "bbox": box.tolist(),
                "area": float(box[2] * box[3]),
                "iscrowd": int(rng.random() < 0.01),
            }
            for number, (box, label) in enumerate(zip(boxes, labels, strict=True), start=1)
        ]
        owners = rng.integers(0, NUM_BOXES, NUM_DETECTIONS)
        noise = rng.normal(0, 0.08, (NUM_DETECTIONS, 4))
        found = boxes[owners] + noise * sizes[owners][:, [0, 1, 0, 1]]
        strays = rng.random(NUM_DETECTIONS) < 1 / 3
        found[strays, :2] = rng.uniform(0, 400, (strays.sum(), 2))
        classes = np.where(
            rng.random(NUM_DETECTIONS) < 0.7,
            labels[owners],
            rng.choice(NUM_CLASSES, NUM_DETECTIONS) + 1,
        )
        scores = rng.beta(0.5, 3, NUM_DETECTIONS)
        results += [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for box, category, score in zip(
                found.tolist(), classes.tolist(), scores.tolist(), strict=True
            )
        ]
    ground_truth = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 640}
            for i in range(1, num_images + 1)
        ],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, NUM_CLASSES + 1)],
        "annotations": annotations,
    }
    return ground_truth, results


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it gives."""
    begin = time.perf_counter()
    value = call()
    return time.perf_counter() - begin, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    ground_truth, results = make_set(arguments.images)
    num_boxes = len(ground_truth["annotations"])
    print(
        f"{arguments.images} images, {num_boxes} boxes, {len(results)} detections, "
        f"{NUM_CLASSES} classes; {os.cpu_count()} cores"
    )
    seconds: dict[str, float] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for backend, rounds in (("hotcoco", arguments.rounds), ("pycocotools", 1)):
        indexing, evaluator = timed(lambda b=backend: CocoEvaluator(ground_truth, backend=b))
        times = []
        for _ in range(rounds):
            duration, metrics[backend] = timed(lambda e=evaluator: e.evaluate(results))
            times.append(duration)
        seconds[backend] = statistics.median(times)
        print(
            f"{backend:12} evaluation {seconds[backend]:8.2f} s ({min(times):.2f} to "
            f"{max(times):.2f} in {rounds}), indexing the ground truth {indexing:.2f} s"
        )
    fast, reference = metrics["hotcoco"], metrics["pycocotools"]
    pairs = [(fast[name], reference[name]) for name in METRIC_NAMES]
    for name, numbers in reference["per_class"].items():
        pairs += [(fast["per_class"][name][key], value) for key, value in numbers.items()]
    difference = max(abs(one - other) for one, other in pairs)
    print(f"ratio {seconds['pycocotools'] / seconds['hotcoco']:.1f}")
    print(
        f"largest difference of {len(pairs)} numbers: {difference:.1e} (AP {reference['AP']:.4f})"
    )


if __name__ == "__main__":
    main()
