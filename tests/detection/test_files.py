from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Thread

import pytest

from detection.files import write_json


def test_a_file_stays_as_it_was_where_writing_fails(tmp_path: Path):
    path = tmp_path / "new" / "a.json"
    write_json({"ä": [1, 2]}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"AP": float("nan")}, path)
    assert path.read_text(encoding="utf-8") == '{"ä": [1, 2]}\n'
    assert os.listdir(path.parent) == ["a.json"]


def test_a_file_name_that_is_not_utf_8(tmp_path: Path):
    value = {"ä": os.fsdecode(b"\xff.jpg")}
    write_json(value, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


def test_a_pipe_is_written_to(tmp_path: Path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    written: list[str] = []
    reader = Thread(target=lambda: written.append(path.read_text()), daemon=True)
    reader.start()
    write_json([1], path)
    reader.join(timeout=10)
    assert written == ["[1]\n"]
    assert path.is_fifo()
