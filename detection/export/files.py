"""Files that are there as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detection.errors import UserError


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a place to write, which becomes `path` at the end of the `with`.

    Raises:
        UserError: where the file cannot be written; one that was there is untouched then.
    """
    path = Path(path)
    partial = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)
