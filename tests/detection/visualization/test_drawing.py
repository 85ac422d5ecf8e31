"""Boxes land where they belong, and labels stay inside the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from detection.errors import UserError
from detection.onnx_detector import ArrayDetections
from detection.structures import ImageDetections
from detection.visualization.colors import class_colors
from detection.visualization.drawing import (
    _find_font,
    _overlap,
    _place_labels,
    draw_boxes,
    draw_detections,
)

NAMES = ["cat", "dog", "an unusually long name of a class that never ends"]
COLORS = class_colors(NAMES)
GREY = Image.new("RGB", (640, 480), (90, 90, 90))


def painted_box(picture: Image.Image, blank: Image.Image) -> tuple[int, int, int, int] | None:
    return ImageChops.difference(picture, blank).getbbox()


def test_the_frame_has_the_color_of_its_class_and_the_inside_is_untouched() -> None:
    picture = draw_boxes(GREY, [[100, 120, 300, 400]], [1], [0.9], names=NAMES)
    for x, y in [(100, 200), (299, 200), (200, 120), (200, 399), (101, 398)]:
        assert picture.getpixel((x, y)) == COLORS["dog"]
    for x, y in [(200, 200), (99, 300), (300, 300), (200, 400), (104, 300)]:
        assert picture.getpixel((x, y)) == (90, 90, 90)
    assert GREY.getcolors() == [(640 * 480, (90, 90, 90))]


def test_labels_hold_name_and_score() -> None:
    box = [[100, 100, 300, 300]]
    plain = draw_boxes(GREY, box, [0], names=NAMES)
    scored = draw_boxes(GREY, box, [0], [0.5], names=NAMES)
    other = draw_boxes(GREY, box, [0], [0.51], names=NAMES)
    plain_box, scored_box = painted_box(plain, GREY), painted_box(scored, GREY)
    assert plain_box
    assert scored_box
    assert plain_box[1] == scored_box[1] < 100
    assert painted_box(plain, scored)
    assert painted_box(scored, other)


@pytest.mark.parametrize("boxes", [[], torch.zeros(0, 4), np.zeros((0, 4), np.float32)])
def test_no_boxes(boxes: object) -> None:
    picture = draw_boxes(GREY, boxes, [], [], names=NAMES)
    assert painted_box(picture, GREY) is None


def test_threshold_leaves_out_lower_scores_only() -> None:
    boxes = torch.tensor([[50.0, 50, 150, 150], [300, 50, 400, 150], [300, 300, 400, 400]])
    scores = torch.tensor([0.25, 0.5, 0.75])
    picture = draw_boxes(GREY, boxes, [0, 0, 0], scores, names=NAMES, score_threshold=0.5)
    expected = draw_boxes(GREY, boxes[1:], [0, 0], scores[1:], names=NAMES)
    assert painted_box(picture, expected) is None
    truth = draw_boxes(GREY, boxes, [0, 0, 0], names=NAMES, score_threshold=0.5)
    assert truth.getpixel((50, 100)) == COLORS["cat"]


def test_the_surest_box_is_on_top() -> None:
    boxes, labels = [[100, 100, 300, 300], [100, 100, 300, 300]], [0, 1]
    first = draw_boxes(GREY, boxes, labels, [0.9, 0.3], names=NAMES)
    second = draw_boxes(GREY, boxes, labels, [0.3, 0.9], names=NAMES)
    assert first.getpixel((200, 299)) == COLORS["cat"]
    assert second.getpixel((200, 299)) == COLORS["dog"]


def test_small_images_grow_by_a_whole_factor_with_their_boxes() -> None:
    small = GREY.resize((100, 60))
    picture = draw_boxes(small, [[10, 20, 50, 40]], [0], names=NAMES)
    assert picture.size == (500, 300)
    assert picture.getpixel((50, 150)) == COLORS["cat"]
    assert picture.getpixel((150, 199)) == COLORS["cat"]
    assert draw_boxes(small, [], [], names=NAMES, min_size=0).size == (100, 60)


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 640, 480],
        [-50, -50, 30, 30],
        [630, 0, 700, 20],
        [0, 470, 20, 500],
        [700, 500, 800, 600],
        [320, 240, 320, 240],
    ],
)
def test_boxes_at_and_over_the_border(box: list[int]) -> None:
    picture = draw_boxes(GREY, [box], [2], [1.0], names=NAMES)
    assert picture.size == (640, 480)
    assert painted_box(picture, GREY)


def test_a_name_wider_than_the_picture_is_shortened_and_keeps_its_score() -> None:
    narrow = Image.new("RGB", (120, 600))
    box = [[20, 200, 100, 400]]
    picture = draw_boxes(narrow, box, [2], [0.25], names=NAMES)
    other = draw_boxes(narrow, box, [2], [0.26], names=NAMES)
    changed = painted_box(picture, other)
    assert changed
    assert changed[2] < 120


corners = st.integers(-50, 450)


@given(
    boxes=st.lists(st.tuples(corners, corners, corners, corners), max_size=12),
    size=st.tuples(st.integers(100, 400), st.integers(30, 400)),
)
@settings(max_examples=50, deadline=None)
def test_labels_stay_inside(boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> None:
    places = _place_labels(boxes, [(90, 20)] * len(boxes), size)
    assert len(places) == len(boxes)
    for left, top, right, bottom in places:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_labels_give_way_to_those_on_top_of_them() -> None:
    lower, upper = _place_labels([(100, 100, 200, 200)] * 2, [(60, 20)] * 2, (400, 400))
    assert upper == (100, 80, 160, 100)
    assert _overlap(lower, upper) == 0


def test_marked_boxes_are_dashed_and_say_why() -> None:
    box = [[100, 120, 300, 400]]
    plain = draw_boxes(GREY, box, [0], [0.9], names=NAMES)
    marked = draw_boxes(GREY, box, [0], [0.9], names=NAMES, marks=["false"])
    empty = draw_boxes(GREY, box, [0], [0.9], names=NAMES, marks=[""])
    assert empty.tobytes() == plain.tobytes()
    frame = [marked.getpixel((100, y)) for y in range(140, 390)]
    assert set(frame) == {COLORS["cat"], (255, 255, 255)}
    assert 0.3 < frame.count((255, 255, 255)) / len(frame) < 0.7
    assert marked.getpixel((200, 200)) == (90, 90, 90)
    labels = [painted_box(picture.crop((0, 0, 640, 119)), GREY.crop((0, 0, 640, 119)))
              for picture in (plain, marked)]  # fmt: skip
    assert labels[0] and labels[1] and labels[1][2] > labels[0][2] + 20


def test_names_that_pillows_font_lacks() -> None:
    box = [[100, 120, 600, 400]]
    pictures = [draw_boxes(GREY, box, [0], names=[name]) for name in ("лев", "кот", "пёс")]
    # Boxes for missing characters would all look alike.
    colors = [class_colors([name])[name] for name in ("лев", "кот", "пёс")]
    shapes = {
        (np.asarray(picture.crop((100, 95, 170, 119))) == color).all(2).tobytes()
        for picture, color in zip(pictures, colors, strict=True)
    }
    assert len(shapes) == 3
    assert _find_font(frozenset("кот")) and _find_font(frozenset("\U0010fffd")) is None


def test_detections_bring_their_names() -> None:
    detections = ImageDetections(
        torch.tensor([[100.0, 120, 300, 400], [10, 10, 50, 50]]),
        torch.tensor([0.9, 0.1]),
        torch.tensor([1, 0]),
        names=tuple(NAMES),
    )
    picture = draw_detections(GREY, detections, score_threshold=0.5)
    expected = draw_boxes(GREY, detections.boxes[:1], [1], [0.9], names=NAMES)
    assert picture.tobytes() == expected.tobytes()
    arrays = ArrayDetections(*(field.numpy() for field in detections[:3]))
    picture = draw_detections(GREY, arrays, names=NAMES, score_threshold=0.5)
    assert picture.tobytes() == expected.tobytes()
    with pytest.raises(UserError, match="label 1 has no name"):
        draw_detections(GREY, arrays)


def test_every_kind_of_image() -> None:
    array = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    grey = array[:, :, 0]
    box, label = [[10, 40, 200, 200]], [0]
    for images in (
        [array, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)],
        [grey, grey[:, :, None], Image.fromarray(grey), torch.from_numpy(grey.copy())[None]],
    ):
        pictures = [draw_boxes(image, box, label, names=NAMES) for image in images]
        assert all(picture.mode == "RGB" for picture in pictures)
        assert len({picture.tobytes() for picture in pictures}) == 1


@pytest.mark.parametrize(
    "image",
    [np.zeros((20, 20, 3)), np.zeros((20, 20, 4), np.uint8), torch.zeros(2, 3, 20, 20).byte()],
)
def test_other_images_are_refused(image: object) -> None:
    with pytest.raises(UserError, match="cannot draw on"):
        draw_boxes(image, [], [], names=NAMES)  # pyright: ignore[reportArgumentType]
