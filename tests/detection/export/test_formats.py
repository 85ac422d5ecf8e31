from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou

from detection.build import ModelParts
from detection.checkpoint import load_checkpoint, load_model
from detection.errors import UserError
from detection.export.formats import ExportedDetector, export_onnx, export_openvino, export_torch
from detection.postprocess import Postprocess
from detection.preprocess import Preprocess
from detection.structures import Detections, RawPredictions

Export = Callable[..., Path]


def load(file: Path, images: str = "uint8", outputs: str = "detections") -> ExportedDetector:
    """What the file must compute, from the checkpoint beside it."""
    parts = load_model(load_checkpoint(file.with_name(f"{file.name.split('.')[0]}.pt")))
    return ExportedDetector(parts, images=images, outputs=outputs)  # pyright: ignore


def start(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options)


def photographs(real_data: Path, batch: int, size: int = 64) -> Tensor:
    files = sorted((real_data / "coco128" / "images").glob("*.jpg"))[:batch]
    pictures = [Image.open(file).convert("RGB").resize((size, size)) for file in files]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def assert_same_boxes(actual: Tensor, expected: Tensor, size: int = 64) -> None:
    """Equal to a hundred-thousandth of the image's side."""
    torch.testing.assert_close(actual / size, expected / size, rtol=0, atol=1e-5)


def assert_same_detections(
    actual: Detections, expected: Detections, iou_threshold: float = 0.6
) -> None:
    """Equal, but for what almost equal scores and overlaps on the edge of the threshold decide.

    They decide the order, what is cut off, and which of two boxes goes: what only one side has, a
    box of the other side suppresses.
    """
    assert torch.equal(actual.valid, expected.valid) and expected.valid.any(1).all()
    cut = torch.maximum(actual.scores.amin(1), expected.scores.amin(1)) + 1e-4
    for one, other in ((actual, expected), (expected, actual)):
        overlaps = torch.stack(list(map(box_iou, one.boxes, other.boxes)))
        gains = other.scores[:, None] - one.scores[:, :, None]
        rivals = one.labels[:, :, None] == other.labels[:, None]
        same = (one.boxes[:, :, None] - other.boxes[:, None]).abs().amax(-1) < 0.01
        same &= rivals & (gains.abs() < 1e-4)
        rivals &= (overlaps > iou_threshold - 1e-3) & (gains > -1e-4)
        certain = one.scores > cut[:, None]
        assert certain.float().mean() > 0.9
        missing = certain & ~same.any(2)
        assert missing.float().mean() < 0.01 and rivals.any(2)[missing].all()


@pytest.mark.parametrize(
    "model",
    [
        "ssd",
        "fpnlite",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("ssdlite", "efficientnet", "retinanet")
        ),
    ],
)
def test_onnx_detects_the_same(export_model: Export, real_data: Path, model: str) -> None:
    file = export_model(model)
    session = start(file)
    for batch in (1, 3, 8):
        images = photographs(real_data, batch)
        with torch.no_grad():
            expected = Detections(*load(file)(images))
        found = session.run(["boxes", "scores", "labels", "valid"], {"images": images.numpy()})
        assert_same_detections(Detections(*map(torch.from_numpy, found)), expected)


class Pixels(nn.Module):
    """Takes its predictions from the pixels: 384 anchors in heaps, 4 classes, 2 levels."""

    def __init__(self) -> None:
        super().__init__()
        corners = torch.rand(384, 2, generator=torch.Generator().manual_seed(0)) * 30 - 4
        self.register_buffer("anchors", torch.cat([corners, corners + 8], dim=1))

    def forward(self, images: Tensor) -> RawPredictions:
        deltas, logits = images.flatten(1).chunk(2, dim=1)
        shape = (images.shape[0], 384, 4)
        anchors = self.get_buffer("anchors")
        return RawPredictions(deltas.reshape(shape), logits.reshape(shape), anchors,
                              num_background=0, level_sizes=(256, 128))  # fmt: skip


@pytest.mark.parametrize(
    "postprocess",
    [
        Postprocess(num_candidates=200, max_detections=50, iou_threshold=0.3),
        # Fewer are found than there is place for; some lie outside of the image.
        Postprocess(num_candidates=60, score_threshold=0.9, per_level=True, clip_first=True),
    ],
)
def test_suppression_in_onnx(postprocess: Postprocess, tmp_path: Path) -> None:
    parts = ModelParts(Pixels(), Preprocess(input_size=32), nn.Identity(), postprocess)
    detector = ExportedDetector(parts, images="float32", outputs="detections")
    export_onnx(detector, {}, tmp_path / "pixels.onnx")
    session = start(tmp_path / "pixels.onnx")
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = detector(images)
        assert expected[3].all() == (postprocess.max_detections == 50)
        found = session.run(None, {"images": images.numpy()})
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(own), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["static_ssd", "ssd"])
def test_raw_outputs_of_normalised_images(
    export_model: Export, real_data: Path, model: str
) -> None:
    file = export_model(model, "outputs=raw", "images=float32")
    session = start(file)
    detector = load(file, "float32", "raw")
    for batch in (1, 3, 8):
        images = detector.preprocess(photographs(real_data, batch))
        with torch.no_grad():
            boxes, scores = detector(images)
        found = session.run(["boxes", "scores"], {"images": images.numpy()})
        assert_same_boxes(torch.from_numpy(found[0]), boxes)
        torch.testing.assert_close(torch.from_numpy(found[1]), scores, rtol=0, atol=1e-4)
    assert scores.std() > 0.1  # pyright: ignore


def test_one_expert_gives_a_static_graph(export_model: Export) -> None:
    graph = onnx.load(export_model("static_ssd", "outputs=raw", "images=float32")).graph
    operators = {node.op_type for node in graph.node}
    assert "Conv" in operators
    assert not operators & {"BatchNormalization", "Gemm", "MatMul", "Einsum"}


def test_the_file_says_how_to_use_it(export_model: Export) -> None:
    model = onnx.load(export_model("fpnlite"))
    (images,) = model.graph.input
    shape = images.type.tensor_type.shape.dim
    assert images.name == "images" and images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert shape[0].dim_param == "batch" and [d.dim_value for d in shape[1:]] == [3, 64, 64]
    assert [value.name for value in model.graph.output] == ["boxes", "scores", "labels", "valid"]
    assert "NonMaxSuppression" in {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} == {""}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata.pop("names"))[0] == "circle"
    assert metadata == {
        "input_size": "64",
        "resize": "letterbox-centered",
        "fill": "[128, 128, 128]",
        "mean": "[127.5, 127.5, 127.5]",
        "std": "[127.5, 127.5, 127.5]",
        "images": "uint8",
        "outputs": "detections",
    }


def test_a_program_of_torch_export(export_model: Export, real_data: Path, tmp_path: Path) -> None:
    detector = load(export_model("ssd"))
    export_torch(detector, {"input_size": "64"}, tmp_path / "ssd.pt2")
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "ssd.pt2", extra_files=extra).module()
    assert json.loads(extra["metadata.json"]) == {"input_size": "64"}
    for batch in (1, 3):
        images = photographs(real_data, batch)
        with torch.no_grad():
            expected = Detections(*detector(images))
            assert_same_detections(Detections(*program(images)), expected)


def test_openvino_computes_the_same(export_model: Export, real_data: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    detector = load(export_model("ssd"), "uint8", "raw")
    export_openvino(detector, {"input_size": "64"}, tmp_path / "ssd.xml")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ssd.bin", "ssd.xml"]
    core = openvino.Core()
    model = core.read_model(tmp_path / "ssd.xml")
    assert model.get_rt_info(["detector", "input_size"]).astype(str) == "64"
    run = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 3, 8):
        images = photographs(real_data, batch)
        with torch.no_grad():
            boxes, scores = detector(images)
        found = run([images.numpy()])
        assert_same_boxes(torch.from_numpy(found["boxes"]), boxes)
        torch.testing.assert_close(torch.from_numpy(found["scores"]), scores, rtol=0, atol=1e-4)


def test_without_onnx(
    export_model: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    detector = load(export_model("ssd"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnxscript: pip install '.*\[export\]'"):
        export_onnx(detector, {}, tmp_path / "ssd.onnx")
