"""Two sets of results on the same ground truth, side by side.

Shapes: K classes, I images.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from detection.evaluation.analysis import Analysis
from detection.evaluation.coco import write_metrics


class Comparison(NamedTuple):
    """What the second of two detectors does otherwise, each at its own best score.

    Args:
        names: of the classes.
        class_differences: (K,) each, the second's metrics less the first's; NaN where undefined.
        image_ids: sorted.
        only_first: (I,) ground truths that the first alone found.
        only_second: (I,) those that the second alone found.
        false_difference: (I,) false detections of the second less those of the first.
    """

    names: list[str]
    class_differences: dict[str, np.ndarray]
    image_ids: list[int]
    only_first: np.ndarray
    only_second: np.ndarray
    false_difference: np.ndarray

    @property
    def most_different(self) -> np.ndarray:
        """(I,) places of the images, those where the two disagree most first."""
        disagreement = self.only_first + self.only_second + np.abs(self.false_difference)
        return np.argsort(-disagreement, kind="stable")


def compare(first: Analysis, second: Analysis) -> Comparison:
    """Compare two analyses of the same ground truth."""
    num_images = len(first.matches.image_ids)
    found = [_find(analysis) for analysis in (first, second)]
    images = first.matches.truth_images
    return Comparison(
        names=first.matches.names,
        class_differences={
            name: second.class_metrics[name] - first.class_metrics[name]
            for name in first.class_metrics
        },
        image_ids=first.matches.image_ids,
        only_first=np.bincount(images[found[0] & ~found[1]], minlength=num_images),
        only_second=np.bincount(images[found[1] & ~found[0]], minlength=num_images),
        false_difference=second.images.false - first.images.false,
    )


def comparison_table(comparison: Comparison) -> Table:
    """The differences of each class, the largest change of AP first."""
    keys = ("AP", "AP50", "AP75", "AR100")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("class", overflow="fold")
    for key in keys:
        table.add_column(key, justify="right", no_wrap=True)
    columns = comparison.class_differences
    for k in np.argsort(-np.abs(np.nan_to_num(columns["AP"])), kind="stable"):
        values = [columns[key][k] for key in keys]
        cells = ["–" if np.isnan(value) else f"{value:+.3f}" for value in values]
        table.add_row(*map(Text, [comparison.names[k], *cells]))
    return table


def write_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write it as JSON, atomically: differences by class, and images, the most different first."""
    columns = {name: values.tolist() for name, values in comparison.class_differences.items()}
    content = {
        "per_class": {
            name: {key: None if np.isnan(v[k]) else v[k] for key, v in columns.items()}
            for k, name in enumerate(comparison.names)
        },
        "images": [
            {
                "image_id": comparison.image_ids[i],
                "only_first": int(comparison.only_first[i]),
                "only_second": int(comparison.only_second[i]),
                "false_difference": int(comparison.false_difference[i]),
            }
            for i in comparison.most_different
        ],
    }
    write_metrics(content, path)


def _find(analysis: Analysis) -> np.ndarray:
    """(G,) whether a ground truth is found at the best score."""
    matches = analysis.matches
    found = np.zeros(len(matches.counted), bool)
    found[matches.truths[0, matches.correct & (matches.scores >= analysis.score)]] = True
    return found
