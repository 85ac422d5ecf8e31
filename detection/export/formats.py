"""One file from a checkpoint: ONNX, OpenVINO, or a program of `torch.export`.

Shapes: B images (open in the file), S input size, A anchors, K classes, D detections (padded).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detection.boxes import decode_boxes
from detection.build import ModelParts
from detection.errors import UserError
from detection.export.files import written_whole
from detection.export.operators import fold_norms, translate_condconv2d, translate_suppress
from detection.preprocess import Letterbox, Preprocess
from detection.structures import Category, Detections

Images = Literal["uint8", "float32"]
Outputs = Literal["detections", "raw"]
OUTPUT_NAMES = {"detections": Detections._fields, "raw": ("boxes", "scores")}


class ExportedDetector(nn.Module):
    """What an exported file computes.

    Args:
        parts: put into inference mode.
        images: "uint8" normalises inside, "float32" takes normalised images.
        outputs: "detections" decodes and suppresses; "raw" decodes all anchors.
    """

    def __init__(self, parts: ModelParts, *, images: Images, outputs: Outputs) -> None:
        super().__init__()
        self.network = parts.network
        self.preprocess = parts.preprocess
        self.postprocess = parts.postprocess
        self.images: Images = images
        self.outputs: Outputs = outputs
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images (B, 3, S, S) -> what `OUTPUT_NAMES` names, boxes xyxy in pixels of these images.

        "detections": the fields of `detection.structures.Detections`. "raw": boxes (B, A, 4), not
        clipped, and scores (B, A, K).
        """
        predictions = self.network(self.preprocess(images) if self.images == "uint8" else images)
        if self.outputs == "detections":
            return tuple(self.postprocess(predictions, self.preprocess.input_size))
        boxes = decode_boxes(predictions.deltas, predictions.anchors, predictions.code_weights)
        return boxes, predictions.logits[..., predictions.num_background :].sigmoid()

    def example(self) -> Tensor:
        """Images of the size and type that it takes."""
        side = self.preprocess.input_size
        return torch.zeros(2, 3, side, side, dtype=getattr(torch, self.images))


def export_program(detector: ExportedDetector) -> torch.export.ExportedProgram:
    """The detector as a graph that holds for every batch size, batch norm folded."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(detector, (detector.example(),), dynamic_shapes=({0: batch},))
    fold_norms(program)
    return program


def export_onnx(detector: ExportedDetector, metadata: dict[str, str], path: str | Path) -> None:
    """Write an ONNX file, its weights inside, `metadata` as its metadata properties.

    Raises:
        UserError: where onnx or onnxscript is not installed, or the file cannot be written.
    """
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"format=onnx needs {' and '.join(missing)}: pip install -e '.[export]'")
    program = export_program(detector)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=OUTPUT_NAMES[detector.outputs],
        dynamic_shapes=({0: "batch"},),
        custom_translation_table={
            torch.ops.condconv.exported.default: translate_condconv2d,
            torch.ops.detection.suppress.default: translate_suppress,
        },
    )
    assert exported is not None
    exported.model.metadata_props.update(metadata)
    with written_whole(path) as partial:
        exported.save(partial, external_data=False)


def export_torch(detector: ExportedDetector, metadata: dict[str, str], path: str | Path) -> None:
    """Write a file for `torch.export.load`, `metadata` in it as "metadata.json".

    With detections it holds an operator of this project: `import detection.postprocess` first.

    Raises:
        UserError: where the file cannot be written.
    """
    program = export_program(detector).run_decompositions()
    with written_whole(path) as partial:
        torch.export.save(program, partial, extra_files={"metadata.json": json.dumps(metadata)})


def export_openvino(detector: ExportedDetector, metadata: dict[str, str], path: str | Path) -> None:
    """Write OpenVINO's two files, .xml and .bin, by way of ONNX; `metadata` as its `rt_info`.

    Raises:
        UserError: where openvino is not installed, or a file cannot be written.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError("format=openvino needs openvino: pip install -e '.[openvino]'") from error
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(detector, metadata, Path(folder) / "model.onnx")
        model = openvino.convert_model(Path(folder) / "model.onnx")
        for key, value in metadata.items():
            model.set_rt_info(value, ["detector", key])
        # Weights stay in float32, which save_model would halve.
        openvino.save_model(model, Path(folder) / "model.xml", compress_to_fp16=False)
        for suffix in (".bin", ".xml"):  # the one that names the other comes last
            with written_whole(path.with_suffix(suffix)) as partial:
                shutil.copy((Path(folder) / "model").with_suffix(suffix), partial)


def describe(
    detector: ExportedDetector, categories: Sequence[Category], *, license: str | None = None
) -> dict[str, str]:
    """What one must know to use the file: the properties that go into its metadata.

    Lists are JSON; `mean` and `std` are on the scale 0 to 255, `fill` colours the padding.
    """
    preprocess = detector.preprocess
    properties: dict[str, Any] = {
        "names": json.dumps([category.name for category in categories]),
        "input_size": preprocess.input_size,
        "resize": _resize_method(preprocess),
        "fill": json.dumps([int(value) for value in preprocess.mean.flatten().round()]),
        "mean": json.dumps(preprocess.mean.flatten().tolist()),
        "std": json.dumps(preprocess.std.flatten().tolist()),
        "images": detector.images,
        "outputs": detector.outputs,
    }
    if license is not None:
        properties["license"] = license
    return {key: str(value) for key, value in properties.items()}


def _resize_method(preprocess: Preprocess) -> str:
    if not isinstance(preprocess, Letterbox):
        return "stretch"
    return "letterbox-centered" if preprocess.centered else "letterbox"
