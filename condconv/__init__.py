"""CondConv: conditionally parameterized convolutions (Yang et al., NeurIPS 2019).

Each example is convolved with its own kernel, a weighted sum of E expert kernels.
"""

from condconv.convert import accelerate_timm, convert_to_condconv, spread_over_experts
from condconv.cost import ModuleCost, cost_table, count_multiply_adds, count_parameters
from condconv.diagnostics import (
    RoutingSummary,
    capture_routing,
    compare_experts,
    find_routers,
    summarize_routing,
)
from condconv.functional import condconv2d
from condconv.layers import CondConv2d, Conv2dSame, RoutedCondConv2d, Router
from condconv.specialization import FixedConv2d, specialize

__all__ = [
    "CondConv2d",
    "Conv2dSame",
    "FixedConv2d",
    "ModuleCost",
    "RoutedCondConv2d",
    "Router",
    "RoutingSummary",
    "accelerate_timm",
    "capture_routing",
    "compare_experts",
    "condconv2d",
    "convert_to_condconv",
    "cost_table",
    "count_multiply_adds",
    "count_parameters",
    "find_routers",
    "specialize",
    "spread_over_experts",
    "summarize_routing",
]
