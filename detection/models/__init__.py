"""Detector networks: images in, raw predictions out."""
