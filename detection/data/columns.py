"""Flat arrays that read like lists.

Reading a Python object writes its reference count, so a list of a hundred thousand of them would be
copied, page by page, into every worker process. A tensor stays shared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Column(Collection[T]):
    """The rows of a tensor as Python values.

    Args:
        rows: (length, ...).
        convert: makes the value from what `Tensor.tolist` gives for a row.
    """

    def __init__(self, rows: Tensor, convert: Callable[[Any], T]) -> None:
        self.rows = rows
        self.convert = convert

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, value: object) -> bool:
        return any(value == own for own in self)

    def __getitem__(self, place: int) -> T:
        return self.convert(self.rows[place].tolist())

    def __iter__(self) -> Iterator[T]:
        return map(self.convert, self.rows.tolist())


class Texts(Collection[str]):
    """Texts without line breaks.

    Args:
        content: (bytes,) uint8: them all in UTF-8, each with a line break after it.
    """

    def __init__(self, content: Tensor) -> None:
        self.content = content
        breaks = (content == ord("\n")).nonzero()[:, 0]
        self.starts = torch.cat([breaks.new_zeros(1), breaks + 1])

    @classmethod
    def pack(cls, texts: Iterable[str]) -> Texts:
        """Also reads back what a text holds."""
        content = bytearray("".join(f"{text}\n" for text in texts).encode())
        return cls(torch.frombuffer(content, dtype=torch.uint8))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __contains__(self, value: object) -> bool:
        return any(value == own for own in self)

    def __getitem__(self, place: int) -> str:
        start, end = self.starts[place], self.starts[place + 1] - 1
        return self.content[start:end].numpy().tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return iter(self.content.numpy().tobytes().decode().split("\n")[:-1])
