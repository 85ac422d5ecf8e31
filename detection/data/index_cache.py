"""Parsed annotations, kept in the user's cache folder and mapped into memory.

A cache file is a zip of tensors and plain values, as `torch.save` writes it. It serves one set of
source files; another size or time of modification of any of them makes it void.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import zipfile
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

# A new number makes everyone parse anew: raise it with each change to what is kept.
VERSION = 1
# File systems count time in ticks: within one, a file can change without showing it.
SETTLING_SECONDS = 2.0

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where the program keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "condconv-detection")


class IndexCache:
    """The cache file of one split.

    Args:
        folder: the folder of the images.
        sources: the files that the content is made from.
    """

    def __init__(self, folder: Path, sources: list[Path]) -> None:
        # Taken before the sources are read: a change while they are shows at the next opening.
        stats = [source.stat() for source in sources if os.path.exists(source)]
        self.state = [VERSION, *(n for stat in stats for n in (stat.st_size, stat.st_mtime_ns))]
        self.newest = max((stat.st_mtime for stat in stats), default=0.0)
        names = "\n".join(os.path.abspath(path) for path in (folder, *sources))
        digest = blake2b(names.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        self.path = cache_folder() / "annotations" / f"{sources[0].stem}-{digest}.pt"

    def read(self) -> dict[str, Any] | None:
        """The content, mapped and not copied; None where there is none, or not a sound one."""
        if not self.path.exists():
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:
                if damaged := archive.testzip():  # torch leaves the check sums unread
                    raise ValueError(f"{damaged} is damaged")
            state, content = torch.load(self.path, mmap=True, weights_only=True)
        except Exception as error:  # whatever a damaged file makes of its readers
            logger.info("parsing the annotations again: %s: %s", self.path, error)
            return None
        if state != self.state:
            logger.info("parsing the annotations again: %s is of another version", self.path)
            return None
        return content

    def write(self, content: dict[str, Any]) -> None:
        """Keeps the content, or says why not."""
        if time.time() - self.newest < SETTLING_SECONDS:
            return
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
                temporary = Path(file.name)
                torch.save((self.state, content), file)
            temporary.replace(self.path)
        except (OSError, RuntimeError) as error:  # torch's own of a full disk
            logger.info("the parsed annotations are not kept: %s: %s", self.path.parent, error)
            if temporary is not None:
                with suppress(OSError):
                    temporary.unlink()
