"""Shapes: B images, A anchors, G ground truths, S class slots."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from detection.boxes import decode_boxes, encode_boxes
from detection.losses import FocalCriterion, gather_matches
from detection.matching import match_anchors
from detection.structures import RawPredictions, Targets

NUM_SLOTS = 4


def make_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(*shape, 2, generator=generator) * 60
    size = torch.rand(*shape, 2, generator=generator) * 40 + 5
    return torch.cat([corner, corner + size], dim=-1)


def make_batch(*, num_images: int = 3, num_boxes: int = 5) -> tuple[RawPredictions, Targets]:
    """Images with different numbers of boxes, from none to all."""
    generator = torch.Generator().manual_seed(0)
    predictions = RawPredictions(
        deltas=torch.randn(num_images, 50, 4, generator=generator),
        logits=torch.randn(num_images, 50, NUM_SLOTS, generator=generator) * 3,
        anchors=make_boxes(50, generator=generator),
    )
    counts = torch.arange(num_images) * num_boxes // max(num_images - 1, 1)
    valid = torch.arange(num_boxes) < counts[:, None]
    boxes = make_boxes(num_images, num_boxes, generator=generator) * valid[..., None]
    labels = torch.randint(0, NUM_SLOTS - 1, valid.shape, generator=generator) * valid
    return predictions, Targets(boxes, labels, valid)


def select(
    predictions: RawPredictions, targets: Targets, images: slice
) -> tuple[RawPredictions, Targets]:
    return (
        predictions._replace(deltas=predictions.deltas[images], logits=predictions.logits[images]),
        Targets(*(field[images] for field in targets)),
    )


@pytest.mark.parametrize("chunk", [1, 3 * NUM_SLOTS, 2**16])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.75, 2.0), (0.5, 0.0), (0.75, 1.5)])
def test_class_loss_equals_torchvision(
    monkeypatch: pytest.MonkeyPatch, alpha: float, gamma: float, chunk: int
) -> None:
    """Also its gradient; ignored anchors have neither."""
    monkeypatch.setattr("detection.losses.CHUNK", chunk)
    predictions, targets = make_batch()
    match = match_anchors(predictions.anchors, targets, background_threshold=0.2)
    wanted = torch.zeros_like(predictions.logits)
    for image, anchor in (match >= 0).nonzero().tolist():
        wanted[image, anchor, 1 + targets.labels[image, match[image, anchor]]] = 1
    assert wanted.sum() > 5 and (match == -2).sum() > 5
    logits, own = (predictions.logits.clone().requires_grad_() for _ in range(2))
    expected = torchvision_focal_loss(logits, wanted, alpha=alpha, gamma=gamma)
    expected = expected[match != -2].sum()
    criterion = FocalCriterion(background_threshold=0.2, alpha=alpha, gamma=gamma)
    loss = criterion(predictions._replace(logits=own), targets).sums["classification"]
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(own.grad, logits.grad)


def test_extreme_logits_have_a_finite_loss() -> None:
    predictions, targets = make_batch()
    values = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    logits = values.expand_as(predictions.logits).clone().requires_grad_()
    total = FocalCriterion()(predictions._replace(logits=logits), targets).total
    total.backward()
    assert total.isfinite() and logits.grad.isfinite().all()


def test_criterion_equals_plain_loops() -> None:
    predictions, targets = make_batch()
    losses = FocalCriterion()(predictions, targets)
    match = match_anchors(predictions.anchors, targets)
    classification = localization = 0.0
    for image, row in enumerate(match.tolist()):
        for anchor, truth in enumerate(row):
            slot = 0 if truth < 0 else 1 + int(targets.labels[image, truth])
            for s, logit in enumerate(predictions.logits[image, anchor].tolist()):
                positive = s == slot and slot > 0
                p_t = 1 / (1 + math.exp(-logit if positive else logit))
                alpha_t = 0.75 if positive else 0.25
                classification -= alpha_t * (1 - p_t) ** 2 * math.log(p_t)
            if truth >= 0:
                anchors = predictions.anchors[anchor][None]
                code = encode_boxes(targets.boxes[image, truth][None], anchors)[0].tolist()
                for ours, wanted in zip(
                    predictions.deltas[image, anchor].tolist(), code, strict=True
                ):
                    error = abs(ours - wanted)
                    localization += (error**2 / 2 if error < 1 else error - 0.5) / 4
    num_matches = sum(truth >= 0 for row in match.tolist() for truth in row)
    assert num_matches > 5
    assert losses.divisor.item() == num_matches
    assert losses.sums["classification"].item() == pytest.approx(classification, rel=1e-5)
    assert losses.sums["localization"].item() == pytest.approx(localization, rel=1e-5)
    assert losses.total.item() == pytest.approx(classification + localization, rel=1e-5)


def test_sums_of_parts_add_up() -> None:
    """What gradient accumulation and several processes rely on."""
    predictions, targets = make_batch(num_images=4)
    whole = FocalCriterion()(predictions, targets)
    parts = [
        FocalCriterion()(*select(predictions, targets, slice(start, start + 1)))
        for start in range(4)
    ]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    assert sum(part.divisor for part in parts) == whole.divisor


def test_weights() -> None:
    predictions, targets = make_batch()
    plain = FocalCriterion()(predictions, targets)
    weighted = FocalCriterion(classification_weight=2, localization_weight=0.5)(
        predictions, targets
    )
    assert weighted.sums["classification"] == 2 * plain.sums["classification"]
    assert weighted.sums["localization"] == plain.sums["localization"] / 2


def test_options_reach_the_losses() -> None:
    predictions, targets = make_batch()
    plain = FocalCriterion()(predictions, targets)
    assert FocalCriterion(match_threshold=0.2)(predictions, targets).divisor > plain.divisor
    for option in ({"alpha": 0.5}, {"gamma": 1.0}):
        changed = FocalCriterion(**option)(predictions, targets)
        assert changed.sums["classification"] != plain.sums["classification"]
        assert changed.sums["localization"] == plain.sums["localization"]
    changed = FocalCriterion(beta=0.5)(predictions, targets)
    assert changed.sums["classification"] == plain.sums["classification"]
    assert changed.sums["localization"] > plain.sums["localization"]


@pytest.mark.parametrize("num_boxes", [0, 3])
def test_no_ground_truth(num_boxes: int) -> None:
    """All anchors are background; padded boxes have no size and must not give NaN."""
    predictions, _ = make_batch()
    predictions.deltas.requires_grad_()
    predictions.logits.requires_grad_()
    targets = Targets(
        torch.zeros(3, num_boxes, 4),
        torch.zeros(3, num_boxes, dtype=torch.int64),
        torch.zeros(3, num_boxes, dtype=torch.bool),
    )
    losses = FocalCriterion()(predictions, targets)
    losses.total.backward()
    assert losses.divisor == 0
    assert losses.sums["localization"] == 0
    background = torch.zeros_like(predictions.logits)
    expected = torchvision_focal_loss(predictions.logits, background, 0.75, 2, reduction="sum")
    torch.testing.assert_close(losses.sums["classification"], expected)
    assert predictions.deltas.grad.eq(0).all()
    assert predictions.logits.grad.isfinite().all()


def test_padding_changes_nothing() -> None:
    predictions, targets = make_batch()
    padded = Targets(
        *(torch.cat([field, torch.zeros_like(field[:, :2])], dim=1) for field in targets)
    )
    assert (
        FocalCriterion()(predictions, padded).total == FocalCriterion()(predictions, targets).total
    )


def test_half_precision_predictions_give_float32_losses() -> None:
    predictions, targets = make_batch()
    halved = predictions._replace(
        deltas=predictions.deltas.bfloat16(), logits=predictions.logits.bfloat16()
    )
    losses = FocalCriterion()(halved, targets)
    assert {loss.dtype for loss in losses.sums.values()} == {torch.float32}
    expected = FocalCriterion()(
        halved._replace(deltas=halved.deltas.float(), logits=halved.logits.float()), targets
    )
    assert losses.total == expected.total


def test_gathered_matches() -> None:
    predictions, targets = make_batch()
    match = match_anchors(predictions.anchors, targets)
    match[0, :5] = -2
    matches = gather_matches(match, targets)
    expected = [
        (image, anchor, targets.labels[image, truth].item(), targets.boxes[image, truth].tolist())
        for image, row in enumerate(match.tolist())
        for anchor, truth in enumerate(row)
        if truth >= 0
    ]
    found = zip(*(field.tolist() for field in matches), strict=True)
    assert list(found) == expected and expected


def test_logits_of_any_layout_have_the_same_gradient() -> None:
    predictions, targets = make_batch()
    slots_first = predictions.logits.mT.contiguous()
    gradients = []
    for logits in (predictions.logits, slots_first.mT):
        leaf = logits.detach().requires_grad_()
        FocalCriterion()(predictions._replace(logits=leaf), targets).total.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_without_a_background_slot() -> None:
    """The same classes without the background's logit: only its own loss is gone."""
    predictions, targets = make_batch()
    bare = predictions._replace(logits=predictions.logits[..., 1:], num_background=0)
    losses, expected = FocalCriterion()(bare, targets), FocalCriterion()(predictions, targets)
    logits = predictions.logits[..., 0]
    background = torchvision_focal_loss(logits, torch.zeros_like(logits), 0.75, 2, reduction="sum")
    torch.testing.assert_close(
        losses.sums["classification"], expected.sums["classification"] - background
    )
    assert losses.sums["localization"] == expected.sums["localization"]


def test_ignored_anchors_have_no_class_loss() -> None:
    predictions, targets = make_batch()
    options = {"match_threshold": 0.5, "background_threshold": 0.2}
    match = match_anchors(predictions.anchors, targets, threshold=0.5, background_threshold=0.2)
    ignored = match == -2
    assert ignored.sum() > 5
    losses = FocalCriterion(**options)(predictions, targets)
    blind = predictions.logits.masked_fill(ignored[..., None], -100.0)  # no loss as background
    expected = FocalCriterion()(predictions._replace(logits=blind), targets)
    torch.testing.assert_close(losses.sums["classification"], expected.sums["classification"])
    assert losses.sums["localization"] == expected.sums["localization"]


def test_giou_loss() -> None:
    predictions, targets = make_batch()
    predictions = predictions._replace(code_weights=(1.0, 1.0, 2.0, 2.0))
    matches = gather_matches(match_anchors(predictions.anchors, targets), targets)
    deltas = predictions.deltas[matches.images, matches.anchors]
    boxes = decode_boxes(deltas, predictions.anchors[matches.anchors], (1.0, 1.0, 2.0, 2.0))
    expected = (1 - generalized_box_iou(boxes, matches.boxes).diagonal()).sum()
    losses = FocalCriterion(box_loss="giou")(predictions, targets)
    torch.testing.assert_close(losses.sums["localization"], expected)


def test_code_weights_reach_the_codes() -> None:
    predictions, targets = make_batch()
    perfect = encode_boxes(
        targets.boxes[2, :1].expand(50, -1), predictions.anchors, (3.0, 3.0, 3.0, 3.0)
    )
    one_box = Targets(*(field[2:, :1] for field in targets))
    predictions = predictions._replace(deltas=perfect[None], logits=predictions.logits[2:])
    right = predictions._replace(code_weights=(3.0, 3.0, 3.0, 3.0))
    assert FocalCriterion()(right, one_box).sums["localization"] < 1e-6
    assert FocalCriterion()(predictions, one_box).sums["localization"] > 0.1


def test_division_by_the_matches_of_each_image() -> None:
    predictions, targets = make_batch()
    leaves = [predictions.logits.requires_grad_(), predictions.deltas.requires_grad_()]
    whole = FocalCriterion(per_image=True)(predictions, targets)
    assert whole.divisor == 3
    sums = dict.fromkeys(whole.sums, torch.zeros(()))
    for image in range(3):
        losses = FocalCriterion()(*select(predictions, targets, slice(image, image + 1)))
        for name, value in losses.sums.items():
            sums[name] = sums[name] + value / losses.divisor.clamp(min=1)
    torch.testing.assert_close(whole.sums, sums)
    gradients = (torch.autograd.grad(sum(losses.values()), leaves) for losses in (whole.sums, sums))
    torch.testing.assert_close(*gradients)


def test_unknown_box_loss() -> None:
    with pytest.raises(ValueError, match="box_loss"):
        FocalCriterion(box_loss="l2")  # pyright: ignore[reportArgumentType]
