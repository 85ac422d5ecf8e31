from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.checkpoint import DamagedCheckpoint, load_checkpoint, save_checkpoint
from detection.errors import UserError
from detection.importers.backbone import read_state
from detection.structures import Category

CATEGORIES = [Category(3, "a"), Category(7, "b")]


def save(path: Path, value: float, **options: Any) -> None:
    model = {"weight": torch.full((3,), value)}
    save_checkpoint(
        path, model=model, config={"model": {}}, categories=CATEGORIES, step=5, **options
    )


def read_weight(path: Path) -> list[float]:
    return load_checkpoint(path)["model"]["weight"].tolist()


def test_what_is_saved_is_loaded(tmp_path: Path):
    save(tmp_path / "a.pt", 1.0)
    content = load_checkpoint(tmp_path / "a.pt")
    assert content["categories"] == [[3, "a"], [7, "b"]] and content["step"] == 5
    assert torch.load(tmp_path / "a.pt", weights_only=True)["model"]["weight"].tolist() == [1] * 3


def test_the_old_file_is_kept_where_asked(tmp_path: Path):
    for value in (1.0, 2.0):
        save(tmp_path / "a.pt", value, keep_old_as=tmp_path / "old.pt")
    assert read_weight(tmp_path / "a.pt") == [2] * 3
    assert read_weight(tmp_path / "old.pt") == [1] * 3


def limit_file_size(patch: pytest.MonkeyPatch) -> None:
    """The kernel refuses to write, in the middle of torch.save."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def refuse_flush(patch: pytest.MonkeyPatch) -> None:
    def fsync(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fsync)


def refuse_name(patch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    patch.setattr(Path, "replace", refuse)


@pytest.mark.parametrize("keeps_old", [False, True])
@pytest.mark.parametrize("fault", [limit_file_size, refuse_flush, refuse_name])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    keeps_old: bool,
):
    save(tmp_path / "a.pt", 1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fault(monkeypatch)
    try:
        with pytest.raises(UserError, match=r"cannot write .*a\.pt: (No space|File too)") as caught:
            save(tmp_path / "a.pt", 2.0, keep_old_as=tmp_path / "old.pt" if keeps_old else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert read_weight(tmp_path / "a.pt") == [1] * 3


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
        with pytest.raises(DamagedCheckpoint, match=r"a\.pt is damaged") as caught:
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
    with pytest.raises(UserError, match="cannot read"):
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(UserError, match="cannot read"):
        read_state(tmp_path / "a.pt")
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "touched").exists()
