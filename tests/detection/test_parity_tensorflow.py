"""Our SSD MobileNetV1 against outputs of the TensorFlow Object Detection API's own.

The golden files lie in $CONDCONV_GOLDEN_DIR, or beside the checkout in shared/golden; every size
comes from their arrays. Shapes: B images, A anchors, G ground truths, S class slots.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from detection.boxes import encode_boxes, pairwise_iou
from detection.importers.tensorflow import load_tensorflow_ssd, read_variables
from detection.losses import FocalCriterion, gather_matches
from detection.matching import match_anchors
from detection.models.ssd import ssd_mobilenet_v1
from detection.postprocess import Postprocess
from detection.preprocess import Preprocess
from detection.structures import RawPredictions, Targets

GOLDEN_DIR = Path(
    os.environ.get("CONDCONV_GOLDEN_DIR") or Path(__file__).parents[3] / "shared" / "golden"
)
YXYX_TO_XYXY = [1, 0, 3, 2]  # also from the codes ty, tx, th, tw to ours


class Golden(NamedTuple):
    arrays: dict[str, Tensor]
    targets: Targets  # relative to the image
    predictions: RawPredictions  # ours, anchors in pixels
    size: int

    @property
    def anchors(self) -> Tensor:
        """TensorFlow's anchors, xyxy relative to the image."""
        return self.arrays["anchors"][:, YXYX_TO_XYXY]


def list_files() -> list:
    files = sorted(GOLDEN_DIR.glob("ssd_mobilenet_v1*.npz"))
    absent = pytest.mark.skip(reason=f"no golden outputs (ssd_mobilenet_v1*.npz) in {GOLDEN_DIR}")
    return [pytest.param(file, id=file.stem) for file in files] or [
        pytest.param(None, marks=absent)
    ]


@pytest.fixture(scope="module", params=list_files())
def golden(request: pytest.FixtureRequest) -> Golden:
    with np.load(request.param) as file:
        arrays = {
            name: torch.from_numpy(file[name]) for name in file.files if not name.startswith("var/")
        }
    size = arrays["image"].shape[1]
    arguments, state = load_tensorflow_ssd(read_variables(request.param), input_size=size)
    network = ssd_mobilenet_v1(**arguments)
    network.load_state_dict(state)
    images = Preprocess(input_size=size)(arrays["image"].permute(0, 3, 1, 2))
    with torch.no_grad():
        predictions = network.eval()(images)
    return Golden(arrays, pad_targets(arrays), predictions, size)


def pad_targets(arrays: dict[str, Tensor]) -> Targets:
    num_images = len(arrays["image"])
    num_boxes = [len(arrays[f"gt_labels0_{i}"]) for i in range(num_images)]
    boxes = torch.zeros(num_images, max(num_boxes), 4)
    labels = torch.zeros(num_images, max(num_boxes), dtype=torch.int64)
    valid = torch.zeros(num_images, max(num_boxes), dtype=torch.bool)
    for i, count in enumerate(num_boxes):
        boxes[i, :count] = arrays[f"gt_boxes_yxyx_{i}"][:, YXYX_TO_XYXY]
        labels[i, :count] = arrays[f"gt_labels0_{i}"]
        valid[i, :count] = True
    return Targets(boxes, labels, valid)


def test_anchors(golden: Golden) -> None:
    anchors = golden.predictions.anchors / golden.size
    torch.testing.assert_close(anchors, golden.anchors, rtol=0, atol=1e-6)


def test_box_codes(golden: Golden) -> None:
    expected = golden.arrays["box_encodings"][..., YXYX_TO_XYXY]
    torch.testing.assert_close(golden.predictions.deltas, expected, rtol=0, atol=1e-4)


def test_logits(golden: Golden) -> None:
    expected = golden.arrays["class_predictions_with_background"]
    torch.testing.assert_close(golden.predictions.logits, expected, rtol=0, atol=1e-4)


def test_targets(golden: Golden) -> None:
    """On TensorFlow's anchors: ours differ in the last bit, which decides between equal IoUs."""
    match = match_anchors(golden.anchors, golden.targets)
    assert match.equal(golden.arrays["match"].long())

    matches = gather_matches(match, golden.targets)
    slots = torch.zeros_like(golden.arrays["cls_targets"])
    slots[matches.images, matches.anchors, 1 + matches.labels] = 1
    assert slots.equal(golden.arrays["cls_targets"])
    assert golden.arrays["cls_weights"].eq(1).all(), "every anchor counts, as in our criterion"

    assert (match >= 0).equal(golden.arrays["reg_weights"].bool())
    codes = torch.zeros_like(golden.arrays["reg_targets"])
    codes[matches.images, matches.anchors] = encode_boxes(
        matches.boxes, golden.anchors[matches.anchors]
    )
    expected_codes = golden.arrays["reg_targets"][..., YXYX_TO_XYXY]
    torch.testing.assert_close(codes, expected_codes, rtol=1e-5, atol=1e-5)


def test_targets_in_pixels(golden: Golden) -> None:
    """As training matches: the same, except between IoUs that are equal but for rounding."""
    anchors = golden.predictions.anchors
    targets = golden.targets._replace(boxes=golden.targets.boxes * golden.size)
    match, expected = match_anchors(anchors, targets), golden.arrays["match"].long()
    iou = pairwise_iou(targets.boxes, anchors)
    for image, truth in targets.valid.nonzero().tolist():
        ours, theirs = (iou[image, truth, m[image] == truth] for m in (match, expected))
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.sort()[0], theirs.sort()[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["localization", "classification"])
def test_losses(golden: Golden, name: str) -> None:
    predictions = golden.predictions._replace(anchors=golden.anchors)
    losses = FocalCriterion()(predictions, golden.targets)
    loss = losses.sums[name] / losses.divisor.clamp(min=1)
    torch.testing.assert_close(loss, golden.arrays[f"loss/{name}_loss"], rtol=1e-4, atol=0)


def test_detections(golden: Golden) -> None:
    """Equal as sets; of those with the score of the last place, it is chance which get one."""
    detections = Postprocess()(golden.predictions, golden.size)
    arrays = golden.arrays
    for i, num_detections in enumerate(arrays["num_detections"].int().tolist()):
        assert detections.valid[i].sum() == num_detections
        boxes, scores, labels = (field[i, :num_detections] for field in detections[:3])
        expected_boxes = arrays["detection_boxes"][i, :num_detections][:, YXYX_TO_XYXY]
        expected_scores = arrays["detection_scores"][i, :num_detections]
        expected_labels = arrays["detection_classes"][i, :num_detections].long()
        same = labels[:, None] == expected_labels
        same &= (scores[:, None] - expected_scores).abs() <= 1e-4
        same &= ((boxes / golden.size)[:, None] - expected_boxes).abs().amax(-1) <= 1e-4
        certain = scores > scores[-1] + 1e-6
        expected_certain = expected_scores > expected_scores[-1] + 1e-6
        assert same[certain].any(dim=1).all()
        assert same[:, expected_certain].any(dim=0).all()
