"""The report's file: template.html with style.css, page.js, and what they show as JSON.

The page draws everything itself from that JSON, and puts names into it as text, never as markup.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from detection.data.coco import CocoIndex
from detection.data.sampler import spread
from detection.evaluation.analysis import Analysis
from detection.evaluation.coco import METRIC_NAMES
from detection.evaluation.comparison import Comparison, compare
from detection.evaluation.errors import KINDS
from detection.files import whole_file
from detection.images import UnreadableImage

MAX_IMAGE_BYTES = 18 * 2**20  # of all JPEGs together; base64 adds a third
# Longer side and quality, tried in turn until a picture keeps within its share.
JPEG_SIZES = ((1024, 82), (800, 78), (640, 74), (480, 68), (320, 60), (240, 40))
MIN_SCORE = 0.01  # the gallery holds no detections below


class Figure(NamedTuple):
    """A picture of a section.

    Args:
        caption: what it shows.
        content: the file's bytes.
        media_type: image/png, image/svg+xml or image/jpeg.
    """

    caption: str
    content: bytes
    media_type: str = "image/png"


class Section(NamedTuple):
    """A further part of the page, after the parts of its own.

    Args:
        title: also in the page's menu.
        text: paragraphs.
        figures: shown in order.
        header: of a table that sorts; empty for none.
        rows: its cells; numbers are shown with three decimals.
        warnings: paragraphs that stand out.
    """

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str | float | int | None]] = ()
    warnings: Sequence[str] = ()


class Run(NamedTuple):
    """One detector on the split.

    Args:
        name: what the page calls it.
        metrics: as `CocoEvaluator.evaluate` gives them.
        analysis: as `analyze` gives it.
    """

    name: str
    metrics: Mapping[str, Any]
    analysis: Analysis


def write_report(
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    index: CocoIndex,
    run: Run,
    other: Run | None = None,
    history: Iterable[Mapping[str, Any]] = (),
    num_images: int = 200,
    sections: Sequence[Section] = (),
) -> Path:
    """Write the page, atomically.

    Args:
        path: of the HTML file.
        title: its heading.
        facts: lines under the heading.
        index: the split that was evaluated.
        run: what the page is about.
        other: a second detector to compare with.
        history: records of the run's metrics.jsonl.
        num_images: in the gallery; where the split has more, half are those with most missed and
            false detections, and half are spread evenly over the others.
        sections: further parts.

    Returns:
        The path.
    """
    comparison = compare(run.analysis, other.analysis) if other else None
    worst = comparison.most_different if comparison else run.analysis.images.worst
    places = choose_images(worst.tolist(), num_images)
    content = {
        "title": title,
        "facts": list(facts.items()),
        "kinds": KINDS,
        "metricNames": METRIC_NAMES,
        "classes": list(run.analysis.matches.names),
        "run": _describe(run),
        "comparison": _describe_comparison(comparison, other) if comparison and other else None,
        "training": _describe_training(history),
        "numImages": len(index),
        "images": _describe_images(index, run, other, places),
        "sections": [_describe_section(section) for section in sections],
    }
    path = Path(path)
    with whole_file(path) as partial:
        partial.write_text(_fill_template(content), encoding="utf-8")
    return path


def choose_images(worst: list[int], num_images: int) -> list[int]:
    """Of places in the analysis' image ids, worst first, those that `write_report` shows."""
    if len(worst) <= num_images:
        return worst
    num_worst = (num_images + 1) // 2
    rest = sorted(worst[num_worst:])
    return worst[:num_worst] + [rest[i] for i in spread(len(rest), num_images - num_worst)]


def _fill_template(content: dict[str, Any]) -> str:
    folder = files("detection.report")
    page, style, script = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("template.html", "style.css", "page.js")
    )
    # No "<" of a name can end the element; the data goes in last, since it may hold anything.
    data = json.dumps(_plain(content), separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c")
    for mark, text in (("STYLE", style), ("SCRIPT", script), ("DATA", data)):
        before, after = page.split(f"<!-- {mark} -->")
        page = before + text + after
    return page


def _plain(value: Any) -> Any:
    """Arrays as lists, undefined numbers as null."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _describe(run: Run) -> dict[str, Any]:
    analysis = run.analysis
    best = analysis.best_f1
    columns = {
        "boxes": analysis.matches.num_truths,
        **analysis.class_metrics,
        "best F1": best.f1,
        "at score": best.scores,
        "precision": best.precision,
        "recall": best.recall,
    }
    images = analysis.images
    return {
        "name": run.name,
        "metrics": {n: v if (v := run.metrics[n]) >= 0 else None for n in METRIC_NAMES},
        "score": analysis.score,
        "totals": {name: int(getattr(images, name).sum()) for name in images._fields},
        "columns": columns,
        "precisionRecall": analysis.precision_recall,
        "precision": analysis.score_curves.precision,
        "recall": analysis.score_curves.recall,
        "f1": analysis.score_curves.f1,
        "confusion": analysis.confusion,
        "costs": analysis.errors.costs,
        "counts": analysis.errors.counts,
        "classCosts": analysis.errors.class_costs,
        "calibration": analysis.calibration._asdict(),
    }


def _describe_comparison(found: Comparison, other: Run) -> dict[str, Any]:
    order = found.most_different
    return {
        "other": _describe(other),
        "differences": found.class_differences,
        "onlyFirst": found.only_first[order],
        "onlySecond": found.only_second[order],
        "falseDifference": found.false_difference[order],
        "imageIds": [found.image_ids[i] for i in order],
    }


def _describe_training(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chart for each kind of number, with a line for each name."""
    own_charts = {"learning_rate": "Learning rate", "images_per_second": "Images a second"}
    metrics = {"AP": "Average precision", "AR": "Average recall"}
    charts: dict[str, dict[str, list[list[float]]]] = {}
    for record in history:
        loss = "Loss in training" if record["kind"] == "train" else "Loss of the validation split"
        for name, value in record.items():
            # An undefined metric is -1.
            if name in ("kind", "step") or not isinstance(value, (int, float)) or value < 0:
                continue
            title = own_charts.get(name) or metrics.get(name[:2], loss)
            lines = charts.setdefault(title, {})
            lines.setdefault(name, []).append([record["step"], value])
    return [{"title": title, "lines": lines} for title, lines in charts.items()]


def _describe_images(
    index: CocoIndex, run: Run, other: Run | None, places: list[int]
) -> list[dict[str, Any]]:
    index_places = {own: i for i, own in enumerate(index.image_ids)}
    own = [_split_by_image(r.analysis) for r in (run, other) if r]
    matches = run.analysis.matches
    described = []
    for place in places:
        i = index_places[matches.image_ids[place]]
        height, width = index.sizes[i]
        truths = own[0][0][place]
        described.append(
            {
                "id": index.image_ids[i],
                "name": index.file_names[i],
                "width": width,
                "height": height,
                "source": _encode_image(index, i, MAX_IMAGE_BYTES // len(places)),
                "truths": [
                    [*np.round(matches.truth_boxes_xywh[g], 1), matches.truth_labels[g], counted]
                    for g, counted in zip(truths, matches.counted[truths].astype(int), strict=True)
                ],
                "runs": [
                    _describe_detections(r.analysis, place, truths, detections[place])
                    for r, (_, detections) in zip([run, other], own, strict=False)
                    if r
                ],
            }
        )
    return described


def _describe_detections(
    analysis: Analysis, place: int, truths: np.ndarray, detections: np.ndarray
) -> dict[str, Any]:
    """The detections of an image, best first, and the score at which each truth is found."""
    matches, images = analysis.matches, analysis.images
    detections = detections[np.argsort(-matches.scores[detections], kind="stable")]
    correct = detections[matches.correct[detections]]
    found = dict(zip(matches.truths[0, correct], matches.scores[correct], strict=True))
    shown = detections[matches.scores[detections] >= MIN_SCORE]
    # Behind the kinds of errors: right, and on a crowd.
    kinds = np.where(
        matches.correct, len(KINDS), np.where(matches.wrong, analysis.errors.kinds, len(KINDS) + 1)
    )
    return {
        "found": [found.get(g) for g in truths],
        "detections": [
            [*np.round(matches.boxes_xywh[d], 1), matches.scores[d], matches.labels[d], kinds[d]]
            for d in shown
        ],
        "false": images.false[place],
        "missed": images.missed[place],
    }


def _split_by_image(analysis: Analysis) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each image, the places of its ground truths and of its detections."""
    matches = analysis.matches
    return tuple(  # pyright: ignore[reportReturnType]
        np.split(
            order := np.argsort(images, kind="stable"),
            np.searchsorted(images[order], np.arange(1, len(matches.image_ids))),
        )
        for images in (matches.truth_images, matches.images)
    )


def _encode_image(index: CocoIndex, i: int, max_bytes: int) -> str | None:
    try:
        image = index.load_image(i)
    except UnreadableImage:
        return None
    content = b""
    for size, quality in JPEG_SIZES:
        smaller = image.copy()
        smaller.thumbnail((size, size), Image.Resampling.LANCZOS)
        buffer = BytesIO()
        smaller.save(buffer, "JPEG", quality=quality, optimize=True)
        content = buffer.getvalue()
        if len(content) <= max_bytes:
            break
    return _data_uri(content, "image/jpeg")


def _describe_section(section: Section) -> dict[str, Any]:
    figures = [
        {"caption": figure.caption, "source": _data_uri(figure.content, figure.media_type)}
        for figure in section.figures
    ]
    return {**section._asdict(), "figures": figures}


def _data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
