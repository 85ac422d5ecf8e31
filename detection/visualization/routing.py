"""CondConv made visible: which experts a detector uses, for which classes.

An image holds objects of several classes: it counts once for each class that its ground truth has,
however many objects of it there are, so an image with a dog and a person is in the mean of both.

Shapes: N images, K classes, E experts, L routed layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from condconv import capture_routing, summarize_routing
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset
from detection.data.transforms import EvalTransform
from detection.detector import Detector
from detection.errors import UserError
from detection.files import write_json
from detection.visualization.colors import class_colors

# A layer whose weights all deviate less over the images might as well be static.
STATIC_DEVIATION = 0.01
# Entropy as a number of experts, exp(entropy): below this, one does almost all.
COLLAPSED_EXPERTS = 1.25
# Classes in the plots that give each its own colour.
MAX_COLORED = 8


class Routing(NamedTuple):
    """The routing weights of a set of images.

    Args:
        weights: of each routed layer, by its name and in the order in which they run: (N, E).
        presence: (N, K) bool, which classes the ground truth of an image holds.
        names: the class names.
    """

    weights: dict[str, Tensor]
    presence: Tensor
    names: tuple[str, ...]


class RoutingPlots(NamedTuple):
    """A part of a report.

    Args:
        title: one line.
        text: what is shown and how to read it.
        figures: by their name, which makes a file name.
        header: of the table; empty where there is none.
        rows: of the table.
    """

    title: str
    text: str
    figures: dict[str, Figure]
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def load_batches(
    detector: Detector,
    index: CocoIndex,
    places: Iterable[int] | None = None,
    *,
    batch_size: int = 16,
    unreadable: list[str] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of a split as `collect_routing` takes them.

    Args:
        places: of the images in the index; None takes all.
        unreadable: gets "file: reason" of each image that is left out.
    """
    samples = _load_samples(detector, index, places, unreadable)
    while batch := list(islice(samples, batch_size)):
        images, presence = zip(*batch, strict=True)
        yield torch.stack(images), torch.stack(presence)


def collect_routing(
    detector: Detector, batches: Iterable[tuple[Tensor, Tensor]], names: Sequence[str]
) -> Routing:
    """Run a detector and keep its routing weights.

    A router that runs several times for an image, as those of heads that serve several feature
    maps, enters with its mean weight.

    Args:
        batches: resized images (B, 3, S, S) uint8, and (B, K) bool, which classes are in them.
        names: of the K classes.

    Raises:
        UserError: the network has no router, or there is no image.
    """
    weights: dict[str, list[Tensor]] = {}
    presence: list[Tensor] = []
    for images, present in batches:
        try:
            with capture_routing(detector.network) as routing:
                detector.forward(images)
        except ValueError as error:
            raise UserError(f"there is no routing to show: {error}") from error
        for name, rows in routing.items():
            own = rows.float().unflatten(0, (-1, len(images))).mean(0)
            weights.setdefault(_short(name), []).append(own)
        presence.append(present)
    if not presence:
        raise UserError("there is no routing to show: no image could be read")
    joined = {name: torch.cat(rows) for name, rows in weights.items()}
    return Routing(joined, torch.cat(presence), tuple(names))


def describe_routing(routing: Routing) -> dict[str, Any]:
    """All numbers behind the plots, ready for JSON; what a class without images lacks is left out.

    Of each layer what `condconv.RoutingSummary` has, and for each class the mean and the standard
    deviation of each expert's weight over the images that hold the class.
    """
    seen = _seen(routing)
    layers = {}
    for (name, summary), weights in zip(
        summarize_routing(routing.weights).items(), routing.weights.values(), strict=True
    ):
        mean, deviation = _by_class(weights, routing.presence[:, seen])
        classes = {
            routing.names[k]: {"mean": mean[i].tolist(), "deviation": deviation[i].tolist()}
            for i, k in enumerate(seen)
        }
        layers[name] = {**summary._asdict(), "classes": classes}
    names = [routing.names[k] for k in seen]
    similarity = class_similarity(routing)[seen][:, seen].tolist()
    return {
        "num_images": len(routing.presence),
        "num_images_by_class": dict(
            zip(routing.names, routing.presence.sum(0).tolist(), strict=True)
        ),
        "layers": layers,
        "similarity": dict(zip(names, similarity, strict=True)),
        "warnings": find_collapse(routing),
    }


def find_collapse(routing: Routing) -> list[str]:
    """Printable lines on the layers whose experts are not put to use."""
    lines, static = [], []
    for name, summary in summarize_routing(routing.weights).items():
        num_experts = len(summary.mean)
        if summary.unused:
            which = ", ".join(map(str, summary.unused))
            lines.append(f"{name}: of {num_experts} experts these are never used: {which}")
        if num_experts > 1 and math.exp(summary.entropy) < COLLAPSED_EXPERTS:
            lines.append(f"{name}: one expert of {num_experts} has almost all of the weight")
        if len(routing.presence) > 1 and max(summary.deviation) < STATIC_DEVIATION:
            static.append(name)
    if static:
        lines.append(
            f"routing hardly depends on the image (no weight deviates by {STATIC_DEVIATION}), as in"
            f" a static network: {', '.join(static)}"
        )
    return lines


def class_similarity(routing: Routing) -> Tensor:
    """How alike classes are routed: (K, K), 1 where they are, -1 where they are opposites.

    The cosine between what sets the classes' mean weights in all layers apart from the mean over
    all images; 0 for classes without images.
    """
    return _cosine(_departures(routing))


def draw_routing(routing: Routing) -> list[RoutingPlots]:
    """Plots and a table of the routing weights, as parts of a report."""
    seen = _order(routing)
    num_images = len(routing.presence)
    summaries = summarize_routing(routing.weights)
    rows = tuple(
        (
            name,
            str(len(s.mean)),
            f"{sum(s.mean) / len(s.mean):.3f}",
            f"{sum(s.deviation) / len(s.deviation):.3f}",
            f"{math.exp(s.entropy):.2f}",
            f"{s.saturated:.0%}",
            ", ".join(map(str, s.unused)) or "–",
        )
        for name, s in summaries.items()
    )
    sections = [
        RoutingPlots(
            "Experts by layer",
            f"Routing weights of {num_images} images. Experts in use is the exponential of the"
            " entropy of the weights of an image: all of them where all weigh the same, 1 where one"
            " has all. Saturated weights are within 0.01 of 0 or 1, where routers stop to learn.",
            {"experts": _plot_experts(routing), "distribution": _plot_distribution(routing)},
            ("layer", "experts", "mean", "deviation", "experts in use", "saturated", "never used"),
            rows,
        )
    ]
    # Without ground truth there are no classes.
    if not seen:
        return sections
    return [
        *sections,
        RoutingPlots(
            "Routing by class",
            "An image counts once for each class that is in it. Points are means and bars standard"
            f" deviations over the images, of the {MAX_COLORED} classes in the most images; below,"
            " all classes, each with what sets its mean apart from that of all images.",
            {
                "classes": _plot_classes(routing),
                "differences": _plot_differences(routing, seen),
            },
        ),
        RoutingPlots(
            "Classes routed alike",
            "Cosine between the rows above: 1 for classes that use the experts in the same way, -1"
            " for opposites. Classes that share their images are alike for that reason alone.",
            {"similarity": _plot_similarity(routing, seen)},
        ),
    ]


def write_routing(routing: Routing, folder: str | Path) -> list[Path]:
    """Write every plot of `draw_routing` as PNG, and `describe_routing` as routing.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for section in draw_routing(routing):
        for name, figure in section.figures.items():
            written.append(folder / f"routing_{name}.png")
            figure.savefig(written[-1], dpi=120)
    written.append(folder / "routing.json")
    write_json(describe_routing(routing), written[-1], indent=1)
    return written


def _load_samples(
    detector: Detector,
    index: CocoIndex,
    places: Iterable[int] | None,
    unreadable: list[str] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    transform = EvalTransform(resize=detector.preprocess.resize)
    dataset = DetectionDataset(index, transform, seed=0, training=False)
    for i in range(len(index)) if places is None else places:
        sample = dataset[i]
        if sample.unreadable:
            if unreadable is not None:
                unreadable += sample.unreadable
            continue
        yield sample.image, F.one_hot(index.labels(i), len(index.categories)).any(0)


def _short(name: str) -> str:
    return name.removesuffix(".router").removesuffix(".routing_fn") or name


def _seen(routing: Routing) -> list[int]:
    """The classes that are in any image."""
    return routing.presence.any(0).nonzero()[:, 0].tolist()


def _by_class(weights: Tensor, presence: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (K, E) over the images of each class; each has some."""
    groups = [weights[present].double() for present in presence.t()]
    empty = weights.new_zeros(0, weights.shape[1]).double()
    return (
        torch.stack([group.mean(0) for group in groups]) if groups else empty,
        torch.stack([group.std(0, correction=0) for group in groups]) if groups else empty,
    )


def _departures(routing: Routing) -> Tensor:
    """The classes' mean weights less those of all images: (K, E of all layers), 0 where unseen."""
    seen = _seen(routing)
    weights = torch.cat(list(routing.weights.values()), 1)
    departures = torch.zeros(len(routing.names), weights.shape[1], dtype=torch.float64)
    departures[seen] = _by_class(weights, routing.presence[:, seen])[0] - weights.double().mean(0)
    return departures


def _cosine(rows: Tensor) -> Tensor:
    # Rounding leaves something where nothing sets a class apart, as one that is in every image.
    rows = rows.where(rows.norm(dim=1, keepdim=True) > 1e-6, 0.0)
    directions = F.normalize(rows, dim=1)
    return directions @ directions.t()


def _order(routing: Routing) -> list[int]:
    """The classes that were seen, those routed alike beside each other."""
    seen = _seen(routing)
    rows = F.normalize(_departures(routing)[seen], dim=1)
    if len(seen) < 3:
        return seen
    # Round the circle that the two strongest components span.
    first, second = torch.linalg.svd(rows, full_matrices=False)[0][:, :2].unbind(1)
    return [seen[i] for i in torch.atan2(second, first).argsort().tolist()]


def _label(routing: Routing, k: int) -> str:
    return f"{routing.names[k]} ({int(routing.presence[:, k].sum())})"


def _plot_experts(routing: Routing) -> Figure:
    """Mean and deviation of each expert, a row a layer."""
    summaries = summarize_routing(routing.weights)
    num_experts = max(len(summary.mean) for summary in summaries.values())
    figure = Figure(figsize=(9, 1.4 + 0.28 * len(summaries)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, field, limit in ((left, "mean", 1.0), (right, "deviation", None)):
        rows = [getattr(summary, field) for summary in summaries.values()]
        table = [row + [math.nan] * (num_experts - len(row)) for row in rows]
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=limit)
        axes.set_title(f"{field} of the weight")
        axes.set_xlabel("expert")
        axes.set_xticks(range(num_experts))
        figure.colorbar(image, ax=axes)
    left.set_yticks(range(len(summaries)), list(summaries))
    return figure


def _plot_distribution(routing: Routing) -> Figure:
    """A histogram of the weights of each layer."""
    figure, panels = _panels(len(routing.weights))
    for axes, (name, weights) in zip(panels, routing.weights.items(), strict=True):
        axes.hist(weights.flatten().numpy(), bins=50, range=(0, 1), color="#3b6ea5")
        axes.set_title(name, fontsize=9)
        axes.set_yticks([])
    figure.supxlabel("routing weight")
    figure.supylabel("frequency")
    return figure


def _plot_classes(routing: Routing) -> Figure:
    """Means and deviations at the first, the middle and the last layer, as the paper draws them."""
    layers = list(routing.weights.items())
    chosen = [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})]
    counts = routing.presence.sum(0)
    shown = [k for k in counts.argsort(descending=True, stable=True).tolist() if counts[k]]
    shown = shown[:MAX_COLORED]
    colors = class_colors(routing.names)
    figure = Figure(figsize=(4 * len(chosen), 4), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, (name, weights) in zip(panels, chosen, strict=True):
        mean, deviation = _by_class(weights, routing.presence[:, shown])
        experts = torch.arange(weights.shape[1]).double()
        for row, k in enumerate(shown):
            axes.errorbar(
                (experts + (row - (len(shown) - 1) / 2) * 0.8 / len(shown)).numpy(),
                mean[row].numpy(),
                deviation[row].numpy(),
                fmt="o",
                markersize=4,
                linewidth=1,
                color=[value / 255 for value in colors[routing.names[k]]],
                label=_label(routing, k),
            )
        axes.set_title(name)
        axes.set_xlabel("expert")
        axes.set_xticks(range(weights.shape[1]))
    panels[0].set_ylim(-0.03, 1.03)
    panels[0].set_ylabel("routing weight")
    if shown:
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, title="class (images)")
    return figure


def _plot_differences(routing: Routing, order: list[int]) -> Figure:
    """What sets the mean weights of each class apart, a row a class, layers beside each other."""
    departures = _departures(routing)[order]
    sizes = [weights.shape[1] for weights in routing.weights.values()]
    size = (min(18.0, 3 + 0.11 * sum(sizes)), max(3.0, 2 + 0.16 * len(order)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    _draw_matrix(axes, departures, "difference of the weight", departures.abs().max().item())
    axes.set_yticks(range(len(order)), [_label(routing, k) for k in order], fontsize=8)
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    for start in starts[1:-1]:
        axes.axvline(start - 0.5, color="0.4", linewidth=0.8)
    middles = [(start + end - 1) / 2 for start, end in pairwise(starts)]
    axes.set_xticks(middles, list(routing.weights), rotation=40, ha="right", fontsize=8)
    axes.set_xlabel("layers, and in each its experts")
    return figure


def _plot_similarity(routing: Routing, order: list[int]) -> Figure:
    side = max(4.0, 2 + 0.16 * len(order))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    similarity = class_similarity(routing)[order][:, order]
    _draw_matrix(axes, similarity, "cosine", 1.0)
    names = [routing.names[k] for k in order]
    axes.set_xticks(range(len(order)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(order)), names, fontsize=8)
    return figure


def _draw_matrix(axes: Axes, values: Tensor, title: str, limit: float) -> None:
    limit = limit or 1.0
    image = axes.imshow(values.numpy(), aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label=title)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with that many axes in rows of four."""
    columns = min(4, count)
    num_rows = -(-count // columns)
    figure = Figure(figsize=(2.6 * columns, 1.3 + 1.5 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, columns, sharex=True, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]
