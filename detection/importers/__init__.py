"""Weights of other projects: TensorFlow's SSD MobileNetV1, MobileNetV1 of TF-slim and timm."""
