from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from detection.augmentation import Augmentation
from detection.data import image_cache
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset, Sample, collate
from detection.data.image_cache import ImageCache, disk_path, open_cache
from detection.data.sampler import StepSampler
from detection.data.transforms import TrainTransform
from detection.errors import UserError
from detection.preprocess import Preprocess

NUM_IMAGES = 6
LOGGER = "detection.data.image_cache"


def draw(path: Path, seed: int, *, seconds: int = 0) -> None:
    """Noise of 48 x 40; `seconds` is the time of modification."""
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 40)).save(path, quality=95)
    os.utime(path, (seconds, seconds))


def make_index(folder: Path) -> CocoIndex:
    suffixes = [".png" if i == 2 else ".jpg" for i in range(NUM_IMAGES)]
    for i, suffix in enumerate(suffixes):
        draw(folder / f"{i}{suffix}", seed=i)
    content = {
        "images": [
            {"id": i, "file_name": f"{i}{suffix}", "width": 48, "height": 40}
            for i, suffix in enumerate(suffixes)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [3 * i, 3, 20, 14]}
            for i in range(NUM_IMAGES)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return CocoIndex.load(images=folder, annotations=folder / "instances.json")


class Setting:
    """A split, its cache, and the data set that reads through it."""

    def __init__(self, folder: Path, shorter_side: int | None = 25) -> None:
        (folder / "images").mkdir()
        self.index = make_index(folder / "images")
        self.path = folder / "cache" / "cache.pixels"
        self.shorter_side = shorter_side
        # Bytes of an image.
        self.size = 3 * (48 * 40 if shorter_side is None else 30 * 25)

    def open(self, **options: Any) -> ImageCache:
        return open_cache(self.path, self.index, shorter_side=self.shorter_side, **options)

    def dataset(self, cache: ImageCache | None) -> DetectionDataset:
        resize = Preprocess(input_size=24).resize
        return DetectionDataset(
            self.index,
            TrainTransform(Augmentation(photometric=0.5, zoom_out=0.3), resize=resize),
            seed=0,
            training=True,
            shorter_side=self.shorter_side,
            cache=cache,
        )

    def expected(self, epochs: int = 1) -> list[Sample]:
        return read(self.dataset(None), epochs)


@pytest.fixture(params=[None, 25])
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Setting:
    return Setting(tmp_path, request.param)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each image that is decoded, in this process."""
    names: list[str] = []
    load = ImageCache.load

    def note(self: ImageCache, i: int, path: Path, decode: Callable[[], Tensor]) -> Tensor:
        def decode_and_note() -> Tensor:
            names.append(path.name)
            return decode()

        return load(self, i, path, decode_and_note)

    monkeypatch.setattr(ImageCache, "load", note)
    return names


def read(dataset: DetectionDataset, epochs: int = 1) -> list[Sample]:
    return [dataset[epoch, i] for epoch in range(epochs) for i in range(len(dataset))]


def assert_equal(first: list[Sample], second: list[Sample]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert all(x.equal(y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3:] == b[3:]


def test_images_are_decoded_once_and_stay_what_they_are(setting: Setting, decoded: list[str]):
    expected = setting.expected(epochs=3)
    assert_equal(read(setting.dataset(setting.open()), epochs=2), expected[: 2 * NUM_IMAGES])
    assert len(decoded) == NUM_IMAGES
    # The next run finds them.
    assert_equal(read(setting.dataset(setting.open()), epochs=3), expected)
    assert len(decoded) == NUM_IMAGES


@pytest.mark.parametrize("shorter_side", [None, 25])
def test_a_kept_image_lies_in_memory_as_a_decoded_one(tmp_path: Path, shorter_side: int | None):
    """Or operations on it would be slower; and writing into it changes no other's."""
    setting = Setting(tmp_path, shorter_side)
    dataset = setting.dataset(setting.open())
    first, second, third = (dataset._pixels(1) for _ in range(3))
    assert first.equal(second) and first.stride() == second.stride()
    assert first.dtype == torch.uint8
    second.zero_()
    assert first.equal(third) and dataset._pixels(1).equal(first)


@pytest.mark.parametrize(
    ("start_method", "has_name"),
    [
        ("fork", True),
        ("fork", False),
        # Its workers import everything.
        pytest.param("forkserver", False, marks=pytest.mark.slow),
    ],
)
def test_workers_share_it(tmp_path: Path, decoded: list[str], start_method: str, has_name: bool):
    """Also where its name is gone, as that of a cache in memory."""
    setting = Setting(tmp_path)
    cache = setting.open()
    if not has_name:
        setting.path.unlink()

    def batches(cache: ImageCache | None, num_workers: int) -> list[Any]:
        sampler = StepSampler(num_images=NUM_IMAGES, batch_size=2, seed=0, num_steps=7)
        loader = DataLoader(
            setting.dataset(cache),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            multiprocessing_context=start_method if num_workers else None,
        )
        return list(loader)

    expected = batches(None, 0)
    for found in (batches(cache, 2), batches(cache, 0)):
        for a, b in zip(expected, found, strict=True):
            assert a.images.equal(b.images) and a.image_ids.equal(b.image_ids)
            assert all(x.equal(y) for x, y in zip(a.targets, b.targets, strict=True))
    assert decoded == []  # this process found what the workers had decoded


def test_it_is_sent_to_a_process_as_an_open_file(setting: Setting, decoded: list[str]):
    cache = setting.open()
    expected = read(setting.dataset(cache))
    setting.path.unlink()
    sent = ForkingPickler.dumps(cache)
    cache.close()
    assert_equal(read(setting.dataset(pickle.loads(sent))), expected)
    assert len(decoded) == NUM_IMAGES


def test_a_changed_image_is_decoded_anew(setting: Setting, decoded: list[str]):
    old = setting.dataset(setting.open())
    read(old)
    path = setting.index.images_dir / "3.jpg"
    draw(path, seed=99, seconds=1)
    assert_equal(read(setting.dataset(setting.open())), setting.expected())
    assert decoded[NUM_IMAGES:] == ["3.jpg"]
    # Who had relied on the old one relies on this one only after another look.
    content = bytearray(setting.path.read_bytes())
    content[-3 * setting.size + 5] ^= 1  # a pixel of the third from the end
    setting.path.write_bytes(content)
    assert_equal(read(old), setting.expected())
    assert decoded[NUM_IMAGES:] == ["3.jpg", "3.jpg"]


def test_an_image_that_is_written_anew_amid_reading(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
):
    """By another process that has seen its file change; half of the pixels are other ones then."""
    dataset = setting.dataset(setting.open())
    read(dataset)
    path, other = setting.index.images_dir / "3.jpg", setting.dataset(setting.open())
    draw(path, seed=99, seconds=1)
    read_pixels, write = ImageCache._read_pixels, os.pwrite

    def read_amid_writing(self: ImageCache, i: int) -> Tensor | None:
        pixels = None

        def write_and_read(descriptor: int, content: Any, place: int) -> int:
            nonlocal pixels
            if len(content) == 8 or pixels is not None:
                return write(descriptor, content, place)
            count = write(descriptor, content[: len(content) // 2], place)
            pixels = read_pixels(self, i)
            return count

        with monkeypatch.context() as patch:
            patch.setattr(ImageCache, "_read_pixels", read_pixels)
            patch.setattr(os, "pwrite", write_and_read)
            other[0, 3]
        return pixels

    with monkeypatch.context() as patch:
        patch.setattr(ImageCache, "_read_pixels", read_amid_writing)
        found = dataset._pixels(3)
    assert found.equal(setting.dataset(None)._pixels(3))


def test_a_change_of_size_or_time_alone_is_enough(setting: Setting, decoded: list[str]):
    read(setting.dataset(setting.open()))
    (first, second) = (setting.index.images_dir / f"{i}.jpg" for i in (0, 1))
    first.write_bytes(first.read_bytes() + b"\0")
    os.utime(first, (0, 0))
    os.utime(second, (0, 1))
    read(setting.dataset(setting.open()))
    assert decoded[NUM_IMAGES:] == ["0.jpg", "1.jpg"]


def test_an_image_that_may_still_change_is_not_kept(setting: Setting, decoded: list[str]):
    """Two versions of one size, written within a tick of the clock, look the same."""
    os.utime(setting.index.images_dir / "0.jpg")
    dataset = setting.dataset(setting.open())
    read(dataset), read(dataset)
    assert decoded[NUM_IMAGES:] == ["0.jpg"]


def test_unreadable_images_are_replaced_as_without_a_cache(setting: Setting):
    folder = setting.index.images_dir
    (folder / "1.jpg").write_bytes(b"no image")
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:-200])
    (folder / "4.jpg").unlink()
    expected = setting.expected(epochs=2)
    assert [len(sample.unreadable) for sample in expected[:NUM_IMAGES]] == [0, 1, 0, 2, 1, 0]
    assert_equal(read(setting.dataset(setting.open()), epochs=2), expected)


def write_and_die(setting: Setting, num_writes: int) -> None:
    """As far as the last write, of which half is done."""
    write, count = os.pwrite, 0

    def write_half(descriptor: int, content: Any, place: int) -> int:
        nonlocal count
        count += 1
        if count < num_writes:
            return write(descriptor, content, place)
        write(descriptor, bytes(content[: len(content) // 2]), place)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    cache = setting.open()
    os.pwrite = write_half
    read(setting.dataset(cache))


@pytest.mark.parametrize("check_sums", [True, False])
@pytest.mark.parametrize("num_writes", [1, 2, 3, 5])
def test_a_kill_amid_writing_leaves_no_wrong_image(
    tmp_path: Path, num_writes: int, check_sums: bool, monkeypatch: pytest.MonkeyPatch
):
    """For the order of writing to show, also where nothing looks at the sums."""
    setting = Setting(tmp_path)
    if not check_sums:
        monkeypatch.setattr(image_cache, "_compute_check", lambda *_: 1)
    process = multiprocessing.get_context("fork").Process(
        target=write_and_die, args=(setting, num_writes)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert setting.path.exists()
    assert_equal(read(setting.dataset(setting.open())), setting.expected())


def test_a_damaged_image_is_decoded_anew(setting: Setting, decoded: list[str]):
    read(setting.dataset(setting.open()))
    content = bytearray(setting.path.read_bytes())
    content[-1] ^= 1  # a pixel of the last image
    content[len(content) // 2] ^= 128
    setting.path.write_bytes(content)
    assert_equal(read(setting.dataset(setting.open())), setting.expected())
    assert len(decoded) == NUM_IMAGES + 2
    read(setting.dataset(setting.open()))
    assert len(decoded) == NUM_IMAGES + 2


@pytest.mark.parametrize("damage", ["truncated", "head", "empty", "version", "decoder"])
def test_a_damaged_or_old_file_is_made_again(
    setting: Setting, decoded: list[str], damage: str, monkeypatch: pytest.MonkeyPatch
):
    read(setting.dataset(setting.open()))
    content = bytearray(setting.path.read_bytes())
    content[0] ^= damage == "head"
    kept = {"truncated": len(content) - 1, "empty": 0}.get(damage, len(content))
    setting.path.write_bytes(content[:kept])
    if damage == "version":
        monkeypatch.setattr(image_cache, "VERSION", image_cache.VERSION + 1)
    if damage == "decoder":
        monkeypatch.setattr(image_cache.PIL, "__version__", "another")
    dataset = setting.dataset(setting.open())
    assert_equal(read(dataset), setting.expected())
    assert len(decoded) == 2 * NUM_IMAGES
    assert list(setting.path.parent.iterdir()) == [setting.path]


def test_other_images_make_another_file(setting: Setting, decoded: list[str]):
    """The open one still serves who has it."""
    old = setting.dataset(setting.open())
    read(old)
    text = (setting.index.images_dir / "instances.json").read_text()
    (setting.index.images_dir / "instances.json").write_text(text.replace("0.jpg", "./0.jpg"))
    setting.index = CocoIndex.load(
        images=setting.index.images_dir, annotations=setting.index.annotations_file
    )
    read(setting.dataset(setting.open())), read(old)
    assert len(decoded) == 2 * NUM_IMAGES


def test_files_are_told_apart_by_their_names(tmp_path: Path, cache_home: Path):
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir(), second.mkdir()
    indexes = [Setting(folder).index for folder in (first, second)]
    paths = {
        disk_path(index, shorter_side=side, folder=None) for index in indexes for side in (None, 9)
    }
    assert len(paths) == 4
    assert {path.parent for path in paths} == {cache_home / "condconv-detection" / "images"}
    assert disk_path(indexes[0], shorter_side=9, folder=tmp_path).parent == tmp_path


def test_the_room_it_takes_is_said_first(
    setting: Setting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    with caplog.at_level(logging.INFO, LOGGER):
        cache = setting.open()
    total = setting.path.stat().st_size
    assert total > NUM_IMAGES * setting.size
    assert f"6 images, {total / 1e6:.1f} MB in {setting.path}, of which 0.0 MB" in caplog.text
    assert setting.path.stat().st_blocks * 512 < total
    read(setting.dataset(cache))
    free = total
    usage = image_cache.shutil.disk_usage
    monkeypatch.setattr(
        image_cache.shutil, "disk_usage", lambda path: usage(path)._replace(free=free)
    )
    with setting.path.open("rb") as file:
        os.fsync(file)  # some file systems count blocks only when they write them
    filled = setting.path.stat().st_blocks * 512
    assert filled > 0
    free = max(0, total - filled)
    setting.open()  # what is there already needs no room
    setting.path.unlink()
    free = total - 1
    line = (
        f"trainer.image_cache=disk: 6 images take {total / 1e6:.1f} MB, and {setting.path.parent}"
    )
    with pytest.raises(UserError, match=line):
        setting.open()
    assert not setting.path.exists()
    free = total
    setting.open()


def test_memory_must_have_room_too(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    setting.path.parent.mkdir()
    monkeypatch.setattr(image_cache, "_available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"trainer.image_cache=ram: 6 images take .* 0.0 MB free"):
        setting.open(in_memory=True)
    assert not setting.path.exists()
    monkeypatch.undo()
    setting.open(in_memory=True)


def test_there_is_memory():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(lines["MemTotal"].split()[0]) * 1024
    assert total / 1000 < image_cache._available_memory() < total


def test_where_no_file_can_be_made(setting: Setting):
    setting.path.parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cache\.pixels cannot be written"):
        setting.open()
    with pytest.raises(UserError, match=r"no .*nowhere: set trainer\.image_cache=disk"):
        open_cache(Path("/nowhere/x"), setting.index, shorter_side=None, in_memory=True)


def test_a_disk_that_fills_up_costs_time_only(
    setting: Setting,
    decoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    write, count = os.pwrite, 0

    def write_some(descriptor: int, content: Any, place: int) -> int:
        nonlocal count
        count += 1
        if count == 8:  # the pixels of the third
            return write(descriptor, content[:100], place)
        if count > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content, place)

    monkeypatch.setattr(os, "pwrite", write_some)
    expected = setting.expected(epochs=2)
    assert_equal(read(setting.dataset(setting.open()), epochs=2), expected)
    assert decoded == [setting.index.file_names[i] for i in (*range(6), 2, 3, 4, 5)]
    assert caplog.text.count("the image cache takes no more images") == 1
    assert "No space left on device" in caplog.text


def test_a_system_may_write_in_parts(
    setting: Setting, decoded: list[str], monkeypatch: pytest.MonkeyPatch
):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, place: write(file, content[:99], place))
    read(setting.dataset(setting.open()))
    assert_equal(read(setting.dataset(setting.open())), setting.expected())
    assert len(decoded) == NUM_IMAGES


def test_a_closed_cache_in_memory_is_freed(setting: Setting):
    cache = setting.open()
    setting.path.unlink()
    read(setting.dataset(cache))
    descriptor = cache._file.fileno()
    assert os.fstat(descriptor).st_nlink == 0
    cache.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
