from __future__ import annotations

import json
import logging
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detection.data import index_cache
from detection.data.coco import CocoIndex
from detection.data.coco_json import CocoReader
from detection.errors import UserError

LOGGER = "detection.data.index_cache"


def write(folder: Path, num_images: int = 3, seconds: int = 0) -> None:
    """Image i has i boxes, one of them over its edge; `seconds` is the time of modification."""
    content = {
        "images": [
            {"id": 5 + i, "file_name": f"{i}.png", "width": 40, "height": 30}
            for i in range(num_images)
        ],
        "annotations": [
            {
                "id": 10 * i + k,
                "image_id": 5 + i,
                "category_id": 1,
                "bbox": [12 * k, 3, 30, 4],
                "area": 7,
                "iscrowd": 0,
            }
            for i in range(num_images)
            for k in range(i)
        ],
        "categories": [{"id": 1, "name": "dög"}],
    }
    for i in range(num_images):
        Image.new("RGB", (40, 30)).save(folder / f"{i}.png")
    (folder / "instances.json").write_text(json.dumps(content, ensure_ascii=False))
    os.utime(folder / "instances.json", (seconds, seconds))


def load(folder: Path, **options: Any) -> CocoIndex:
    return CocoIndex.load(images=folder, annotations=folder / "instances.json", **options)


def describe(index: CocoIndex) -> Any:
    boxes = [(index.boxes(i).tolist(), index.labels(i).tolist()) for i in range(len(index))]
    lists = [list(index.image_ids), list(index.file_names), list(index.sizes)]
    return boxes, lists, index.ground_truth(), index.describe(), index.categories


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "condconv-detection" / "annotations"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by each file that is parsed."""
    files = []
    read = CocoReader.read

    def note(self: CocoReader) -> dict[str, Any]:
        files.append(self.annotations_file)
        return read(self)

    monkeypatch.setattr(CocoReader, "read", note)
    return files


def test_a_file_is_parsed_once(tmp_path: Path, parsed: list[Path]):
    write(tmp_path)
    first = describe(load(tmp_path))
    assert len(first[0][2][0]) == 2 and "over the edge" in first[3][0]
    assert describe(load(tmp_path)) == first
    assert len(parsed) == 1


def test_a_changed_file_is_parsed_again(tmp_path: Path, empty_cache: Path, parsed: list[Path]):
    write(tmp_path)
    old = load(tmp_path)
    before = describe(old)
    write(tmp_path, num_images=4, seconds=1)
    assert len(load(tmp_path)) == 4
    text = (tmp_path / "instances.json").read_text()
    (tmp_path / "instances.json").write_text(text.replace("dög", "cät"))
    os.utime(tmp_path / "instances.json", (2, 2))
    assert load(tmp_path).categories[0].name == "cät"
    assert len(parsed) == 3 and len(list(empty_cache.iterdir())) == 1
    assert describe(old) == before  # still mapped to the file that was replaced


def test_choices_of_images_are_kept_apart(tmp_path: Path, parsed: list[Path]):
    write(tmp_path)
    ids = tmp_path / "ids.txt"
    ids.write_text("6")
    os.utime(ids, (0, 0))
    assert [len(load(tmp_path)), len(load(tmp_path, ids=ids))] == [3, 1]
    ids.write_text("5 6")
    os.utime(ids, (0, 0))
    assert [len(load(tmp_path)), len(load(tmp_path, ids=ids))] == [3, 2]
    assert len(parsed) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "garbage", "empty", "old"])
def test_a_damaged_or_old_cache_is_made_again(
    tmp_path: Path,
    empty_cache: Path,
    parsed: list[Path],
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    write(tmp_path)
    with monkeypatch.context() as patch:
        if damage == "old":
            patch.setattr(index_cache, "VERSION", index_cache.VERSION - 1)
        first = describe(load(tmp_path))
    (file,) = empty_cache.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[content.index("dög".encode())] ^= 4
    broken = {"truncated": content[:-300], "garbage": b"garbage", "empty": b""}
    file.write_bytes(broken.get(damage, content))
    with caplog.at_level(logging.INFO, LOGGER):
        assert describe(load(tmp_path)) == first
    assert len(parsed) == 2 and str(file) in caplog.text
    assert describe(load(tmp_path)) == first and len(parsed) == 2


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, parsed: list[Path], empty_cache: Path, caplog: pytest.LogCaptureFixture
):
    write(tmp_path)
    empty_cache.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, LOGGER):
        assert len(load(tmp_path)) == len(load(tmp_path)) == 3
    assert len(parsed) == 2 and str(empty_cache) in caplog.text


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def save(content: Any, file: Any) -> None:
        file.write(b"the first part")
        raise RuntimeError("unexpected pos 64 vs 0")

    write(tmp_path)
    monkeypatch.setattr(index_cache.torch, "save", save)
    assert len(load(tmp_path)) == 3
    assert list(empty_cache.iterdir()) == []


def test_a_file_that_may_still_change_is_not_kept(tmp_path: Path, parsed: list[Path]):
    """Two versions of one size, written within a tick of the clock, look the same."""
    write(tmp_path)
    os.utime(tmp_path / "instances.json")
    load(tmp_path), load(tmp_path)
    assert len(parsed) == 2


def test_sizes_read_from_images_are_not_kept(tmp_path: Path):
    write(tmp_path)
    text = (tmp_path / "instances.json").read_text().replace('"width": 40, ', "")
    (tmp_path / "instances.json").write_text(text)
    os.utime(tmp_path / "instances.json", (0, 0))
    assert load(tmp_path).sizes[0] == (30, 40)
    Image.new("RGB", (20, 10)).save(tmp_path / "0.png")
    assert load(tmp_path).sizes[0] == (10, 20)


def test_missing_images_are_found_with_a_cache_as_well(tmp_path: Path, parsed: list[Path]):
    write(tmp_path)
    load(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 3 images .* \(first: '1.png'\)"):
        load(tmp_path)
    assert len(parsed) == 1


def test_an_index_is_sent_to_a_process_without_its_arrays(tmp_path: Path):
    write(tmp_path, num_images=60)
    load(tmp_path)
    for index in (load(tmp_path), load(tmp_path)):
        sent = ForkingPickler.dumps(index)
        assert len(sent) < 10_000
        assert describe(pickle.loads(sent)) == describe(index)
