"""Exported files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detection.errors import UserError, first_line
from detection.files import whole_file


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """`whole_file` for libraries whose errors need a name.

    Raises:
        UserError: where the file cannot be written.
    """
    try:
        with whole_file(Path(path)) as partial:
            yield partial
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write {path}: {reason}") from error
