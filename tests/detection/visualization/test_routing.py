"""Numbers by hand, and the door from a checkpoint to plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from detection.data.coco import CocoIndex
from detection.detector import Detector
from detection.errors import UserError
from detection.visualization.routing import (
    Routing,
    class_similarity,
    collect_routing,
    describe_routing,
    draw_routing,
    find_collapse,
    load_batches,
)
from visualize_det import visualize

# Two experts; the third image holds both classes, the fourth none; "bird" is in no image.
WEIGHTS = torch.tensor([[0.9, 0.2], [0.1, 0.6], [0.5, 0.4], [0.5, 0.0]])
PRESENCE = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]).bool()
NAMES = ("cat", "dog", "bird")


def make_routing(**layers: Tensor) -> Routing:
    return Routing(layers, PRESENCE, NAMES)


def test_an_image_counts_once_for_each_of_its_classes() -> None:
    numbers = describe_routing(make_routing(a=WEIGHTS))
    assert numbers["num_images"] == 4
    assert numbers["num_images_by_class"] == {"cat": 2, "dog": 2, "bird": 0}
    layer = numbers["layers"]["a"]
    assert layer["mean"] == pytest.approx([0.5, 0.3])
    assert list(layer["classes"]) == ["cat", "dog"]
    assert layer["classes"]["cat"]["mean"] == pytest.approx([0.7, 0.3])
    assert layer["classes"]["cat"]["deviation"] == pytest.approx([0.2, 0.1])
    assert layer["classes"]["dog"]["mean"] == pytest.approx([0.3, 0.5])
    json.dumps(numbers, allow_nan=False)


def test_similarity_is_the_cosine_of_what_sets_classes_apart() -> None:
    # Departures from the mean (0.5, 0.3): cat (0.2, 0.0), dog (-0.2, 0.2).
    similarity = class_similarity(make_routing(a=WEIGHTS))
    expected = torch.tensor([[1.0, -(0.5**0.5), 0.0], [-(0.5**0.5), 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(similarity.float(), expected)


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        (WEIGHTS, []),
        (WEIGHTS * torch.tensor([1.0, 0.01]), ["never used: 1", "almost all"]),
        (torch.full((4, 2), 0.5), ["hardly depends on the image"]),
        (torch.zeros(4, 2), ["never used: 0, 1", "almost all", "hardly depends"]),
    ],
)
def test_collapse_is_told(weights: Tensor, parts: list[str]) -> None:
    lines = find_collapse(make_routing(a=weights))
    assert len(lines) == len(parts)
    for line, part in zip(lines, parts, strict=True):
        assert part in line and "a" in line


def test_plots_of_layers_with_different_numbers_of_experts() -> None:
    three = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    sections = draw_routing(make_routing(a=WEIGHTS, b=three))
    figures = {name: figure for section in sections for name, figure in section.figures.items()}
    assert " ".join(figures) == "experts distribution classes differences similarity"
    means = figures["experts"].axes[0].images[0].get_array()
    assert means is not None and means.shape == (2, 3) and means[0].mask.tolist()[2]
    differences = figures["differences"].axes[0].images[0].get_array()
    assert differences is not None and differences.shape == (2, 5)
    assert [row[:2] for row in sections[0].rows] == [("a", "2"), ("b", "3")]
    assert all(len(row) == len(sections[0].header) for row in sections[0].rows)


def test_without_ground_truth_there_are_no_classes() -> None:
    routing = Routing({"a": WEIGHTS}, torch.zeros(4, 3).bool(), NAMES)
    assert [section.title for section in draw_routing(routing)] == ["Experts by layer"]
    assert describe_routing(routing)["layers"]["a"]["classes"] == {}


def make_index(folder: Path) -> CocoIndex:
    """Five images; the first class is in the odd ones, and the last is no image."""
    random = torch.Generator().manual_seed(0)
    for i in range(5):
        pixels = torch.randint(0, 256, (48, 64, 3), generator=random, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    (folder / "4.png").write_bytes(b"no image")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(5)],
        "annotations": [
            {"id": number, "image_id": i, "category_id": 1, "bbox": [1, 1, 20, 20], "area": 400}
            for number, i in enumerate((1, 1, 3), start=1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (folder / "all.json").write_text(json.dumps(content))
    return CocoIndex.load(images=folder, annotations=folder / "all.json")


def test_routing_does_not_depend_on_the_batches(trained: Path, tmp_path: Path) -> None:
    detector = Detector.from_checkpoint(trained / "checkpoints" / "best.pt")
    index = make_index(tmp_path)
    routings = []
    for batch_size in (1, 3):
        unreadable: list[str] = []
        batches = load_batches(detector, index, batch_size=batch_size, unreadable=unreadable)
        routings.append(collect_routing(detector, batches, ["cat", "dog"]))
        assert len(unreadable) == 1 and unreadable[0].startswith("4.png: ")
    assert routings[0].presence.tolist() == [[i in (1, 3), False] for i in range(4)]
    assert list(routings[0].weights)[:1] == ["backbone.blocks.5"]
    for alone, together in zip(*(r.weights.values() for r in routings), strict=True):
        assert alone.shape == (4, 2)
        torch.testing.assert_close(alone, together)


def test_a_head_that_serves_several_maps_enters_with_its_mean() -> None:
    from condconv import Router

    router = Router(2, 3)

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = router

        def forward(self, x: Tensor) -> None:
            self.router(x), self.router(3 * x)

    class Stub:
        network = Shared()
        forward = network.__call__

    images = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    batches = [(part, torch.ones(len(part), 1).bool()) for part in images.split([3, 1])]
    routing = collect_routing(Stub(), batches, ["cat"])  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        expected = (router(images) + router(3 * images)) / 2
    torch.testing.assert_close(routing.weights["router"], expected)


def test_the_door(compose_config: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    checkpoint = f"checkpoint={trained / 'checkpoints' / 'best.pt'}"
    overrides = [checkpoint, f"output={tmp_path}", "routing=true", "device=cpu", "max_images=4"]
    written = visualize(compose_config("visualize", overrides))
    assert all(path.exists() for path in written)
    assert [path.suffix for path in written] == [".png"] * 5 + [".json"]
    assert json.loads(written[-1].read_text())["num_images"] == 4


def test_what_has_no_routing_is_said(trained: Path) -> None:
    detector = Detector.from_checkpoint(trained / "checkpoints" / "best.pt")
    with pytest.raises(UserError, match="no image could be read"):
        collect_routing(detector, [], ["cat"])
    detector.network = torch.nn.Conv2d(3, 2, 1)
    batch = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1, 1).bool()
    with pytest.raises(UserError, match="has no router: it is not conditional"):
        collect_routing(detector, [batch], ["cat"])
