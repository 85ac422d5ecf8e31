from __future__ import annotations

import pytest
import torch
from torchvision import tv_tensors

from detection.preprocess import Letterbox, Preprocess


def make_boxes(boxes: list, height: int, width: int) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=(height, width),
    )


def test_range_is_minus_one_to_one() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 3, 1, 3)
    normalised = Preprocess(input_size=3)(images)
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised, torch.tensor([-1.0, -0.6, 1.0]).expand(1, 3, 1, 3))


def test_channels_have_their_own_mean_and_std() -> None:
    preprocess = Preprocess(input_size=1, mean=[10, 20, 30], std=[1, 2, 4])
    images = torch.full((2, 3, 1, 1), 50, dtype=torch.uint8)
    assert preprocess(images)[1].flatten().tolist() == [40, 15, 5]


def test_resize_ignores_the_aspect() -> None:
    image = tv_tensors.Image(torch.zeros(3, 20, 40, dtype=torch.uint8))
    image[:, :, 20:] = 255
    resized, boxes = Preprocess(input_size=10).resize(
        image, make_boxes([[20, 5, 40, 20]], height=20, width=40)
    )
    assert resized.shape == (3, 10, 10) and resized.dtype == torch.uint8
    assert resized[:, :, :4].eq(0).all() and resized[:, :, 6:].eq(255).all()
    assert boxes.tolist() == [[5, 2.5, 10, 10]]


def test_resize_without_boxes() -> None:
    image = tv_tensors.Image(torch.zeros(3, 7, 5, dtype=torch.uint8))
    _, boxes = Preprocess(input_size=8).resize(image, make_boxes([], height=7, width=5))
    assert boxes.shape == (0, 4)


def test_an_image_of_the_right_size_is_kept() -> None:
    image = tv_tensors.Image(torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8))
    resized, _ = Preprocess(input_size=8).resize(image, make_boxes([], height=8, width=8))
    assert resized.equal(image)


def test_restore_inverts_resize() -> None:
    preprocess = Preprocess(input_size=300)
    sizes = torch.tensor([[20, 40], [600, 300]])
    originals = torch.tensor([[[1.0, 2.0, 30.0, 19.0]], [[5.0, 500.0, 250.0, 600.0]]])
    resized = []
    for boxes, (height, width) in zip(originals.tolist(), sizes.tolist(), strict=True):
        image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
        resized.append(preprocess.resize(image, make_boxes(boxes, height, width))[1])
    restored = preprocess.restore(torch.stack(resized), sizes)
    torch.testing.assert_close(restored, originals)


def test_restore_nothing() -> None:
    sizes = torch.tensor([[20, 40], [600, 300]])
    assert Preprocess(input_size=300).restore(torch.zeros(2, 0, 4), sizes).shape == (2, 0, 4)


@pytest.mark.parametrize("argument", ["mean", "std"])
def test_three_channels(argument: str) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        Preprocess(input_size=8, **{argument: [1.0, 2.0]})


def test_nothing_to_save() -> None:
    """Mean and deviation come from the config, so that weights fit whatever they are."""
    assert not Preprocess(input_size=8).state_dict()


SIZES = [(20, 40), (600, 300), (37, 37), (1, 500), (333, 7), (480, 640), (641, 639)]


def make_gradient(height: int, width: int) -> tv_tensors.Image:
    """Each pixel's colour tells where it is."""
    y = torch.linspace(0, 255, height)[:, None].expand(height, width)
    x = torch.linspace(0, 255, width).expand(height, width)
    return tv_tensors.Image(torch.stack([y, x, torch.full_like(x, 255)]).byte())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("centered", [False, True])
def test_letterbox_keeps_the_aspect(size: tuple[int, int], centered: bool) -> None:
    height, width = size
    letterbox = Letterbox(input_size=64, mean=[10.2, 20, 30], centered=centered)
    image, boxes = letterbox.resize(
        make_gradient(height, width), make_boxes([[0, 0, width, height]], height, width)
    )
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
    left, top, right, bottom = (int(side) for side in boxes[0])
    assert boxes[0].tolist() == [left, top, right, bottom], "an image ends with a pixel"
    scale = 64 / max(size)
    assert right - left == pytest.approx(max(width * scale, 1), abs=0.5)
    assert bottom - top == pytest.approx(max(height * scale, 1), abs=0.5)
    padding = torch.ones(64, 64, dtype=torch.bool)
    padding[top:bottom, left:right] = False
    assert image[2].eq(255).equal(~padding)
    assert image[:, padding].T.tolist() == [[10, 20, 30]] * int(padding.sum())
    if centered:
        assert abs(left - (64 - right)) <= 1 and abs(top - (64 - bottom)) <= 1
    else:
        assert (left, top) == (0, 0)


@pytest.mark.parametrize("centered", [False, True])
def test_letterbox_restores_exactly(centered: bool) -> None:
    letterbox = Letterbox(input_size=300, centered=centered)
    originals = torch.rand(len(SIZES), 4, 2, 2, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor(SIZES)
    originals = (originals.sort(dim=2)[0] * sizes.flip(1)[:, None, None]).flatten(2)
    resized = torch.stack(
        [
            letterbox.resize(make_gradient(*size), make_boxes(boxes.tolist(), *size))[1]
            for boxes, size in zip(originals, SIZES, strict=True)
        ]
    )
    torch.testing.assert_close(letterbox.restore(resized, sizes), originals, rtol=1e-5, atol=1e-3)


def test_what_lies_in_the_padding_is_cut_off() -> None:
    boxes = torch.tensor([[[-5.0, 10.0, 90.0, 80.0]]])
    restored = Letterbox(input_size=100).restore(boxes, torch.tensor([[100, 200]]))
    assert restored.tolist() == [[[0, 20, 180, 100]]]


@pytest.mark.parametrize("centered", [False, True])
def test_letterbox_moves_boxes_with_the_picture(centered: bool) -> None:
    image = tv_tensors.Image(torch.zeros(3, 60, 120, dtype=torch.uint8))
    image[:, 20:40, 30:90] = 255
    boxes = make_boxes([[30, 20, 90, 40]], 60, 120)
    image, boxes = Letterbox(input_size=240, mean=0, centered=centered).resize(image, boxes)
    rows, columns = (image[0] > 128).nonzero(as_tuple=True)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert boxes[0].tolist() == [side.item() for side in found]


@pytest.mark.parametrize("preprocess", [Preprocess, Letterbox])
def test_another_size(preprocess: type[Preprocess]) -> None:
    first, other = preprocess(input_size=30), preprocess(input_size=45)
    changed = first.at_size(45)
    sizes = torch.tensor([[20, 40], [50, 10], [7, 7]])
    for ours, expected in zip(changed.fit(sizes), other.fit(sizes), strict=True):
        assert ours.equal(expected)
    image = torch.randint(0, 256, (3, 20, 40), dtype=torch.uint8)
    assert changed.resize_image(image).equal(other.resize_image(image))
    assert first.input_size == 30 and first.resize_image(image).shape == (3, 30, 30)


def test_letterbox_without_boxes() -> None:
    image, boxes = Letterbox(input_size=8).resize(make_gradient(7, 5), make_boxes([], 7, 5))
    assert image.shape == (3, 8, 8) and boxes.shape == (0, 4)
    assert (
        Letterbox(input_size=8).restore(torch.zeros(1, 0, 4), torch.tensor([[7, 5]])).numel() == 0
    )
