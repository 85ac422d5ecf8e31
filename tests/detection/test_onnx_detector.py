from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from detection.detector import Detector
from detection.errors import UserError
from detection.onnx_detector import ArrayDetections, OnnxDetector
from detection.preprocess import Letterbox, Preprocess
from detection.structures import ImageDetections

Export = Callable[..., Path]

SIZES = [(100, 60), (64, 64), (50, 200), (333, 1)]
BOXES = np.float32([[10, 20, 30, 40], [0, 0, 64, 64], [1, 2, 3, 4]])


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


class Session:
    """Stands for ONNX Runtime's: keeps what it is given, and always finds `BOXES`."""

    def __init__(self, **properties: str) -> None:
        metadata = {
            "names": '["a", "b"]', "input_size": "64", "resize": "stretch", "outputs": "detections",
            "images": "uint8", "mean": "[100.0, 110.0, 120.0]", "std": "[50.0, 60.0, 70.0]",
            "fill": "[100, 110, 120]",
        }  # fmt: skip
        self.metadata = SimpleNamespace(custom_metadata_map={**metadata, **properties})

    def get_modelmeta(self) -> Any:
        return self.metadata

    def run(self, _: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.images = inputs["images"]
        fields = BOXES, np.float32([0.9, 0.5, 0.0]), np.array([1, 0, 0]), [True, True, False]
        return [np.stack([np.array(field)] * len(self.images)) for field in fields]


@pytest.mark.parametrize(
    ("resize", "preprocess"),
    [
        ("stretch", Preprocess(input_size=64)),
        ("letterbox", Letterbox(input_size=64, mean=[100, 110, 120])),
        ("letterbox-centered", Letterbox(input_size=64, mean=[100, 110, 120], centered=True)),
    ],
)
def test_it_resizes_and_restores_as_the_detector(resize: str, preprocess: Preprocess) -> None:
    session: Any = Session(resize=resize)
    pictures = [Image.fromarray(noise(*size)) for size in SIZES]
    found = OnnxDetector(session).predict(pictures)
    expected = torch.stack([preprocess.resize_image(F.pil_to_tensor(p)) for p in pictures])
    assert session.images.dtype == np.uint8
    assert np.abs(session.images.astype(int) - expected.numpy()).max() <= 1  # they round apart
    sizes = torch.tensor([[p.height, p.width] for p in pictures])
    boxes = preprocess.restore(torch.from_numpy(BOXES).expand(len(pictures), -1, -1), sizes)
    for own, other in zip(found, boxes, strict=True):
        kept = (other[:2, 2:] > other[:2, :2]).all(1)  # not what lies in the padding alone
        np.testing.assert_allclose(own.boxes, other[:2][kept].numpy(), rtol=1e-5, atol=1e-4)
        assert own.boxes.dtype == np.float32
        assert own.labels.tolist() == torch.tensor([1, 0])[kept].tolist()
        assert kept[1]
    assert sum(len(own.boxes) for own in found) == 8 - (resize == "letterbox")


def test_it_normalises_for_a_network_of_floats() -> None:
    session: Any = Session(images="float32")
    image = noise(64, 64)
    OnnxDetector(session).predict(image)
    expected = (image - np.float32([100, 110, 120])) / np.float32([50, 60, 70])
    assert session.images.dtype == np.float32
    np.testing.assert_allclose(session.images[0], expected.transpose(2, 0, 1), rtol=1e-5)


def test_every_kind_of_image(tmp_path: Path) -> None:
    detector = OnnxDetector(Session())  # pyright: ignore
    array = noise(80, 60)
    Image.fromarray(array).save(tmp_path / "a.png")
    kinds = [array, array[:, :, 0], Image.fromarray(array), tmp_path / "a.png"]
    assert len(detector.predict(kinds)) == 4
    assert len(detector.predict(str(tmp_path / "a.png"), score_threshold=0.6)[0].scores) == 1
    assert detector.predict([]) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        detector.predict(kinds, batch_size=0)
    with pytest.raises(UserError, match=r"cannot read none\.jpg"):
        detector.predict("none.jpg")


def test_it_is_called_as_the_detector() -> None:
    own, other = (inspect.signature(one.predict).parameters for one in (OnnxDetector, Detector))
    assert own == other
    assert ArrayDetections._fields == ImageDetections._fields


def test_it_predicts_what_the_file_computes(export_model: Export) -> None:
    file = export_model("ssd")
    detector = OnnxDetector.from_file(file)
    assert detector.names == Detector.from_checkpoint(file.with_suffix(".pt")).names
    images = [noise(64, 64, seed) for seed in range(5)]
    batch = np.stack(images).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(file)
    # Images of the network's size stay as they are, and so do their boxes.
    for batch_size in (1, 2, 8):
        parts = [batch[i : i + batch_size] for i in range(0, len(images), batch_size)]
        outputs = [session.run(None, {"images": part}) for part in parts]
        boxes, scores, labels, valid = map(np.concatenate, zip(*outputs, strict=True))
        found = detector.predict(iter(images), batch_size=batch_size)
        assert len(found) == len(images)
        for i, own in enumerate(found):
            np.testing.assert_array_equal(own.boxes, boxes[i][valid[i]])
            np.testing.assert_array_equal(own.scores, scores[i][valid[i]])
            np.testing.assert_array_equal(own.labels, labels[i][valid[i]])
            assert own.names[own.labels[0]] == detector.names[labels[i][0]]


def test_files_that_are_no_exported_detectors(export_model: Export, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.onnx: no such file"):
        OnnxDetector.from_file(tmp_path / "none.onnx")
    file = tmp_path / "a.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(UserError, match=r"a.onnx: ONNX Runtime cannot open it") as info:
        OnnxDetector.from_file(file)
    assert "\n" not in str(info.value)
    model = onnx.load(export_model("ssd"))
    del model.metadata_props[:]
    onnx.save(model, file)
    with pytest.raises(UserError, match=r"a.onnx.* not that of python -m detection.export"):
        OnnxDetector.from_file(file)
    with pytest.raises(UserError, match="export it with outputs=detections"):
        OnnxDetector(Session(outputs="raw"))  # pyright: ignore


def test_it_needs_onnxruntime_numpy_and_pillow(export_model: Export) -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from detection.onnx_detector import OnnxDetector; import numpy\n"
        "image = numpy.zeros((40, 50, 3), numpy.uint8)\n"
        "assert len(OnnxDetector.from_file(sys.argv[1]).predict(image)) == 1\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - sys.stdlib_module_names))"
    )
    file = str(export_model("ssd"))
    process = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    own_needs = {"coloredlogs", "flatbuffers", "google", "humanfriendly", "packaging"}
    imported = set(process.stdout.split())
    assert imported - own_needs == {"detection", "numpy", "onnxruntime", "PIL"}


def test_without_onnxruntime(export_model: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed: pip install"):
        OnnxDetector.from_file(export_model("ssd"))
