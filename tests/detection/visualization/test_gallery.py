"""Sheets hold every picture whole."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from detection.structures import ImageDetections
from detection.visualization.colors import class_colors
from detection.visualization.drawing import draw_boxes
from detection.visualization.gallery import contact_sheet, match_detections, side_by_side

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def test_side_by_side_shows_truth_left_and_detections_right() -> None:
    image = Image.new("RGB", (640, 480), (90, 90, 90))
    truth = torch.tensor([[100.0, 100, 300, 300]])
    detections = ImageDetections(
        torch.tensor([[350.0, 200, 500, 400], [10, 300, 60, 400]]),
        torch.tensor([0.9, 0.2]),
        torch.tensor([1, 1]),
    )
    names = ["cat", "dog"]
    sheet = side_by_side(
        image, truth, torch.tensor([0]), detections, names=names, score_threshold=0.5, gap=10
    )
    assert sheet.width == 2 * 640 + 10
    top = sheet.height - 480
    assert 0 < top < 60
    left_half = sheet.crop((0, top, 640, sheet.height))
    right_half = sheet.crop((650, top, 1290, sheet.height))
    colors = class_colors(names)
    assert left_half.getpixel((100, 200)) == colors["cat"]
    assert right_half.getpixel((350, 300)) == colors["dog"]
    expected = draw_boxes(
        image, detections.boxes[:1], [1], detections.scores[:1], names=names, marks=["false"]
    )
    assert right_half.tobytes() == expected.tobytes()
    captions = sheet.crop((0, 0, 640, top)), sheet.crop((650, 0, 1290, top))
    assert all(len(caption.getcolors() or ()) > 1 for caption in captions)
    assert captions[0].tobytes() != captions[1].tobytes()


BOX, NEAR, FAR = [0.0, 0, 100, 100], [0.0, 10, 100, 110], [200.0, 0, 300, 100]


@pytest.mark.parametrize(
    ("truth", "detected", "found", "correct"),
    [
        ([], [], [], []),
        ([(BOX, 0)], [], [False], []),
        ([], [(BOX, 0, 0.9)], [], [False]),
        ([(BOX, 0)], [(BOX, 0, 0.9)], [True], [True]),
        ([(BOX, 0)], [(BOX, 1, 0.9)], [False], [False]),
        ([(BOX, 0)], [(FAR, 0, 0.9)], [False], [False]),
        # Of two on one object the surer is correct, wherever it stands.
        ([(BOX, 0)], [(BOX, 0, 0.3), (NEAR, 0, 0.9)], [True], [False, True]),
        # The nearer of two objects is taken, and the other is left for the next.
        ([(NEAR, 0), (BOX, 0)], [(BOX, 0, 0.9)], [False, True], [True]),
        ([(NEAR, 0), (BOX, 0)], [(BOX, 0, 0.9), (BOX, 0, 0.8)], [True, True], [True, True]),
    ],
)
def test_matches(truth: list, detected: list, found: list[bool], correct: list[bool]) -> None:
    detections = ImageDetections(
        torch.tensor([box for box, _, _ in detected]).view(-1, 4),
        torch.tensor([score for _, _, score in detected]),
        torch.tensor([label for _, label, _ in detected]).long(),
    )
    boxes = torch.tensor([box for box, _ in truth]).view(-1, 4)
    labels = torch.tensor([label for _, label in truth]).long()
    assert match_detections(boxes, labels, detections) == (found, correct)


def test_what_is_missed_is_dashed_on_the_left() -> None:
    image = Image.new("RGB", (640, 480), (90, 90, 90))
    truth, labels = torch.tensor([[100.0, 100, 300, 300], [400, 100, 600, 300]]), torch.zeros(2)
    detections = ImageDetections(truth[:1], torch.tensor([0.9]), torch.tensor([0]))
    sheet = side_by_side(image, truth, labels.long(), detections, names=["cat"])
    left = sheet.crop((0, sheet.height - 480, 640, sheet.height))
    expected = draw_boxes(image, truth, labels, names=["cat"], marks=["", "missed"])
    assert left.tobytes() == expected.tobytes()


def test_side_by_side_of_a_small_image_without_anything() -> None:
    detections = ImageDetections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())
    sheet = side_by_side(
        Image.new("L", (100, 50)), torch.zeros(0, 4), torch.zeros(0), detections, names=["cat"]
    )
    assert sheet.width == 2 * 500 + 8


def test_pictures_lie_centred_in_a_grid() -> None:
    pictures = [Image.new("RGB", size, RED) for size in [(40, 20), (20, 40), (40, 40)]]
    sheet = contact_sheet(pictures, columns=2, gap=4)
    assert sheet.size == (84, 84)
    assert [sheet.getpixel(p) for p in [(0, 9), (0, 10), (39, 29), (39, 30)]] == [
        *(WHITE, RED),
        *(RED, WHITE),
    ]
    assert [sheet.getpixel(p) for p in [(53, 0), (54, 0), (0, 44), (44, 44)]] == [
        *(WHITE, RED),
        *(RED, WHITE),
    ]


def test_large_pictures_shrink_and_small_ones_stay() -> None:
    pictures = [Image.new("RGB", (400, 200), RED), Image.new("RGB", (50, 50), BLUE)]
    sheet = contact_sheet(pictures, columns=1, max_size=100, gap=0)
    assert sheet.size == (100, 100)
    assert sorted(sheet.getcolors() or ()) == [(2500, BLUE), (2500, WHITE), (5000, RED)]


def test_fewer_pictures_than_columns() -> None:
    assert contact_sheet([Image.new("RGB", (30, 20))], columns=3).size == (30, 20)


def test_nothing_to_show_and_missing_captions_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="shorter"):
        contact_sheet([Image.new("RGB", (30, 20))] * 2, captions=["one"])
