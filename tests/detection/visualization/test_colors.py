"""Colours last: they hang on the names, not on their order."""

from __future__ import annotations

import pytest

from detection.visualization.colors import class_colors, text_color

NAMES = [f"class {i}" for i in range(96)]


@pytest.mark.parametrize("num_names", [1, 12, 13, 80, 96])
def test_colors_differ_and_do_not_hang_on_the_order(num_names: int) -> None:
    names = NAMES[:num_names]
    colors = class_colors(names)
    assert list(colors) == sorted(names)
    assert len(set(colors.values())) == num_names
    assert class_colors(reversed(names)) == colors
    assert class_colors(names * 2) == colors


def test_colors_are_the_same_in_every_run() -> None:
    colors = class_colors(["person", "car"])
    assert colors == {"person": (255, 90, 175), "car": (226, 1, 52)}


def test_a_class_more_leaves_most_of_the_others_as_they_were() -> None:
    few, more = class_colors(NAMES[:4]), class_colors(NAMES[:5])
    assert sum(few[name] == more[name] for name in few) >= 3


def test_more_names_than_colors() -> None:
    colors = class_colors(str(i) for i in range(300))
    assert len(colors) == 300
    assert len(set(colors.values())) == 96


def test_no_names() -> None:
    assert class_colors([]) == {}


def test_text_is_legible_on_every_color() -> None:
    def luminance(color: tuple[int, int, int]) -> float:
        r, g, b = (
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
            for v in (c / 255 for c in color)
        )
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for color in class_colors(NAMES).values():
        light, dark = sorted((luminance(color), luminance(text_color(color))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert text_color((255, 255, 255)) == (0, 0, 0)
    assert text_color((0, 0, 0)) == (255, 255, 255)
