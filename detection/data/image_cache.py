"""Decoded images, kept in one file for all workers and processes of a node.

The file has a place for each image of a split and grows as images are decoded. Beside the pixels
stands a check sum of them and of the image file's size and time of modification, which is written
after them: what was cut short, is damaged, or belongs to an image that has changed fails it, and
the image is decoded anew. A process computes it when it first reads an image, and relies on it
from then on: a change of an image shows in the next run.

Shapes: H, W the size at which an image is read.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from itertools import accumulate
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import features
from torch import Tensor

from detection.data.coco import CocoIndex
from detection.data.index_cache import SETTLING_SECONDS, cache_folder
from detection.errors import UserError
from detection.images import shrink_size

# A new number makes all caches anew: raise it with each change to what is kept.
VERSION = 1
SHARED_MEMORY = Path("/dev/shm")
# The head of a file is a digest of what decides on its content.
_HEAD_SIZE = blake2b.MAX_DIGEST_SIZE
_CHECK = struct.Struct("<Q")
# So that no check is 0, which stands for an image that is not there.
_IS_SET = 1 << 32

logger = logging.getLogger(__name__)


class ImageCache:
    """The pixels of a split's images, by their place in the index.

    Args:
        file: opened by `open_cache`, without a buffer.
        sizes: (height, width) of each image as it is read.
    """

    def __init__(self, file: Any, sizes: list[tuple[int, int]]) -> None:
        self._file = file
        self._sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        starts = accumulate((3 * h * w for h, w in sizes), initial=_check_place(len(sizes)))
        self._starts = np.fromiter(starts, dtype=np.int64)
        self._forget()

    def _forget(self) -> None:
        self._trusted = np.zeros(len(self._sizes), dtype=np.int64)
        self._takes_more = True

    def load(self, i: int, path: Path, decode: Callable[[], Tensor]) -> Tensor:
        """Image `i`, (3, H, W) uint8: the one kept, else what `decode` gives, which is then kept.

        Args:
            path: the image file.
        """
        known = self._read_check(i)
        if known and known == self._trusted[i]:
            pixels = self._read_pixels(i)
            # Another process may have found that the file had changed, and begun to write.
            if pixels is not None and self._read_check(i) == known:
                return pixels
        try:
            stat = path.stat()
        except OSError:
            return decode()
        identity = zlib.crc32(f"{stat.st_size},{stat.st_mtime_ns}".encode())
        if known:
            pixels = self._read_pixels(i)
            if pixels is not None and known == _compute_check(identity, pixels):
                self._trusted[i] = known
                return pixels
        pixels = decode()
        if time.time() - stat.st_mtime >= SETTLING_SECONDS:
            self._keep(i, identity, pixels)
        return pixels

    def close(self) -> None:
        """Let go of the file; in memory, where its name is gone, that frees it."""
        self._file.close()

    def __getstate__(self) -> dict[str, Any]:
        # To a worker that is not forked goes the open file, whose name may be gone.
        descriptor = reduction.DupFd(self._file.fileno())
        return {"descriptor": descriptor, "sizes": self._sizes, "starts": self._starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._file = os.fdopen(state["descriptor"].detach(), "r+b", buffering=0)
        self._sizes, self._starts = state["sizes"], state["starts"]
        self._forget()

    def _keep(self, i: int, identity: int, pixels: Tensor) -> None:
        if not self._takes_more:
            return
        check = _compute_check(identity, pixels)
        try:
            self._write(_CHECK.pack(0), _check_place(i))
            self._write(_rows(pixels), int(self._starts[i]))
            self._write(_CHECK.pack(check), _check_place(i))
            self._trusted[i] = check
        except OSError as error:
            self._takes_more = False
            logger.warning(
                "the image cache takes no more images, others are decoded: %s", error.strerror
            )

    def _write(self, content: Any, place: int) -> None:
        view = memoryview(content).cast("B")
        while view:
            count = os.pwrite(self._file.fileno(), view, place)
            view, place = view[count:], place + count

    def _read_check(self, i: int) -> int:
        """0 where the image is not there."""
        with suppress(OSError, struct.error):
            return _CHECK.unpack(os.pread(self._file.fileno(), _CHECK.size, _check_place(i)))[0]
        return 0

    def _read_pixels(self, i: int) -> Tensor | None:
        rows = np.empty((*self._sizes[i], 3), dtype=np.uint8)
        with suppress(OSError):
            if os.preadv(self._file.fileno(), [rows.data], int(self._starts[i])) == rows.nbytes:
                return torch.from_numpy(rows).permute(2, 0, 1)
        return None


def open_cache(
    path: Path, index: CocoIndex, *, shorter_side: int | None, in_memory: bool = False
) -> ImageCache:
    """The cache of a split in a file, which is made where it is not there, or not for these images.

    How much room it takes at most is logged first.

    Args:
        shorter_side: as of the data set.
        in_memory: the file lies in memory.

    Raises:
        UserError: there is too little room, or the file cannot be made.
    """
    key = f"trainer.image_cache={'ram' if in_memory else 'disk'}"
    if not hasattr(os, "preadv"):
        raise UserError(f"{key}: this system has no preadv: set trainer.image_cache=null")
    if in_memory and not path.parent.is_dir():
        raise UserError(f"{key}: this system has no {path.parent}: set trainer.image_cache=disk")
    sizes = [shrink_size(size, shorter_side) for size in index.sizes]
    total = _check_place(len(sizes)) + sum(3 * h * w for h, w in sizes)
    digest = _digest(
        *(VERSION, PIL.__version__, features.version("jpg"), features.version("libjpeg_turbo")),
        *(torch.__version__, os.path.abspath(index.images_dir), shorter_side),
        *(index.file_names.content.numpy().tobytes(), index.sizes.rows.numpy().tobytes()),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _read_head(path) == (digest, total)
        filled = path.stat().st_blocks * 512 if kept else 0
        free = shutil.disk_usage(path.parent).free
        if in_memory:
            free = min(free, _available_memory())
        logger.info(
            "image cache: %d images, %s in %s, of which %s are there already; %s are free",
            *(len(sizes), _in_bytes(total), "memory" if in_memory else path),
            *(_in_bytes(filled), _in_bytes(free)),
        )
        if total - filled > free:
            raise UserError(
                f"{key}: {len(sizes)} images take {_in_bytes(total - filled)}, and {path.parent} "
                f"has {_in_bytes(free)} free: set a lower data.shrink, or trainer.image_cache=null"
            )
        if not kept:
            _make(path, digest, total)
        return ImageCache(path.open("r+b", buffering=0), sizes)
    except OSError as error:
        raise UserError(
            f"{key}: {path} cannot be written ({error.strerror}): "
            "set another trainer.image_cache_folder, or trainer.image_cache=null"
        ) from error


def disk_path(index: CocoIndex, *, shorter_side: int | None, folder: Path | None) -> Path:
    """Where the cache of a split lies on disk.

    Args:
        folder: None is the user's cache folder.
    """
    names = (os.path.abspath(path) for path in (index.images_dir, index.annotations_file))
    name = f"{index.annotations_file.stem}-{_digest(*names, shorter_side).hex()[:16]}.pixels"
    return (folder or cache_folder() / "images") / name


def _make(path: Path, digest: bytes, total: int) -> None:
    """An empty file takes the place of what is there; who has that open goes on with it."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            file.truncate(total)
            file.write(digest)
        temporary.replace(path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _read_head(path: Path) -> tuple[bytes, int] | None:
    """The digest and the size of a file."""
    if not path.exists():
        return None
    with path.open("rb", buffering=0) as file:
        return file.read(_HEAD_SIZE), path.stat().st_size


def _digest(*parts: object) -> bytes:
    digest = blake2b()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode(errors="surrogateescape")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()


def _check_place(i: int) -> int:
    return _HEAD_SIZE + _CHECK.size * i


def _rows(pixels: Tensor) -> memoryview:
    """(3, H, W) -> (H, W, 3), which is how Pillow decodes, in one block."""
    return pixels.permute(1, 2, 0).contiguous().numpy().data


def _compute_check(identity: int, pixels: Tensor) -> int:
    return zlib.crc32(_rows(pixels), identity) | _IS_SET


def _available_memory() -> int:
    """Bytes that a program can have without others being swapped out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _in_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
