"""Backbones with CondConv."""

from condconv.backbones.mobilenet_v1 import MobileNetV1

__all__ = ["MobileNetV1"]
