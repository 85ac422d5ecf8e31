"""Files that are there as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from detection.errors import UserError


def check_folder(path: str | Path) -> None:
    """See that a command can write to a folder, before the work whose results go there.

    Raises:
        UserError: where it cannot be made, or nothing can be written there.
    """
    folder = Path(path)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        if is_new:
            folder.rmdir()
    except OSError as error:
        raise UserError(f"output={path}: cannot write there: {error.strerror}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a place to write, of the same suffix, which becomes `path` at the end of the `with`.

    Folders that are missing are made. What was there before is untouched where writing fails. A
    device or a pipe is written to as it is.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(value: Any, path: str | Path, *, indent: int | None = None) -> None:
    """Write a value as JSON, in a `whole_file`.

    Raises:
        ValueError: for a number that is not finite, which JSON does not have.
    """
    path = Path(path)
    # Encoded before the file is opened, and in one piece: json.dump has no fast path.
    content = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as partial:
        # Of a file name that is not UTF-8, JSON's own escapes: no encoding has its bytes.
        partial.write_text(content, encoding="utf-8", errors="backslashreplace")
