"""How a kernel lies on its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

Padding = int | tuple[int, int] | Literal["same", "valid"]


class Geometry(NamedTuple):
    """How a kernel is applied; the padding is of both sides. The order is that of `F.conv2d`."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """One number for both axes, or (vertical, horizontal)."""
    if isinstance(value, int):
        return value, value
    vertical, horizontal = value
    return vertical, horizontal


def check_padding(padding: Padding) -> None:
    """Raise a ValueError for an unknown word."""
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise ValueError(f'padding must be an int, a pair, "same" or "valid", got {padding!r}')


def same_padding(size: int, kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one axis: (before, after).

    The output has ceil(size / stride) positions; an odd total puts the extra element after
    (https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2).
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel_size - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def pad_input(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """Split a padding into what must be added to `x` now and what a convolution can add itself.

    Returns:
        (x, padding): convolving the returned x with the symmetric padding gives the asked result.
        x is copied only where "same" is not symmetric.
    """
    if not isinstance(padding, str):
        return x, pair(padding)
    if padding == "valid":
        return x, (0, 0)
    top, bottom = same_padding(x.shape[-2], kernel_size[0], stride[0], dilation[0])
    left, right = same_padding(x.shape[-1], kernel_size[1], stride[1], dilation[1])
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def output_size(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int]:
    """Height and width of the output of x (B, C, H, W) and weight (E, O, C / groups, kh, kw).

    Raises:
        ValueError: where the kernel is larger than the padded input.
    """
    stride, padding, dilation, _ = geometry
    _, _, rows, columns = x.shape
    _, _, _, kernel_rows, kernel_columns = weight.shape
    height = (rows + 2 * padding[0] - dilation[0] * (kernel_rows - 1) - 1) // stride[0] + 1
    width = (columns + 2 * padding[1] - dilation[1] * (kernel_columns - 1) - 1) // stride[1] + 1
    if height < 1 or width < 1:
        raise ValueError(
            f"the kernel {tuple(weight.shape[3:])} with dilation {dilation} does not fit into "
            f"the input {tuple(x.shape[2:])} with padding {padding}"
        )
    return height, width


def place(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
    groups: int,
) -> tuple[Tensor, Geometry]:
    """The input with what a convolution cannot pad itself, and how the kernels are applied to it.

    Raises:
        ValueError: where the kernel is larger than the padded input.
    """
    x, pads = pad_input(x, (weight.shape[3], weight.shape[4]), stride, padding, dilation)
    geometry = Geometry(stride, pads, dilation, groups)
    output_size(x, weight, geometry)
    return x, geometry
