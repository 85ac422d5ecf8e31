from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import detection.postprocess  # noqa: F401  # an operator of exported programs
from detection.errors import UserError
from detection.export import formats
from detection.export.__main__ import export
from eval_det import evaluate_checkpoint

Export = Callable[..., Path]


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        ([], "checkpoint is not set: give checkpoint=FILE"),
        (["checkpoint=none.pt"], "none.pt: no such checkpoint file"),
        (["checkpoint=a.pt", "format=tflite"], "format=tflite: give one of onnx, openvino"),
        (["checkpoint=a.pt", "outputs=boxes"], "outputs=boxes: give one of detections, raw"),
        (["checkpoint=a.pt", "images=int8"], "images=int8: give one of uint8, float32"),
        (["checkpoint=a.pt", "weights=best"], "weights=best: give one of ema, model"),
        (["checkpoint=a.pt", "output=a.pt"], "output=a.pt: a file of format=onnx ends in .onnx"),
        (
            ["checkpoint=a.pt", "output=a.onnx", "format=torch_export"],
            "a file of format=torch_export ends in .pt2",
        ),
        (["checkpoint=a.pt", "output=/dev/null/a.onnx"], "output=/dev/null: cannot write there"),
        (["checkpoint=a.pt", "quantize=true", "outputs=raw"], "is for format=onnx outputs=detect"),
        (["checkpoint=a.pt", "quantize=true", "num_samples=0"], "num_samples=0: give at least 1"),
    ],
)
def test_mistakes(compose_config: Callable[..., Any], overrides: list[str], answer: str) -> None:
    with pytest.raises(UserError, match=answer) as info:
        export(compose_config("export", overrides))
    assert "\n" not in str(info.value)


def read_metadata(path: Path) -> dict[str, str]:
    if path.suffix == ".pt2":
        extra = {"metadata.json": ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra["metadata.json"])
    if path.suffix == ".xml":
        openvino = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
        return dict(openvino.Core().read_model(path).get_rt_info("detector").value)
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize(
    ("format", "suffixes"),
    [
        ("onnx", [".onnx"]),
        pytest.param("openvino", [".bin", ".xml"], marks=pytest.mark.slow),
        pytest.param("torch_export", [".pt2"], marks=pytest.mark.slow),
    ],
)
def test_the_command(
    format: str,
    suffixes: list[str],
    save_model: Callable[[str], Path],
    compose_config: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path = tmp_path / f"a{suffixes[-1]}"
    arguments = [
        f"checkpoint={save_model('static_ssd')}", f"format={format}",
        f"output={path}", "outputs=raw", "images=float32", "license='CC BY 4.0'",
    ]  # fmt: skip
    if format == "onnx":  # as a user starts it
        command = [sys.executable, "-m", "detection.export", *arguments]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0 and f"wrote {path}: " in process.stdout, process.stderr
    else:
        assert export(compose_config("export", arguments)) == path
    assert sorted(file.suffix for file in tmp_path.iterdir()) == suffixes
    metadata = read_metadata(path)
    assert json.loads(metadata.pop("names"))[0] == "circle"
    assert metadata == {
        "input_size": "64",
        "resize": "stretch",
        "fill": "[128, 128, 128]",
        "mean": "[127.5, 127.5, 127.5]",
        "std": "[127.5, 127.5, 127.5]",
        "images": "float32",
        "outputs": "raw",
        "license": "CC BY 4.0",
    }


def test_a_failure_leaves_the_old_file(
    compose_config: Callable[..., Any],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("old")
    monkeypatch.setattr(formats, "export_onnx", lambda _, __, new: Path(new).write_text("new"))
    checkpoint = trained / "checkpoints" / "last.pt"
    with pytest.raises(UserError, match="cannot open it"):
        export(
            compose_config(
                "export", [f"checkpoint={checkpoint}", f"output={path}", "quantize=true"]
            )
        )
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_no_readable_image(
    compose_config: Callable[..., Any], trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_text("broken")
    (tmp_path / "a.json").write_text(
        json.dumps(
            {"images": [{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}],
             "categories": [{"id": 1, "name": "circle"}], "annotations": []}
        )
    )  # fmt: skip
    data = [
        f"data.{split}.{key}={tmp_path / name}"
        for split in ("train", "val")
        for key, name in (("images", ""), ("annotations", "a.json"))
    ]
    checkpoint = trained / "checkpoints" / "last.pt"
    arguments = [f"checkpoint={checkpoint}", "specialize=true", "data=custom", *data]
    with pytest.raises(UserError, match=r"a\.json: none of the images to calibrate with can be"):
        export(compose_config("export", arguments))


@pytest.mark.parametrize(
    "overrides",
    [
        ["quantize_experts=true"],
        pytest.param(["quantize_experts=false", "images=float32"], marks=pytest.mark.slow),
    ],
)
def test_quantised_with_what_it_costs(
    overrides: list[str],
    export_model: Export,
    detected_data: Callable[..., list[str]],
    compose_config: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The figures printed are those of eval_det.py."""
    checkpoint, path = export_model("ssd").with_suffix(".pt"), tmp_path / "int8.onnx"
    data = detected_data()
    arguments = [f"checkpoint={checkpoint}", f"output={path}", "quantize=true", *overrides]
    export(compose_config("export", [*arguments, "num_samples=4", *data]))
    printed = dict(re.findall(r"AP (\w+) +([\d.]+)", capsys.readouterr().out))
    files = {"checkpoint": checkpoint, "exported": export_model("ssd"), "quantized": path}
    assert printed.keys() == files.keys()
    for name, file in files.items():
        arguments = [f"checkpoint={file}", f"output={tmp_path}", "evaluation.num_workers=0"]
        found = evaluate_checkpoint(compose_config("eval", [*arguments, "device=cpu", *data]))
        assert float(printed[name]) == pytest.approx(found["AP"], abs=6e-5), name
    assert 0 < float(printed["quantized"]) != float(printed["checkpoint"]) > 0.3
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert ("QLinearMatMul" in operators) == ("quantize_experts=true" in overrides)


@pytest.mark.slow
def test_specialised_and_quantised_with_what_it_costs(
    compose_config: Callable[..., Any], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained / "small.onnx"
    export(
        compose_config(
            "export",
            [f"checkpoint={trained / 'checkpoints' / 'last.pt'}", f"output={path}",
             "specialize=true", "quantize=true", "num_samples=3"],
        )
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "routing over 3 images" in printed and "backbone.blocks.5.router" in printed
    assert "47 convolutions in INT8, calibrated on 3 images" in printed
    for name in ("checkpoint", "specialized", "exported", "quantized"):
        assert f"AP {name}" in printed
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["specialized"] == "true" and metadata["quantized"] == "int8"
    assert "Scan" not in {node.op_type for node in model.graph.node}
