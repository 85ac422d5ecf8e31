from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def make_hard_set() -> Callable[[int], tuple[dict[str, Any], list[dict[str, Any]]]]:
    """From a seed, ground truth and results as ugly as they come."""
    return _make_hard_set


@pytest.fixture(scope="session")
def make_set() -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """From rows, ground truth of images 1 and 2 with the classes a and b, and results.

    A truth is (image, class, x, width[, crowd]), a result (image, class, x, width, score): all
    boxes are 100 high, so that IoUs can be read off.
    """

    def make_set(truths: list[Any], results: list[Any]) -> Any:
        classes = {"a": 1, "b": 2}
        annotations = [
            {
                "id": number,
                "image_id": image,
                "category_id": classes[name],
                "bbox": [float(x), 0.0, float(width), 100.0],
                "area": width * 100.0,
                "iscrowd": int(bool(crowd)),
            }
            for number, (image, name, x, width, *crowd) in enumerate(truths, start=1)
        ]
        found = [
            {
                "image_id": image,
                "category_id": classes[name],
                "bbox": [float(x), 0.0, float(width), 100.0],
                "score": score,
            }
            for image, name, x, width, score in results
        ]
        ground_truth = {
            "images": [
                {"id": i, "file_name": f"{i}.jpg", "width": 900, "height": 100} for i in (1, 2)
            ],
            "categories": [{"id": own, "name": name} for name, own in classes.items()],
            "annotations": annotations,
        }
        return ground_truth, found

    return make_set


def _make_hard_set(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Whatever backends could count differently.

    Crowds, images and classes without boxes, ids that floats cannot hold, tied scores and boxes,
    more than 100 detections of a class, areas at and beside the borders, IoUs at the thresholds.
    """
    rng = np.random.default_rng(seed)
    image_ids = [2**60 + int(i) for i in rng.choice(1000, rng.integers(0, 6), replace=False)]
    category_ids = [int(c) for c in rng.choice(90, rng.integers(2, 6), replace=False)]
    sides = [1, 8, 16, 31, 32, 33, 64, 95, 96, 97]
    areas = [0.0, 1023.999, 1024.0, 9216.0, 9216.001, 1e10, 2e10]
    annotations, results = [], []
    for image_id in image_ids:
        own: list[dict[str, Any]] = []
        for _ in range(rng.choice([0, 3, 10])):
            bbox = [*map(float, rng.integers(0, 200, 2) / 2), *map(float, rng.choice(sides, 2))]
            area = bbox[2] * bbox[3] if rng.random() < 0.5 else float(rng.choice(areas))
            category = int(rng.choice(category_ids[1:]))
            crowd = int(rng.random() < 0.2)
            own.append(
                {"image_id": image_id, "category_id": category, "bbox": bbox}
                | {"area": area, "iscrowd": crowd}
            )
        annotations += own
        for _ in range(rng.choice([0, 10, 40, 250])):
            bbox = np.array([*rng.integers(0, 100, 2), *rng.choice(sides, 2)], float)
            category = int(rng.choice(category_ids))
            if own and rng.random() < 0.8:
                near = own[rng.integers(len(own))]
                bbox = np.array(near["bbox"])
                if rng.random() < 0.3:
                    bbox[2] *= rng.choice([0.5, 0.55, 0.75, 0.95])
                elif rng.random() < 0.6:
                    bbox += rng.integers(-2, 3, 4)
                category = near["category_id"] if rng.random() < 0.8 else category
            bbox[2:] = np.maximum(bbox[2:], 0)
            score = float(rng.choice([0.5, np.round(rng.random(), 1), rng.random()]))
            results.append(
                {"image_id": image_id, "category_id": category, "bbox": bbox.tolist()}
                | {"score": score}
            )
    ground_truth = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 320, "height": 320} for i in image_ids
        ],
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
        "annotations": [{**a, "id": n} for n, a in enumerate(annotations, start=1)],
    }
    return ground_truth, results
