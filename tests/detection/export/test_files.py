from __future__ import annotations

from pathlib import Path

import pytest

from detection.errors import UserError
from detection.export.files import written_whole


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("old")

    def write(error: BaseException | None = None) -> None:
        with written_whole(path) as new:
            new.write_text("new")
            assert path.read_text() == "old" and new.suffix == path.suffix
            if error:
                raise error

    with pytest.raises(UserError, match=r"cannot write .*a\.onnx: full"):
        write(OSError(28, "full"))
    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write()
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
