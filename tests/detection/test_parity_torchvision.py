"""Our RetinaNet against torchvision's own, with the same weights on the same input.

Weights are random, scaled so that scores are like a trained network's: no weights are downloaded.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from detection.boxes import box_area
from detection.checkpoint import load_weights
from detection.importers.torchvision import load_torchvision_retinanet
from detection.losses import FocalCriterion
from detection.matching import match_anchors
from detection.models.backbones import TorchvisionResNet
from detection.models.retinanet import FeaturePyramid, RetinaNet, RetinaNetHead
from detection.postprocess import Postprocess
from detection.structures import RawPredictions, Targets

SIZE, NUM_CLASSES = 160, 5
VERSIONS = {
    "v1": (retinanet_resnet50_fpn, {"extra_from": "p5"}, {}),
    "v2": (retinanet_resnet50_fpn_v2, {"extra_from": "c5"}, {"norm": "group"}),
}


class Pair(NamedTuple):
    theirs: Any
    outputs: dict[str, Tensor]
    levels: list[Tensor]
    anchors: Tensor
    predictions: RawPredictions


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request: pytest.FixtureRequest) -> Pair:
    make, pyramid, head = VERSIONS[request.param]
    torch.manual_seed(0)
    theirs: Any = make(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    images = torch.randn(3, 3, SIZE, SIZE)
    spread_scores(theirs, images)
    ours = RetinaNet(
        backbone=TorchvisionResNet("resnet50"),
        pyramid=partial(FeaturePyramid, **pyramid),
        head=partial(RetinaNetHead, **head),
        num_classes=NUM_CLASSES,
        input_size=SIZE,
        torchvision_anchors=True,
    )
    load_weights(ours, load_torchvision_retinanet(theirs.state_dict()))
    with torch.no_grad():
        levels = list(theirs.backbone(images).values())
        outputs = theirs.head(levels)
        predictions = ours.eval()(images)
    anchors = theirs.anchor_generator(ImageList(images, [(SIZE, SIZE)] * 3), levels)[0]
    return Pair(theirs, outputs, levels, anchors, predictions)


@torch.no_grad()
def spread_scores(network: Any, images: Tensor) -> None:
    """Features that differ, a few high scores among many low ones, and boxes off their anchors."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    network.train()
    network.backbone(images)
    outputs = network.eval().head(list(network.backbone(images).values()))
    for layer, output, std in (
        (network.head.classification_head.cls_logits, outputs["cls_logits"], 1.5),
        (network.head.regression_head.bbox_reg, outputs["bbox_regression"], 0.3),
    ):
        layer.weight *= std / output.std()


def make_targets(anchors: Tensor) -> Targets:
    """Some boxes near anchors, some of few pixels, and ties; an image has none."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(3, 6, 2, generator=generator) * (SIZE - 60)
    boxes = torch.cat([corner, corner + 4 + torch.rand(3, 6, 2, generator=generator) * 56], -1)
    boxes[0, 0] = anchors[1000] + 1.0
    # Centred between anchors, which overlap it alike.
    boxes[0, 1] = torch.tensor([80.0, 80.0, 88.0, 88.0])
    boxes[0, 2] = torch.tensor([68.0, 68.0, 100.0, 100.0])
    valid = torch.arange(6) < torch.tensor([6, 0, 4])[:, None]
    labels = torch.randint(1, NUM_CLASSES, (3, 6), generator=generator)
    return Targets(boxes * valid[..., None], labels * valid, valid)


def unpad(targets: Targets) -> list[dict[str, Tensor]]:
    return [
        {"boxes": boxes[valid], "labels": labels[valid]}
        for boxes, labels, valid in zip(*targets, strict=True)
    ]


def test_anchors(pair: Pair) -> None:
    assert pair.predictions.anchors.equal(pair.anchors)


def test_raw_outputs(pair: Pair) -> None:
    logits, deltas = pair.outputs["cls_logits"], pair.outputs["bbox_regression"]
    assert logits.std() > 0.5 and deltas.std() > 0.1
    torch.testing.assert_close(pair.predictions.logits, logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(pair.predictions.deltas, deltas, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_candidates", [1000, 60])
def test_detections(pair: Pair, num_candidates: int) -> None:
    """All but boxes of no area, which torchvision lets stay: they lie outside of the image."""
    theirs = pair.theirs
    theirs.topk_candidates, theirs.detections_per_img = num_candidates, 5000
    per_cell = len(pair.anchors) // sum(x.shape[2] * x.shape[3] for x in pair.levels)
    sizes = [x.shape[2] * x.shape[3] * per_cell for x in pair.levels]
    expected = theirs.postprocess_detections(
        {name: list(output.split(sizes, dim=1)) for name, output in pair.outputs.items()},
        [list(pair.anchors.split(sizes))] * 3,
        [(SIZE, SIZE)] * 3,
    )
    detections = Postprocess(
        score_threshold=0.05,
        iou_threshold=0.5,
        num_candidates=num_candidates,
        max_detections=5000,
        per_level=True,
        clip_first=True,
    )(pair.predictions, SIZE)
    for image, found in enumerate(expected):
        inside = box_area(found["boxes"]) > 0
        found = {name: values[inside] for name, values in found.items()}
        valid = detections.valid[image]
        assert valid.sum() == len(found["scores"]) > 20
        ours, order = detections.scores[image, valid].sort(descending=True, stable=True)
        scores, their_order = found["scores"].sort(descending=True, stable=True)
        torch.testing.assert_close(ours, scores, rtol=0, atol=1e-4)
        assert detections.labels[image, valid][order].equal(found["labels"][their_order])
        boxes = detections.boxes[image, valid][order]
        torch.testing.assert_close(boxes, found["boxes"][their_order], rtol=0, atol=1e-3)


def test_matching(pair: Pair) -> None:
    targets = make_targets(pair.anchors)
    match = match_anchors(pair.anchors, targets, background_threshold=0.4, keep_ties=True)
    for image, own in enumerate(unpad(targets)):
        if len(own["boxes"]):
            expected = pair.theirs.proposal_matcher(box_iou(own["boxes"], pair.anchors))
        else:
            expected = torch.full_like(match[image], -1)
        assert match[image].equal(expected)
    first = match_anchors(pair.anchors, targets, background_threshold=0.4)
    assert (match >= 0).sum() > (first >= 0).sum(), "there are ties"
    assert (match == -2).any()


def test_losses(pair: Pair) -> None:
    targets = make_targets(pair.anchors)
    expected = pair.theirs.compute_loss(unpad(targets), pair.outputs, [pair.anchors] * 3)
    loss_type = pair.theirs.head.regression_head._loss_type
    box_loss: dict[str, Any] = {"l1": {"beta": 0.0, "localization_weight": 4.0}}.get(
        loss_type, {"box_loss": loss_type}
    )
    losses = FocalCriterion(
        background_threshold=0.4, keep_ties=True, alpha=0.25, per_image=True, **box_loss
    )(pair.predictions, targets)
    assert losses.divisor == 3
    for name, theirs in (("classification", "classification"), ("localization", "bbox_regression")):
        loss = losses.sums[name] / losses.divisor
        torch.testing.assert_close(loss, expected[theirs], rtol=1e-4, atol=0)
