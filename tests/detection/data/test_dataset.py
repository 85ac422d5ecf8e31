from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from detection.augmentation import Augmentation
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset, Sample, collate, find_shorter_side
from detection.data.mixing import Mixing
from detection.data.sampler import StepSampler
from detection.data.transforms import EvalTransform, TrainTransform
from detection.errors import UserError

# pyright: reportArgumentType=false
REAL_DATA = Path(__file__).parents[4] / "shared" / "data"
SIZE = 24
MIXED = {"mixing": Mixing(side=SIZE, mosaic=0.5, mixup=0.5), "num_draws": 4}


def resize(image: Any, boxes: Any) -> Any:
    return F.resize(image, [SIZE, SIZE], antialias=True), F.resize(boxes, [SIZE, SIZE])


def make_index(folder: Path, num_images: int = 6) -> CocoIndex:
    """Image i is 40 x 30 noise with i boxes."""
    random = np.random.default_rng(0)
    for i in range(num_images):
        pixels = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    content = {
        "images": [
            {"id": 10 + i, "file_name": f"{i}.jpg", "width": 40, "height": 30}
            for i in range(num_images)
        ],
        "annotations": [
            {"id": 1, "image_id": 10 + i, "category_id": 3, "bbox": [2.5 * k, 3, 9, 14]}
            for i in range(num_images)
            for k in range(i)
        ],
        "categories": [{"id": 3, "name": "thing"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return CocoIndex.load(images=folder, annotations=folder / "instances.json")


def make_dataset(
    index: CocoIndex, *, seed: int = 0, training: bool = True, **options: Any
) -> DetectionDataset:
    transform = (
        TrainTransform(
            Augmentation(vertical_flip=0.5, photometric=0.5, zoom_out=0.3), resize=resize
        )
        if training
        else EvalTransform(resize=resize)
    )
    return DetectionDataset(index, transform, seed=seed, training=training, **options)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def equal(first: Sample, second: Sample) -> bool:
    tensors = zip(first[:3], second[:3], strict=True)
    draws = (torch.empty(0) if sample.draws is None else sample.draws for sample in (first, second))
    rest = first[3:6] == second[3:6]
    return rest and torch.equal(*draws) and all(a.equal(b) for a, b in tensors)


def test_evaluation_item(tmp_path: Path):
    sample = make_dataset(make_index(tmp_path), training=False)[2]
    assert sample.image.shape == (3, SIZE, SIZE) and sample.image.dtype == torch.uint8
    assert type(sample.image) is type(sample.boxes) is torch.Tensor
    scale = torch.tensor([SIZE / 40, SIZE / 30] * 2)
    expected = torch.tensor([[0, 3, 9, 17], [2.5, 3, 11.5, 17]]) * scale
    torch.testing.assert_close(sample.boxes, expected)
    assert sample.labels.tolist() == [0, 0]
    assert (sample.image_id, sample.size, sample.unreadable) == (12, (30, 40), ())


@pytest.mark.parametrize("options", [{}, MIXED], ids=["alone", "mixed"])
def test_items_depend_on_seed_epoch_and_index_only(tmp_path: Path, options: dict[str, Any]):
    index = make_index(tmp_path)
    dataset = make_dataset(index, **options)
    keys = [(epoch, i) for epoch in range(3) for i in range(6)]
    forwards = {key: dataset[key] for key in keys}
    torch.manual_seed(123)
    backwards = {key: dataset[key] for key in reversed(keys)}
    assert all(equal(forwards[key], backwards[key]) for key in keys)
    assert not all(forwards[0, i].image.equal(forwards[1, i].image) for i in range(6))
    other = make_dataset(index, seed=1)
    assert not all(forwards[0, i].image.equal(other[0, i].image) for i in range(6))


def test_items_leave_the_generator_and_threads_alone(tmp_path: Path):
    dataset = make_dataset(make_index(tmp_path))
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    dataset[0, 1]
    assert torch.get_rng_state().equal(before) and torch.get_num_threads() == threads


@pytest.mark.parametrize("options", [{}, MIXED], ids=["alone", "mixed"])
def test_workers_give_the_same_batches(tmp_path: Path, options: dict[str, Any]):
    dataset = make_dataset(make_index(tmp_path), **options)
    truncate(tmp_path / "4.jpg")

    def load(num_workers: int) -> list[Any]:
        sampler = StepSampler(num_images=6, batch_size=4, seed=0, num_steps=5)
        return list(
            DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)
        )

    for alone, helped in zip([*load(0)] * 2, [*load(1), *load(2)], strict=True):
        assert alone.images.equal(helped.images)
        assert all(a.equal(b) for a, b in zip(alone.targets, helped.targets, strict=True))
        assert alone.image_ids.equal(helped.image_ids)
        assert alone.unreadable == helped.unreadable
        assert (alone.draws is None) == (helped.draws is None) == (not options)
        assert alone.draws is None or alone.draws.equal(helped.draws)


def test_unreadable_image_in_training_is_replaced_by_the_next(tmp_path: Path):
    dataset = make_dataset(make_index(tmp_path))
    (tmp_path / "4.jpg").write_bytes(b"no image")
    truncate(tmp_path / "5.jpg")
    sample = dataset[0, 4]
    assert sample.image_id == 10
    first, second = sample.unreadable
    assert first == "4.jpg: it is not an image"
    assert second.startswith("5.jpg: ") and "truncated" in second
    assert equal(sample, dataset[0, 4])


def test_every_unreadable_image_of_a_mosaic_is_named(tmp_path: Path):
    index = make_index(tmp_path)
    dataset = make_dataset(index, mixing=Mixing(side=SIZE, mosaic=1.0))
    (tmp_path / "4.jpg").write_bytes(b"no image")
    seen = []
    for epoch in range(10):
        sample = dataset[epoch, 3]
        assert sample.image_id == 13 and {*sample.unreadable} <= {"4.jpg: it is not an image"}
        seen.append(len(sample.unreadable))
    assert 0 < seen.count(0) < 10
    assert dataset[0, 4].image_id == 15


def test_a_mixed_item_has_the_size_that_it_became(tmp_path: Path):
    index = make_index(tmp_path)
    assert make_dataset(index)[0, 3].size == (30, 40)
    for options in ({"mosaic": 1.0}, {"mixup": 1.0}):
        dataset = make_dataset(index, mixing=Mixing(side=SIZE, **options))
        assert dataset[0, 3].size == (SIZE, SIZE)


def test_each_item_has_its_draws(tmp_path: Path):
    dataset = make_dataset(make_index(tmp_path), num_draws=5)
    batch = collate([dataset[0, 1], dataset[0, 2], dataset[1, 1]])
    assert batch.draws is not None and batch.draws.shape == (3, 5)
    assert len(batch.draws.unique()) == 15
    assert make_dataset(dataset.index)[0, 1].draws is None


def test_unreadable_image_in_evaluation_is_named(tmp_path: Path):
    dataset = make_dataset(make_index(tmp_path), training=False)
    truncate(tmp_path / "4.jpg")
    sample = dataset[4]
    assert sample.image_id == 14 and sample.size == (30, 40)
    assert sample.image.shape == (3, SIZE, SIZE) and not sample.image.any()
    assert sample.boxes.shape == (0, 4) and sample.labels.shape == (0,)
    (name,) = sample.unreadable
    assert name.startswith("4.jpg: ")


def test_no_readable_image(tmp_path: Path):
    dataset = make_dataset(make_index(tmp_path))
    for i in range(6):
        (tmp_path / f"{i}.jpg").unlink()
    with pytest.raises(UserError, match=r"none of its 6 images can be read \(first: 2.jpg: "):
        dataset[0, 2]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_folder_that_vanishes(tmp_path: Path, training: bool, left: str):
    folder = tmp_path / "images"
    folder.mkdir()
    dataset = make_dataset(make_index(folder), training=training)
    assert dataset[0, 1].unreadable == ()
    folder.rename(tmp_path / "away")
    if left != "nothing":
        folder.mkdir()
    with pytest.raises(UserError, match=f"{folder}: the folder of images is gone or empty"):
        dataset[0, 1]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_boxes_stay_on_their_objects_in_shrunk_images(
    tmp_path: Path, suffix: str, orientation: int
):
    """Black squares of which the box is known; read, they lie where the boxes lie."""
    width, height, box = 333, 517, (41, 203, 170, 290)
    image = Image.new("RGB", (width, height), "white")
    image.paste("black", box)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Stored so that the orientation turns it to what is drawn.
    stored = image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / f"0.{suffix}", exif=exif)
    left, top, right, bottom = box
    content = {
        "images": [{"id": 1, "file_name": f"0.{suffix}", "width": width, "height": height}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 3,
                "bbox": [left, top, right - left, bottom - top],
            }
        ],
        "categories": [{"id": 3, "name": "thing"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    index = CocoIndex.load(images=tmp_path, annotations=tmp_path / "instances.json")
    for shorter_side, size in ((100, (155, 100)), (40, (62, 40)), (332, (515, 332))):
        dataset = DetectionDataset(
            index, lambda *example: example, seed=0, training=True, shorter_side=shorter_side
        )
        sample = dataset[0]
        assert sample.image.shape == (3, *size) and sample.size == (height, width)
        dark = (sample.image.float().mean(0) < 128).nonzero()
        found = [*dark.amin(0).flip(0).tolist(), *(dark.amax(0).flip(0) + 1).tolist()]
        assert (sample.boxes[0] - torch.tensor(found)).abs().max() < 1.1
        expected = (
            torch.tensor(box) * torch.tensor(size[::-1] * 2) / torch.tensor([width, height] * 2)
        )
        torch.testing.assert_close(sample.boxes[0], expected)


def test_images_that_are_small_enough_are_left_alone(tmp_path: Path):
    index = make_index(tmp_path)
    transform = TrainTransform(Augmentation(), resize=resize)
    for shorter_side in (30, 45):
        shrunk = DetectionDataset(
            index, transform, seed=0, training=True, shorter_side=shorter_side
        )
        whole = DetectionDataset(index, transform, seed=0, training=True)
        assert all(equal(shrunk[0, i], whole[0, i]) for i in range(6))


def test_an_unreadable_image_is_black_at_its_shrunk_size(tmp_path: Path):
    index = make_index(tmp_path)
    truncate(tmp_path / "4.jpg")
    dataset = DetectionDataset(
        index, lambda *example: example, seed=0, training=False, shorter_side=15
    )
    assert dataset[4].image.shape == (3, 15, 20) and not dataset[4].image.any()
    assert dataset[4].size == (30, 40) and dataset[4].unreadable


@pytest.mark.parametrize(("shrink", "expected"), [(None, None), (1, 300), (1.5, 450), (0.0001, 1)])
def test_shorter_side(shrink: float | None, expected: int | None):
    assert find_shorter_side(shrink, 300) == expected


@pytest.mark.parametrize("shrink", [0, -1, "much", float("inf"), float("nan")])
def test_wrong_shrink(shrink: Any):
    with pytest.raises(UserError, match=f"data.shrink={shrink}: give how many times"):
        find_shorter_side(shrink, 300)


def test_collate_pads(tmp_path: Path):
    dataset = make_dataset(make_index(tmp_path), training=False)
    samples = [dataset[i] for i in (2, 0, 3)]
    batch = collate(samples)
    assert batch.images.shape == (3, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8
    assert batch.targets.boxes.shape == (3, 3, 4) and batch.targets.boxes.dtype == torch.float32
    assert batch.targets.labels.dtype == torch.int64
    assert batch.targets.valid.tolist() == [
        [True, True, False],
        [False, False, False],
        [True, True, True],
    ]
    assert batch.targets.boxes[0, :2].equal(samples[0].boxes)
    assert not batch.targets.boxes[~batch.targets.valid].any()
    assert batch.image_ids.tolist() == [12, 10, 13]
    assert batch.sizes.tolist() == [[30, 40]] * 3


def test_collate_without_any_box(tmp_path: Path):
    dataset = make_dataset(make_index(tmp_path), training=False)
    targets = collate([dataset[0], dataset[0]]).targets
    assert targets.boxes.shape == (2, 1, 4) and targets.labels.shape == (2, 1)
    assert not targets.valid.any()


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_images(split: str):
    root = REAL_DATA / "coco128"
    if not root.is_dir():
        pytest.skip("the real images of coco128 are not on this machine")
    index = CocoIndex.load(
        images=root / "images", annotations=root / "annotations" / f"instances_{split}.json"
    )
    dataset = make_dataset(index, training=split == "train")
    num_images = 24
    batch = collate([dataset[0, i] for i in range(num_images)])
    assert batch.images.shape == (num_images, 3, SIZE, SIZE)
    assert not any(batch.unreadable)
    assert batch.targets.valid.sum() > num_images
    boxes = batch.targets.boxes[batch.targets.valid]
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= SIZE + 1e-4
