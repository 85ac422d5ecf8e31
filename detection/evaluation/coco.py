"""The official COCO metric, as pycocotools computes it, or hotcoco in a fraction of the time.

Shapes: N detections of an image. In pycocotools' arrays, (T, R, K, A, M) and (T, K, A, M):
T IoU thresholds (0.50 to 0.95), R recall points, K categories, A area ranges (the first is all),
M limits of detections an image and category (the last is 100).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from detection.errors import UserError
from detection.files import write_json
from detection.structures import Category

METRIC_NAMES = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)  # in the order of COCOeval.stats

ROWS_PER_BLOCK = 20

Backend = Literal["pycocotools", "hotcoco"]


def fastest_backend() -> Backend:
    """hotcoco where it is installed, else pycocotools."""
    return "hotcoco" if find_spec("hotcoco") else "pycocotools"


def coco_results(
    boxes_xyxy: Tensor,
    scores: Tensor,
    labels: Tensor,
    image_id: int,
    categories: Sequence[Category] | Mapping[int, Category],
) -> list[dict[str, Any]]:
    """Detections of one image in the COCO results format.

    Args:
        boxes_xyxy: (N, 4) in pixels of the original image.
        scores: (N,).
        labels: (N,) places in `categories`.
        image_id: the data set's own id of the image.
        categories: the category table, or a mapping from labels.

    Returns:
        One dict a detection: image_id, category_id, bbox (xywh), score; nothing is rounded.
    """
    return [
        {
            "image_id": int(image_id),
            "category_id": categories[label].id,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for (x1, y1, x2, y2), score, label in zip(
            boxes_xyxy.tolist(), scores.tolist(), labels.tolist(), strict=True
        )
    ]


def evaluate_coco(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of one set of results; see `CocoEvaluator`, which serves many."""
    return CocoEvaluator(ground_truth).evaluate(results)


class CocoEvaluator:
    """Evaluates results against one ground truth, which is indexed once.

    Args:
        ground_truth: a COCO dict (images, annotations, categories). Exactly its images are
            evaluated. Every annotation needs `area`, `iscrowd` and an id that is not 0, which
            pycocotools reads as "no match". The dict is not changed.
        backend: hotcoco gives the same numbers, many times faster.

    Raises:
        UserError: there is no such backend, or it is not installed.
    """

    def __init__(self, ground_truth: dict[str, Any], *, backend: str = "pycocotools") -> None:
        if backend not in get_args(Backend):
            raise UserError(f"evaluation.backend={backend}: give {' or '.join(get_args(Backend))}")
        if not find_spec(backend):
            raise UserError(f"evaluation.backend={backend}: install it (pip install {backend})")
        self.backend = backend
        self.ground_truth = ground_truth
        self.categories = sorted(ground_truth["categories"], key=lambda c: c["id"])
        self.image_ids = sorted(image["id"] for image in ground_truth["images"])
        self._index = {"pycocotools": _PycocotoolsIndex, "hotcoco": _HotcocoIndex}[backend](
            ground_truth, self.image_ids, [category["id"] for category in self.categories]
        )

    @property
    def names(self) -> list[str]:
        """The category names, by id; names that several categories bear are told apart by id."""
        num_bearers = Counter(category["name"] for category in self.categories)
        return [
            c["name"] if num_bearers[c["name"]] == 1 else f"{c['name']} ({c['id']})"
            for c in self.categories
        ]

    def evaluate(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """The COCO metrics of `results`, in plain floats; -1 where no ground truth defines them.

        Args:
            results: COCO results format, as `coco_results` gives it; may be empty; not changed.

        Returns:
            The 12 numbers of pycocotools under `METRIC_NAMES`, and `per_class`: for each category
            name, in the order of ids, AP, AP50, AP75, AR100 and num_boxes (without crowds).

        Raises:
            UserError: a result names an unknown image or category, or holds a number that is not
                finite.
        """
        evaluation = self.accumulate(results)
        with redirect_stdout(StringIO()):
            evaluation.summarize()
        metrics: dict[str, Any] = dict(zip(METRIC_NAMES, map(float, evaluation.stats), strict=True))
        return {**metrics, "per_class": self._per_class(evaluation)}

    def accumulate(self, results: list[dict[str, Any]]) -> Any:
        """The COCOeval of `results`, evaluated and accumulated, as `evaluate` reads it.

        Its `eval` and `evalImgs` are the same of either backend; in these, detections are numbered
        from 1 in the order of `results`.

        Raises:
            UserError: as `evaluate`.
        """
        self._check(results)
        with redirect_stdout(StringIO()):
            evaluation = self._index.compare(results)
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation

    def _per_class(self, evaluation: Any) -> dict[str, dict[str, float]]:
        num_boxes = Counter(
            annotation["category_id"]
            for annotation in self.ground_truth["annotations"]
            if not annotation["iscrowd"]
        )
        precision_trk = evaluation.eval["precision"][:, :, :, 0, -1]
        recall_tk = evaluation.eval["recall"][:, :, 0, -1]
        return {
            name: {
                "AP": mean_defined(precision_trk[:, :, k]),
                "AP50": mean_defined(precision_trk[0, :, k]),
                "AP75": mean_defined(precision_trk[5, :, k]),
                "AR100": mean_defined(recall_tk[:, k]),
                "num_boxes": num_boxes[self.categories[k]["id"]],
            }
            for k, name in enumerate(self.names)
        }

    def _check(self, results: list[dict[str, Any]]) -> None:
        for key, known in (
            ("image_id", set(self.image_ids)),
            ("category_id", {category["id"] for category in self.categories}),
        ):
            if unknown := sorted({result[key] for result in results} - known):
                raise UserError(
                    f"results name {len(unknown)} {key}s that the annotations do not hold"
                    f" (first: {unknown[0]}): evaluate on the data set they were made for"
                )
        if len(broken := np.flatnonzero(~np.isfinite(_numbers(results)).all(1))):
            raise UserError(
                f"{len(broken)} results hold numbers that are not finite (first: image_id"
                f" {results[broken[0]]['image_id']}): the weights that made them are broken"
            )


def write_results(results: list[dict[str, Any]], path: str | Path) -> None:
    """Write COCO results as JSON, atomically and unrounded: pycocotools reads the same numbers."""
    write_json(results, path)


def write_metrics(metrics: dict[str, Any], path: str | Path) -> None:
    """Write metrics as JSON, atomically."""
    write_json(metrics, path, indent=2)


def metrics_table(metrics: dict[str, Any]) -> RenderableType:
    """The 12 numbers, then every class; a dash stands where no ground truth defines a number."""
    return Group(
        *(
            _table(list(names), [[_format(metrics[name]) for name in names]])
            for names in (METRIC_NAMES[:6], METRIC_NAMES[6:])
        ),
        _per_class_table(metrics["per_class"]),
    )


def _per_class_table(per_class: dict[str, dict[str, float]]) -> RenderableType:
    keys = ("AP", "AP50", "AP75", "AR100")
    rows = [
        [name, str(numbers["num_boxes"]), *(_format(numbers[key]) for key in keys)]
        for name, numbers in per_class.items()
    ]
    return Columns(
        _table(["class", "boxes", *keys], rows[start : start + ROWS_PER_BLOCK])
        for start in range(0, len(rows), ROWS_PER_BLOCK)
    )


def _table(header: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in header:
        if name == "class":
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True, min_width=5)
    for row in rows:
        # Text, because class names could hold rich's markup.
        table.add_row(*map(Text, row))
    return table


def _format(value: float) -> str:
    return "–" if value < 0 else f"{value:.3f}"


def mean_defined(values: np.ndarray) -> float:
    """The mean of what is not -1; -1 where nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else -1.0


class _PycocotoolsIndex:
    def __init__(self, dataset: dict[str, Any], *_: Any) -> None:
        self.dataset = dataset
        self.truth = self._index(dataset["annotations"])

    def compare(self, results: list[dict[str, Any]]) -> COCOeval:
        annotations = [
            {**result, "id": i, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
            for i, result in enumerate(results, start=1)
        ]
        # loadRes would do the same, but refuses an empty list and writes into the results.
        return COCOeval(self.truth, self._index(annotations), iouType="bbox")

    def _index(self, annotations: list[dict[str, Any]]) -> COCO:
        coco: Any = COCO()
        # pycocotools writes flags into the annotations: it gets its own.
        coco.dataset = {**self.dataset, "annotations": [dict(a) for a in annotations]}
        with redirect_stdout(StringIO()):
            coco.createIndex()
        return coco


class _HotcocoIndex:
    """Ids go through floats: hotcoco gets their places, which have the same order."""

    def __init__(
        self, dataset: dict[str, Any], image_ids: list[int], category_ids: list[int]
    ) -> None:
        import hotcoco

        self.evaluation: Any = hotcoco.COCOeval
        self.image_places = {own: place for place, own in enumerate(image_ids, start=1)}
        self.category_places = {own: place for place, own in enumerate(category_ids, start=1)}
        self.truth = hotcoco.COCO(
            {
                "images": [
                    {**image, "id": self.image_places[image["id"]]} for image in dataset["images"]
                ],
                "categories": [{"id": p, "name": str(p)} for p in self.category_places.values()],
                "annotations": [
                    {
                        **{key: a[key] for key in ("id", "bbox", "area", "iscrowd")},
                        "image_id": self.image_places[a["image_id"]],
                        "category_id": self.category_places[a["category_id"]],
                    }
                    for a in dataset["annotations"]
                ],
            }
        )

    def compare(self, results: list[dict[str, Any]]) -> Any:
        images = [self.image_places[result["image_id"]] for result in results]
        categories = [self.category_places[result["category_id"]] for result in results]
        columns = np.column_stack([images, _numbers(results), categories])
        return self.evaluation(self.truth, self.truth.load_res(columns), "bbox")


def _numbers(results: list[dict[str, Any]]) -> np.ndarray:
    """(N, 5) box (xywh) and score."""
    rows = [(*result["bbox"], result["score"]) for result in results]
    return np.array(rows, np.float64).reshape(-1, 5)
