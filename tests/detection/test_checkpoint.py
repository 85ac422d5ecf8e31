from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.checkpoint import load_checkpoint, save_checkpoint
from detection.errors import UserError
from detection.importers.backbone import read_state
from detection.structures import Category

CATEGORIES = [Category(3, "a"), Category(7, "b")]


def save(path: Path, value: float) -> None:
    model = {"weight": torch.full((3,), value)}
    save_checkpoint(path, model=model, config={"model": {}}, categories=CATEGORIES, step=5)


def test_what_is_saved_is_loaded(tmp_path: Path):
    save(tmp_path / "a.pt", 1.0)
    content = load_checkpoint(tmp_path / "a.pt")
    assert content["categories"] == [[3, "a"], [7, "b"]] and content["step"] == 5
    assert torch.load(tmp_path / "a.pt", weights_only=True)["model"]["weight"].tolist() == [1] * 3


def test_a_full_disk_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "a.pt", 1.0)

    def fill_the_disk(content: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(UserError, match=r"cannot write .*a\.pt.*No space left"):
        save(tmp_path / "a.pt", 2.0)
    assert load_checkpoint(tmp_path / "a.pt")["model"]["weight"].tolist() == [1] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_damaged_file_is_refused(tmp_path: Path):
    """Cut short anywhere, or with a byte changed anywhere in the weights."""
    save(tmp_path / "a.pt", 1.0)
    content = (tmp_path / "a.pt").read_bytes()
    weights = content.index(torch.ones(3).numpy().tobytes())
    damaged = [content[:length] for length in range(0, len(content), 97)]
    damaged += [
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        for place in range(weights, weights + 12)
    ]
    for other in damaged:
        (tmp_path / "a.pt").write_bytes(other)
        with pytest.raises(UserError, match=r"a\.pt is damaged") as caught:
            load_checkpoint(tmp_path / "a.pt")
        assert "\n" not in str(caught.value)


def test_another_version_is_refused(tmp_path: Path):
    save(tmp_path / "a.pt", 1.0)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**content, "version": 99}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="version 99"):
        load_checkpoint(tmp_path / "a.pt")


class Payload:
    """What a pickle can hold: code that runs when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_runs_no_code(tmp_path: Path):
    content = {"weight": Payload(tmp_path / "touched")}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(UserError, match="cannot read"):
        read_state(tmp_path / "a.pt")
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "touched").exists()
