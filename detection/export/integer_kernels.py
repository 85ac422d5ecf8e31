"""Numbers of CondConv layers in integers: experts' codes, and where a product's rows come from.

Shapes: N images seen, E experts, C input channels, O output channels, H, W a map, P positions.
"""

from __future__ import annotations

import numpy as np

from detection.export.conditional import Layer

PRODUCT_DEPTH = 64


def quantize_experts(
    weight: np.ndarray, routing_weights: np.ndarray, max_code: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Experts as integers; the codes of their mixtures reach `max_code` on either side of zero.

    Args:
        weight: (E, O, C, kh, kw).
        routing_weights: (N, E), of the images seen.

    Returns:
        Q in the shape of `weight`, s (O,), and t.
    """
    # Something to divide by for channels of zeros, too, less than any number of 32 bits.
    largest = np.maximum(np.abs(weight).max((0, 2, 3, 4)), 1e-60, dtype=np.float64)
    flat, mixed = weight.reshape(len(weight), -1), np.zeros_like(largest)
    for row in routing_weights:
        mixed = np.maximum(mixed, np.abs(row @ flat).reshape(len(mixed), -1).max(1))
    # Where experts cancel, kernels are small beside them. Up to one bit of the other channels'
    # experts is given, so that these kernels have more of the codes.
    share = mixed / largest
    scale = largest * np.maximum(1, 2 * share / (share.max() or 1)) / 127
    codes = np.rint(weight / scale[:, None, None, None]).astype(np.int8)
    return codes, scale, float((mixed / scale).max() / max_code) or 1.0


def stack_blocks(codes: np.ndarray) -> np.ndarray:
    """Experts (E, M) cut into n blocks of columns, one below the other: (n E, M / n).

    A processor with AMX takes `PRODUCT_DEPTH` rows of a matrix at a time, and reads as many where
    there are fewer: eight experts would take it eight times as long.
    """
    num_experts, size = codes.shape
    most = max(1, PRODUCT_DEPTH // num_experts)
    num_blocks = max(n for n in range(1, most + 1) if size % n == 0)
    blocks = codes.reshape(num_experts, num_blocks, -1).swapaxes(0, 1)
    return blocks.reshape(num_blocks * num_experts, -1)


def find_positions(layer: Layer) -> tuple[np.ndarray, tuple[int, int]]:
    """What each position of the output takes: rows (P kh kw,) of the map, and P as (H, W).

    Row H W of the map is what lies outside.
    """
    axes = [
        np.arange(0, length + before + after - reach, stride)[:, None]
        + np.arange(0, reach + 1, dilation)
        - before
        for length, size, before, after, stride, dilation in zip(
            layer.size, layer.kernel_shape[2:], layer.pads[:2], layer.pads[2:],
            layer.per_axis("strides"), layer.per_axis("dilations"), strict=True,
        )
        for reach in [dilation * (size - 1)]
    ]  # fmt: skip
    (height, width), (y, x) = layer.size, (axes[0][:, None, :, None], axes[1][:, None])
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    rows = np.where(inside, y * width + x, height * width)
    return rows.flatten(), (len(axes[0]), len(axes[1]))
