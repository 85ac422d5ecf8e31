"""Pictures of detections: drawing, galleries, and reading and writing of pictures and videos."""

from __future__ import annotations

from detection.visualization.colors import class_colors
from detection.visualization.drawing import draw_boxes, draw_detections
from detection.visualization.gallery import contact_sheet, side_by_side
from detection.visualization.media import (
    Frame,
    Source,
    VideoWriter,
    read_source,
    write_picture,
)

__all__ = [
    "Frame",
    "Source",
    "VideoWriter",
    "class_colors",
    "contact_sheet",
    "draw_boxes",
    "draw_detections",
    "read_source",
    "side_by_side",
    "write_picture",
]
