from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.checkpoint import load_checkpoint, save_checkpoint
from detection.errors import UserError
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


def test_another_version_is_refused(tmp_path: Path):
    save(tmp_path / "a.pt", 1.0)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**content, "version": 99}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="version 99"):
        load_checkpoint(tmp_path / "a.pt")
