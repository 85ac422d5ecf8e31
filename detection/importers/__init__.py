"""Weights of other projects: TensorFlow's SSD, torchvision's RetinaNets, and backbones."""
