from __future__ import annotations

import pytest
import torch
from torchvision import tv_tensors

from detection.preprocess import Preprocess


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
