"""A lasting colour for each class."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from PIL import ImageColor

Color = tuple[int, int, int]

# The first row stays apart under the common colour blindnesses: M. Krzywinski, "Designing for Color
# Blindness", 12-color palette (mk.bcgsc.ca/colorblind). Each later colour is the one farthest from
# all before it in OKLab, among those neither too dark, too light nor too grey for a box.
_PALETTE = """
    9f0162 009f81 ff5aaf 00fccf 8400cd 008df9 00c2f9 ffb2fd a40122 e20134 ff6e3a ffc33b
    3c5a00 0000ff 2d4b87 00d200 b469ff b4ff00 a56900 876996 a5a500 ff00ff c396b4 b4e1ff
    c31eb4 96c3a5 008700 5a4bff 007896 e1f0b4 ffb4a5 784b2d b4d20f b400ff ff78ff 96a5ff
    692d87 c36978 6996b4 4b1ec3 5a784b d2a569 875ad2 0069d2 0fc387 005a5a 4ba52d 2df078
    e12d87 ff8796 d278d2 969669 a54b4b 963c96 3ce1f0 a5e196 694b69 ff4b69 7878ff f0f04b
    d27800 f01ec3 878700 5a5aa5 9687d2 3cb4b4 b45ab4 96c3f0 00ff00 ffd2f0 ff9600 d24b00
    78ffff 5a78c3 d296ff b4ff96 871eff d23cf0 d2b40f f096d2 c30f5a 87c35a d28778 00a5e1
    003cc3 d2b4e1 2de1a5 d2c396 004bf0 ff2d00 ffd296 693cb4 4b00ff 870096 872d4b a52dd2
"""
_ROWS = [
    [ImageColor.getrgb(f"#{code}")[:3] for code in row.split()]
    for row in _PALETTE.strip().splitlines()
]


def class_colors(names: Iterable[str]) -> dict[str, Color]:
    """The RGB colour of each class name.

    A set of names gets the same colours in whatever order it comes. Up to 12 names take the
    palette's first row, each its own colour in it unless another name has taken that one; no two of
    up to 96 names share a colour.
    """
    colors: dict[str, Color] = {}
    for i, name in enumerate(sorted(set(names))):
        row = _ROWS[i // 12 % len(_ROWS)]
        if i % 12 == 0:
            free = list(range(12))
        # crc32 and not hash(), which differs between runs.
        own = zlib.crc32(name.encode()) % 12
        place = min(free, key=lambda column: (column - own) % 12)
        free.remove(place)
        colors[name] = row[place]
    return colors


def text_color(background: Color) -> Color:
    """Black or white, whichever has the higher contrast on the background (WCAG 2.2 luminance)."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in background)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Contrast with white is 1.05 / (L + 0.05), with black (L + 0.05) / 0.05.
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)
