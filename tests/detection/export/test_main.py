from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from detection.errors import UserError
from detection.export.__main__ import export


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        ([], "checkpoint is not set: give checkpoint=FILE"),
        (["checkpoint=none.pt"], "none.pt: no such checkpoint file"),
        (["checkpoint=a.pt", "format=tflite"], "format=tflite: give one of onnx, torch_export"),
        (["checkpoint=a.pt", "outputs=boxes"], "outputs=boxes: give one of detections, raw"),
        (["checkpoint=a.pt", "images=int8"], "images=int8: give one of uint8, float32"),
        (["checkpoint=a.pt", "weights=best"], "weights=best: give one of ema, model"),
        (["checkpoint=a.pt", "output=a.pt"], "output=a.pt: a file of format=onnx ends in .onnx"),
        (
            ["checkpoint=a.pt", "output=a.onnx", "format=torch_export"],
            "a file of format=torch_export ends in .pt2",
        ),
        (["checkpoint=a.pt", "output=none/a.onnx"], "there is no folder none"),
    ],
)
def test_mistakes(compose_config: Callable[..., Any], overrides: list[str], answer: str) -> None:
    with pytest.raises(UserError, match=answer) as info:
        export(compose_config("export", overrides))
    assert "\n" not in str(info.value)
