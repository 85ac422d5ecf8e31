"""CondConv: conditionally parameterized convolutions (Yang et al., NeurIPS 2019).

Each example is convolved with its own kernel, a weighted sum of E expert kernels.
"""

from condconv.cost import count_multiply_adds, count_parameters
from condconv.functional import condconv2d
from condconv.layers import CondConv2d, Conv2dSame, RoutedCondConv2d, Router

__all__ = [
    "CondConv2d",
    "Conv2dSame",
    "RoutedCondConv2d",
    "Router",
    "condconv2d",
    "count_multiply_adds",
    "count_parameters",
]
