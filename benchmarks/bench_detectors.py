"""Our SSD and RetinaNet beside torchvision's: the same weights, inputs and targets on both sides.

    python benchmarks/bench_detectors.py [--threads 2] [--rounds 20] [--quick]

SSD is torchvision's `ssdlite320_mobilenet_v3_large`, RetinaNet has a ResNet-18 with a feature
pyramid; 91 classes, background among SSD's. What both sides compute is compared before it is timed:
raw outputs, detections, matches, and RetinaNet's losses. SSD's losses are different ones: a
cross-entropy with hard negatives there, a focal loss here. A loss is timed with its assignment and
its backward pass down to the predictions.

Weights are random, so the predictions that are decoded and learnt from are drawn, with scores and
boxes as a trained network has them: most scores low, some dozens high, on boxes in clusters. Both
sides take the same batch of normalised images, so that resizing is no part of this, and the same
optimizer. Ours is laid out as a run or a loaded checkpoint is: channels last, but for RetinaNet's
training step (`trainer.channels_last=false`), as a ResNet gains nothing by it.

The sides run in turn, round after round. Times are medians; the ratio is that of the medians, with
the quartiles of the rounds' ratios behind it; above 1 ours is faster. Exits with status 1 where a
ratio is below its target, unless `--quick`, which is there to see the script work.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import retinanet, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD as TorchvisionSSD
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detection.boxes import encode_boxes, pairwise_iou
from detection.checkpoint import load_weights
from detection.importers.torchvision import load_torchvision_retinanet
from detection.losses import FocalCriterion
from detection.matching import match_anchors
from detection.models.backbones import Backbone, TorchvisionResNet
from detection.models.retinanet import FeaturePyramid, RetinaNet, RetinaNetHead
from detection.models.ssd import SSD, make_predictor
from detection.postprocess import Postprocess
from detection.structures import Detections, RawPredictions, Targets

NUM_CLASSES = 91
SSD_SIZE = 320
NUM_OBJECTS = 8  # of an image; COCO has 7
Side = Callable[[], Any]


class Figure(NamedTuple):
    """Something that both sides do.

    Args:
        name: what, and of which detector.
        batch: images.
        target: the least ratio of the times, theirs to ours.
        theirs: does it as torchvision.
        ours: does it.
    """

    name: str
    batch: int
    target: float
    theirs: Side
    ours: Side


class Timing(NamedTuple):
    """Median milliseconds, and the quartiles of the rounds' ratios."""

    theirs: float
    ours: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


class TorchvisionFeatures(Backbone):
    """The backbone of a torchvision detector, that all levels come from."""

    def __init__(self, network: nn.Module, input_size: int) -> None:
        super().__init__()
        self.network = network
        with torch.no_grad():
            maps = copy.deepcopy(self).eval()(torch.zeros(1, 3, input_size, input_size))
        self.channels = [own.shape[1] for own in maps]
        self.strides = [input_size // own.shape[-1] for own in maps]
        self.normalization = {}

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.network(x).values())


class Scene(NamedTuple):
    """A batch, and what a trained network might say of it.

    Args:
        images: (B, 3, S, S), normalised.
        boxes: (B, G, 4), the objects.
        labels: (B, G), from 0 to below K.
        deltas: (B, A, 4).
        logits: (B, A, K), of the sigmoid of each class.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    deltas: Tensor
    logits: Tensor


def draw_scene(
    anchors: Tensor, *, batch: int, size: int, num_classes: int, generator: torch.Generator
) -> Scene:
    """Objects whose anchors have high scores and boxes near theirs, among many low scores."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def normal(std: float, *shape: int) -> Tensor:
        return std * torch.randn(*shape, generator=generator)

    sides = uniform(0.1, 0.6, batch, NUM_OBJECTS, 2) * size
    # Around places that are apart: where two objects have one nearest anchor, the sides differ.
    cells = torch.stack([torch.randperm(9, generator=generator) for _ in range(batch)])
    places = torch.stack([cells % 3, cells // 3], dim=-1)[:, :NUM_OBJECTS]
    centers = (places + uniform(0.3, 0.7, batch, NUM_OBJECTS, 2)) * size / 3
    corners = (centers - sides / 2).clamp(min=0).minimum(size - sides)
    boxes = torch.cat([corners, corners + sides], dim=-1)
    labels = torch.randint(num_classes, (batch, NUM_OBJECTS), generator=generator)

    num_anchors = len(anchors)
    iou, nearest = pairwise_iou(boxes, anchors).max(dim=1)  # (B, A)
    near = iou > 0.4
    nearest_boxes = boxes.gather(1, nearest[..., None].expand(-1, -1, 4))
    jitter = normal(0.03, batch, num_anchors, 4) * size * (1 - iou[..., None])
    deltas = torch.where(
        near[..., None],
        encode_boxes(nearest_boxes, anchors) + encode_jitter(jitter, anchors),
        normal(0.3, batch, num_anchors, 4),
    )
    # Some places look more like an object than others, whatever the class.
    logits = normal(1, batch, num_anchors, 1) + normal(1, batch, num_anchors, num_classes) - 9.5
    # Scores grow with the overlap, and a second class has some of them too.
    score = (12 * iou - 7 + normal(0.7, batch, num_anchors))[..., None]
    own = labels.gather(1, nearest)[..., None]
    second = (own + 1) % num_classes
    low = logits.gather(2, own), logits.gather(2, second)
    logits.scatter_(2, own, torch.where(near[..., None], score, low[0]))
    logits.scatter_(2, second, torch.where(near[..., None], score - 3, low[1]))
    images = normal(1, batch, 3, size, size)
    return Scene(images, boxes, labels, deltas, logits)


def encode_jitter(jitter: Tensor, anchors: Tensor) -> Tensor:
    """Pixels (B, A, 4) that a box is off, as a change of its codes."""
    side = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    return 2 * jitter / side


def as_softmax(logits: Tensor) -> Tensor:
    """Logits (..., 1 + K) whose softmax is the sigmoid of logits (..., K); the rest is background.

    Where the scores of an anchor add up to more than 1, they share it.
    """
    scores = logits.double().sigmoid()
    scores = scores / scores.sum(-1, keepdim=True).clamp(min=0.999) * 0.999
    return torch.cat([1 - scores.sum(-1, keepdim=True), scores], dim=-1).log().float()


def as_sigmoid(logits: Tensor) -> Tensor:
    """Logits whose sigmoid is the softmax of logits (..., 1 + K)."""
    return logits.double().softmax(-1).logit().float()


def as_lists(scene: Scene, first_label: int) -> list[dict[str, Tensor]]:
    """Targets as torchvision takes them."""
    return [
        {"boxes": boxes, "labels": labels + first_label}
        for boxes, labels in zip(scene.boxes, scene.labels, strict=True)
    ]


def as_targets(scene: Scene) -> Targets:
    """Targets as we take them."""
    return Targets(scene.boxes, scene.labels, torch.ones_like(scene.labels, dtype=torch.bool))


def make_ssds() -> tuple[Any, SSD]:
    """torchvision's SSDLite, and ours with its weights and anchors."""
    theirs: Any = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES
    )
    ours = SSD(
        backbone=TorchvisionFeatures(copy.deepcopy(theirs.backbone), SSD_SIZE),
        extras=lambda _: [],
        head=partial(make_predictor, separable=True),
        num_classes=NUM_CLASSES - 1,
        input_size=SSD_SIZE,
        reduce_boxes_in_lowest_layer=False,
    )
    for own, other in (
        (ours.class_predictors, theirs.head.classification_head.module_list),
        (ours.box_predictors, theirs.head.regression_head.module_list),
    ):
        # Layer by layer the same, under other names.
        state = zip(own.state_dict(), other.state_dict().values(), strict=True)
        own.load_state_dict(dict(state))
    images = torch.zeros(1, 3, SSD_SIZE, SSD_SIZE)
    ours.anchors = find_anchors(theirs.eval(), images)[0]
    return theirs, ours


def make_retinanets(size: int) -> tuple[Any, RetinaNet]:
    """torchvision's RetinaNet, and ours with its weights."""
    theirs: Any = retinanet.RetinaNet(
        _resnet_fpn_extractor(
            resnet18(weights=None),
            trainable_layers=5,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        ),
        NUM_CLASSES,
    )
    ours = RetinaNet(
        backbone=TorchvisionResNet("resnet18"),
        pyramid=partial(FeaturePyramid, extra_from="p5"),
        head=RetinaNetHead,
        num_classes=NUM_CLASSES,
        input_size=size,
        torchvision_anchors=True,
    )
    load_weights(ours, load_torchvision_retinanet(theirs.state_dict()))
    assert ours.anchors.equal(find_anchors(theirs.eval(), torch.zeros(1, 3, size, size))[0])
    return theirs, ours


@torch.no_grad()
def find_anchors(theirs: Any, images: Tensor) -> list[Tensor]:
    """Anchors of each image, as torchvision makes them with every batch."""
    return run_theirs(theirs, images)[1]


def run_theirs(theirs: Any, images: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
    """torchvision's forward without its resizing: outputs, anchors, anchors of each level."""
    features = list(theirs.backbone(images).values())
    outputs = theirs.head(features)
    sizes = [tuple(images.shape[-2:])] * len(images)
    anchors = theirs.anchor_generator(ImageList(images, sizes), features)
    cells = [own.shape[-2] * own.shape[-1] for own in features]
    per_cell = len(anchors[0]) // sum(cells)
    return outputs, anchors, [count * per_cell for count in cells]


def decode_theirs(
    theirs: Any, outputs: dict[str, Tensor], anchors: list[Tensor], levels: list[int], size: int
) -> list[dict[str, Tensor]]:
    """torchvision's post-processing."""
    sizes = [(size, size)] * len(anchors)
    if isinstance(theirs, TorchvisionSSD):
        return theirs.postprocess_detections(outputs, anchors, sizes)
    split = {name: list(output.split(levels, dim=1)) for name, output in outputs.items()}
    return theirs.postprocess_detections(split, [list(a.split(levels)) for a in anchors], sizes)


def match_theirs(theirs: Any, targets: list[dict[str, Tensor]], anchors: list[Tensor]) -> Any:
    """torchvision's target assignment."""
    return [
        theirs.proposal_matcher(box_iou(own["boxes"], own_anchors))
        for own, own_anchors in zip(targets, anchors, strict=True)
    ]


def lose_theirs(
    theirs: Any, targets: list[dict[str, Tensor]], outputs: dict[str, Tensor], anchors: list[Tensor]
) -> Tensor:
    """torchvision's loss, the assignment included."""
    if isinstance(theirs, TorchvisionSSD):
        matches = match_theirs(theirs, targets, anchors)
        losses = theirs.compute_loss(targets, outputs, anchors, matches)
    else:
        losses = theirs.compute_loss(targets, outputs, anchors)
    return losses["classification"] + losses["bbox_regression"]


class Detectors(NamedTuple):
    """Both sides of one detector.

    Args:
        name: of it.
        theirs: torchvision's.
        ours: with its weights.
        postprocess: ours, that gives what theirs gives.
        criterion: ours.
        same_losses: whether both have the same loss.
        match_options: of `match_anchors`.
        targets: least ratios, by the name of the figure.
        train_layout: memory format in which ours is trained.
        min_train_batch: one image is no batch for the batch norm of a map of one cell.
    """

    name: str
    theirs: Any
    ours: Any
    postprocess: Postprocess
    criterion: FocalCriterion
    same_losses: bool
    match_options: dict[str, Any]
    targets: dict[str, float]
    train_layout: torch.memory_format
    min_train_batch: int


def build_detectors(retinanet_size: int) -> list[Detectors]:
    """SSD and RetinaNet."""
    theirs, ours = make_ssds()
    ssd = Detectors(
        name="SSD",
        theirs=theirs,
        ours=ours,
        postprocess=Postprocess(
            score_threshold=theirs.score_thresh,
            iou_threshold=theirs.nms_thresh,
            max_detections=theirs.detections_per_img,
            clip_first=True,
        ),
        criterion=FocalCriterion(),
        same_losses=False,
        match_options={},
        targets={
            "post-processing": 15.0,
            "inference": 1.5,
            "assignment": 3.0,
            "loss": 1.3,
            "training step": 1.15,
        },
        train_layout=torch.channels_last,
        min_train_batch=2,
    )
    theirs, ours = make_retinanets(retinanet_size)
    options = {"background_threshold": 0.4, "keep_ties": True}
    return [
        ssd,
        Detectors(
            name="RetinaNet",
            theirs=theirs,
            ours=ours,
            postprocess=Postprocess(
                score_threshold=theirs.score_thresh,
                iou_threshold=theirs.nms_thresh,
                num_candidates=theirs.topk_candidates,
                max_detections=theirs.detections_per_img,
                per_level=True,
                clip_first=True,
            ),
            criterion=FocalCriterion(
                alpha=0.25, beta=0.0, localization_weight=4.0, per_image=True, **options
            ),
            same_losses=True,
            match_options=options,
            targets=dict.fromkeys(
                ("post-processing", "inference", "assignment", "loss", "training step"), 1.0
            ),
            train_layout=torch.contiguous_format,
            min_train_batch=1,
        ),
    ]


def list_figures(detectors: Detectors, batch: int) -> Iterator[Figure]:
    """What is timed; the sides' results are compared first.

    Raises:
        AssertionError: where they differ.
    """
    theirs, ours = detectors.theirs, detectors.ours
    size, is_ssd = ours.input_size, isinstance(ours, SSD)
    scene = draw_scene(
        ours.anchors,
        batch=batch,
        size=size,
        num_classes=ours.num_classes,
        generator=torch.Generator().manual_seed(batch),
    )
    logits = as_softmax(scene.logits) if is_ssd else scene.logits
    outputs = {"bbox_regression": scene.deltas / code_ratio(ours), "cls_logits": logits}
    predictions = RawPredictions(
        deltas=outputs["bbox_regression"],
        logits=as_sigmoid(logits) if is_ssd else logits,
        anchors=ours.anchors,
        num_background=ours.num_background,
        code_weights=getattr(ours, "code_weights", RawPredictions._field_defaults["code_weights"]),
        level_sizes=ours.level_sizes,
    )
    their_targets, our_targets = as_lists(scene, ours.num_background), as_targets(scene)
    theirs.eval()
    ours.eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        raw, anchors, levels = run_theirs(theirs, scene.images)
        own = ours(scene.images)
    torch.testing.assert_close(own.logits, raw["cls_logits"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(own.deltas, raw["bbox_regression"], rtol=1e-3, atol=1e-4)

    def figure(name: str, theirs: Side, ours: Side) -> Figure:
        target = detectors.targets.get(name, 0.0)
        return Figure(f"{detectors.name} {name}", batch, target, theirs, ours)

    decode_all = partial(decode_theirs, theirs, outputs, anchors, levels, size)
    decode_ours = partial(detectors.postprocess, predictions, size)
    check_detections(decode_ours(), decode_all(), first_label=ours.num_background)
    yield figure("post-processing", decode_all, decode_ours)

    @torch.no_grad()
    def infer_theirs() -> Any:
        _, anchors, levels = run_theirs(theirs, scene.images)
        return decode_theirs(theirs, outputs, anchors, levels, size)

    @torch.no_grad()
    def infer_ours() -> Any:
        own = ours(scene.images)
        drawn = own._replace(deltas=predictions.deltas, logits=predictions.logits)
        return detectors.postprocess(drawn, size)

    check_detections(infer_ours(), infer_theirs(), first_label=ours.num_background)
    yield figure("inference", infer_theirs, infer_ours)

    assign_theirs = partial(match_theirs, theirs, their_targets, anchors)
    assign_ours = partial(match_anchors, ours.anchors, our_targets, **detectors.match_options)
    assert assign_ours().equal(torch.stack(assign_theirs()))
    yield figure("assignment", assign_theirs, assign_ours)

    for tensor in (*outputs.values(), predictions.logits):
        tensor.requires_grad_()

    def learn_theirs() -> Tensor:
        loss = lose_theirs(theirs, their_targets, outputs, anchors)
        torch.autograd.grad(loss, list(outputs.values()))
        return loss

    def learn_ours() -> Tensor:
        losses = detectors.criterion(predictions, our_targets)
        loss = losses.total / losses.divisor
        torch.autograd.grad(loss, [predictions.deltas, predictions.logits])
        return loss

    if detectors.same_losses:
        torch.testing.assert_close(learn_ours(), learn_theirs(), rtol=1e-4, atol=0)
    yield figure("loss", learn_theirs, learn_ours)

    if batch < detectors.min_train_batch:
        return
    # Copies: the weights change.
    their_copy, our_copy = copy.deepcopy(theirs).train(), copy.deepcopy(ours).train()
    our_copy.to(memory_format=detectors.train_layout)
    their_optimizer, our_optimizer = (
        torch.optim.SGD(network.parameters(), lr=1e-5, momentum=0.9, fused=True)
        for network in (their_copy, our_copy)
    )

    def step_theirs() -> None:
        their_optimizer.zero_grad()
        outputs, anchors, _ = run_theirs(their_copy, scene.images)
        lose_theirs(their_copy, their_targets, outputs, anchors).backward()
        their_optimizer.step()

    def step_ours() -> None:
        our_optimizer.zero_grad()
        images = scene.images.contiguous(memory_format=detectors.train_layout)
        losses = detectors.criterion(our_copy(images), our_targets)
        (losses.total / losses.divisor).backward()
        our_optimizer.step()

    yield figure("training step", step_theirs, step_ours)


def code_ratio(network: Any) -> Tensor:
    """Factors of codes as `encode_boxes` makes them by default over those of a network."""
    default = torch.tensor(RawPredictions._field_defaults["code_weights"])
    return default / torch.tensor(getattr(network, "code_weights", default.tolist()))


def check_detections(
    ours: Detections, theirs: Sequence[dict[str, Tensor]], *, first_label: int
) -> None:
    """Raise an AssertionError where detections differ; sorted by their scores, they are the same.

    Args:
        first_label: torchvision's label of our 0.
    """
    for image, found in enumerate(theirs):
        valid = ours.valid[image]
        order = found["scores"].argsort(descending=True)
        assert len(order) == valid.sum() > NUM_OBJECTS
        torch.testing.assert_close(
            ours.scores[image, valid], found["scores"][order], rtol=0, atol=1e-5
        )
        assert ours.labels[image, valid].equal(found["labels"][order] - first_label)
        torch.testing.assert_close(
            ours.boxes[image, valid], found["boxes"][order], rtol=0, atol=1e-2
        )


def measure(figure: Figure, rounds: int) -> Timing:
    """Time both sides in turn."""
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    figure.theirs()
    figure.ours()
    for _ in range(rounds):
        for name, run in (("theirs", figure.theirs), ("ours", figure.ours)):
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Timing(statistics.median(times["theirs"]), statistics.median(times["ours"]), low, high)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20, help="at least 2")
    parser.add_argument("--quick", action="store_true", help="small images, one batch, 2 rounds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size, batches, rounds = (128, (2,), 2) if options.quick else (256, (1, 8), options.rounds)
    table = Table(title=f"torchvision's time over ours, {options.threads} threads")
    table.add_column("", no_wrap=True)
    for column in ("batch", "theirs, ms", "ours, ms", "ratio", "quartiles", "target"):
        table.add_column(column, justify="right")
    missed = []
    for detectors in build_detectors(size):
        for batch in batches:
            for figure in list_figures(detectors, batch):
                timing = measure(figure, rounds)
                table.add_row(
                    figure.name,
                    str(batch),
                    f"{timing.theirs:.2f}",
                    f"{timing.ours:.2f}",
                    f"{timing.ratio:.2f}",
                    f"{timing.low:.2f} – {timing.high:.2f}",
                    f"{figure.target:.2f}" if figure.target else "",
                )
                if timing.ratio < figure.target:
                    missed.append(f"{figure.name}, batch {batch}")
    Console(width=110).print(table)
    if missed and not options.quick:
        sys.exit(f"below its target: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
