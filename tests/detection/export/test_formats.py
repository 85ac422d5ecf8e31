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

from condconv import capture_routing, specialize
from detection.boxes import decode_boxes
from detection.build import ModelParts
from detection.checkpoint import load_checkpoint, load_model
from detection.errors import UserError
from detection.export.formats import ExportedDetector, export_onnx, export_openvino, export_torch
from detection.postprocess import Postprocess
from detection.preprocess import Preprocess
from detection.structures import RawPredictions

Export = Callable[..., Path]
Run = Callable[[Tensor], list[Tensor]]
Photographs = Callable[..., list[Image.Image]]


def load(file: Path) -> ModelParts:
    """The parts of the checkpoint beside the file."""
    return load_model(load_checkpoint(file.with_name(f"{file.name.split('.')[0]}.pt")))


def start(file: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options)
    return lambda images: [
        torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})
    ]


def start_openvino(file: Path) -> Run:
    openvino = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    run = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: [torch.from_numpy(output) for output in run([images.numpy()]).values()]


def start_torch(file: Path) -> Run:
    program = torch.export.load(file).module()
    return lambda images: list(program(images))


# How a file of each format is written, and how it is run.
FORMATS: dict[str, tuple[Callable[..., None], str, Callable[[Path], Run]]] = {
    "onnx": (export_onnx, ".onnx", start),
    "openvino": (export_openvino, ".xml", start_openvino),
    "torch_export": (export_torch, ".pt2", start_torch),
}


def start_format(format: str, detector: ExportedDetector, shipped: Path, folder: Path) -> Run:
    """Runs a detector in a format; the file of `shipped`, where that has it."""
    write, suffix, start = FORMATS[format]
    file = shipped
    if shipped.suffix != suffix:
        file = folder / f"shipped{suffix}"
        write(detector, {}, file)
    return start(file)


def stack(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def assert_same_boxes(actual: Tensor, expected: Tensor, size: int) -> None:
    """Equal to a hundred-thousandth of the image's side, and far outside, of the coordinate."""
    torch.testing.assert_close(actual / size, expected / size, rtol=1e-5, atol=1e-5)


def assert_same_scores(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


class OpenDetector(ExportedDetector):
    """Gives, after the detections, the predictions of the same run that they are made of."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        predictions = self.network(self.preprocess(images))
        found = self.postprocess(predictions, self.preprocess.input_size)
        return *found, predictions.deltas, predictions.logits


@torch.no_grad()
def assert_computes_the_same(
    open_detector: OpenDetector, run_open: Run, run: Run, images: Tensor
) -> None:
    """See that a runtime computes what PyTorch does.

    Detections of one and the same predictions are equal place by place. Those of predictions that
    differ in the last digits need not be: a box that overlaps by a hair more goes.

    Args:
        run_open: an export of the `OpenDetector`.
        run: the file as it is shipped.
    """
    size = open_detector.preprocess.input_size
    *found, deltas, logits = run_open(images)
    own = open_detector.network(open_detector.preprocess(images))
    assert_same_boxes(*(decode_boxes(d, own.anchors, own.code_weights)
                        for d in (deltas, own.deltas)), size)  # fmt: skip
    assert_same_scores(logits.sigmoid(), own.logits.sigmoid())

    boxes, scores, labels, valid = found
    expected = open_detector.postprocess(own._replace(deltas=deltas, logits=logits), size)
    assert torch.equal(valid, expected.valid) and torch.equal(labels, expected.labels)
    assert_same_scores(scores, expected.scores, 1e-6)
    assert_same_boxes(boxes, expected.boxes, size)

    _, scores, _, valid = run(images)
    expected = open_detector.postprocess(own, size)
    assert torch.equal(valid, expected.valid)
    assert_same_scores(scores, expected.scores)
    assert (scores.diff() <= 0).all()


@pytest.mark.parametrize(
    ("format", "model"),
    [
        ("onnx", "ssd"),
        *(
            pytest.param(format, model, marks=pytest.mark.slow)
            for format, model in [
                ("onnx", "odd_ssd"),
                ("openvino", "ssd"),
                ("torch_export", "ssd"),
                ("onnx", "fpnlite"),
                ("onnx", "ssdlite"),
                ("onnx", "efficientnet"),
                ("onnx", "retinanet"),
                ("openvino", "fpnlite"),
                ("torch_export", "fpnlite"),
            ]
        ),
    ],
)
def test_detections(
    format: str, model: str, export_model: Export, photographs: Photographs, tmp_path: Path
) -> None:
    write, suffix, start = FORMATS[format]
    shipped = export_model(model)
    detector, shipped_detector = (
        own(load(shipped), images="uint8", outputs="detections")
        for own in (OpenDetector, ExportedDetector)
    )
    write(detector, {}, tmp_path / f"open{suffix}")
    run_open = start(tmp_path / f"open{suffix}")
    run = start_format(format, shipped_detector, shipped, tmp_path)
    size = detector.preprocess.input_size
    for batch in (1, 3, 8):
        images = stack(photographs(batch, (size, size)))
        assert_computes_the_same(detector, run_open, run, images)
        with torch.no_grad():
            valid = detector(images)[3]
        assert valid.any() and valid.all() == (model != "odd_ssd")


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
    run = start(tmp_path / "pixels.onnx")
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = detector(images)
        assert expected[3].all() == (postprocess.max_detections == 50)
        for own, other in zip(run(images), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "model"),
    [
        pytest.param("onnx", "static_ssd", marks=pytest.mark.slow),
        ("openvino", "static_ssd"),
        ("torch_export", "static_ssd"),
        pytest.param("onnx", "ssd", marks=pytest.mark.slow),
        pytest.param("onnx", "static_fpnlite", marks=pytest.mark.slow),
        ("onnx", "fpnlite"),
    ],
)
def test_raw_outputs_of_normalised_images(
    format: str, model: str, export_model: Export, photographs: Photographs, tmp_path: Path
) -> None:
    shipped = export_model(model, "outputs=raw", "images=float32")
    detector = ExportedDetector(load(shipped), images="float32", outputs="raw")
    run = start_format(format, detector, shipped, tmp_path)
    for batch in (1, 3, 8):
        images = detector.preprocess(stack(photographs(batch)))
        with torch.no_grad():
            expected = detector(images)
        boxes, scores = run(images)
        assert_same_boxes(boxes, expected[0], 64)
        assert_same_scores(scores, expected[1])
        assert scores.std() > 0.02


@pytest.mark.slow
def test_a_specialised_pyramid_is_the_static_one(
    export_model: Export, photographs: Photographs
) -> None:
    """Towers are routed anew on each level: each layer is left with its mean over all of them."""
    parts, static = load(export_model("fpnlite")), load(export_model("static_fpnlite"))
    images = parts.preprocess(stack(photographs(2)))
    router = parts.network.head.class_tower[0].router
    with torch.no_grad(), capture_routing(parts.network) as routing:
        parts.network.eval()(images)
    levels = routing["head.class_tower.0.router"]
    assert router and len(levels) == 5 * len(images)
    experts = parts.network.head.class_tower[0].convs[-1].weight
    specialize(parts.network, [images])
    kernel = parts.network.head.class_tower[0].convs[-1].weight
    torch.testing.assert_close(kernel, torch.einsum("e,eoihw->oihw", levels.mean(0), experts))
    static.network.load_state_dict(parts.network.state_dict())
    with torch.no_grad():
        own, other = (one.network.eval()(images) for one in (parts, static))
    assert torch.equal(own.deltas, other.deltas) and torch.equal(own.logits, other.logits)


def test_one_expert_gives_a_static_graph(export_model: Export) -> None:
    graph = onnx.load(export_model("static_ssd", "outputs=raw", "images=float32")).graph
    operators = {node.op_type for node in graph.node}
    assert "Conv" in operators
    assert not operators & {"BatchNormalization", "Gemm", "MatMul", "Einsum"}


def test_the_file_says_how_to_use_it(export_model: Export) -> None:
    model = onnx.load(export_model("ssd"))
    (images,) = model.graph.input
    shape = images.type.tensor_type.shape.dim
    assert images.name == "images" and images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert shape[0].dim_param == "batch" and [d.dim_value for d in shape[1:]] == [3, 64, 64]
    assert [value.name for value in model.graph.output] == ["boxes", "scores", "labels", "valid"]
    assert "NonMaxSuppression" in {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} == {""}
    pyramid = onnx.load(export_model("fpnlite", "outputs=raw", "images=float32"))
    for file, images, outputs, resize in (
        (model, "uint8", "detections", "stretch"),
        (pyramid, "float32", "raw", "letterbox-centered"),
    ):
        metadata = {entry.key: entry.value for entry in file.metadata_props}
        assert json.loads(metadata.pop("names"))[0] == "circle"
        assert metadata == {
            "input_size": "64",
            "resize": resize,
            "fill": "[128, 128, 128]",
            "mean": "[127.5, 127.5, 127.5]",
            "std": "[127.5, 127.5, 127.5]",
            "images": images,
            "outputs": outputs,
        }


def test_without_onnx(
    export_model: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    detector = ExportedDetector(load(export_model("ssd")), images="uint8", outputs="detections")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnxscript: pip install -e '\.\[export\]'"):
        export_onnx(detector, {}, tmp_path / "ssd.onnx")
