"""Shapes: B images, A anchors, S class slots, D detections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, nms

from detection import postprocess
from detection.boxes import decode_boxes
from detection.postprocess import Postprocess
from detection.structures import Detections, RawPredictions

SIZE = 100
NUM_CLASSES = 3


@pytest.fixture(autouse=True, params=["all pairs", "in rounds"])
def suppression(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways give the same."""
    monkeypatch.setattr(postprocess, "MAX_PAIRED", 0 if request.param == "in rounds" else 10**6)


def make_predictions(num_images: int = 3, num_anchors: int = 80, seed: int = 0) -> RawPredictions:
    """Crowded boxes, many over the border, and scores that all differ."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, num_anchors, 1 + NUM_CLASSES)
    logits = torch.randperm(num_images * num_anchors * (1 + NUM_CLASSES), generator=generator)
    corner = torch.rand(num_anchors, 2, generator=generator) * 120 - 20
    size = torch.rand(num_anchors, 2, generator=generator) * 30 + 10
    return RawPredictions(
        deltas=torch.randn(num_images, num_anchors, 4, generator=generator),
        logits=logits.view(shape) / logits.numel() * 8 - 4,
        anchors=torch.cat([corner, corner + size], dim=-1),
    )


def detect_plainly(
    predictions: RawPredictions, *, score_threshold: float, iou_threshold: float, limit: int
) -> list[list[tuple[float, int, list[float]]]]:
    """One image and one class at a time, all candidates."""
    images = []
    for deltas, logits in zip(predictions.deltas, predictions.logits, strict=True):
        boxes = decode_boxes(deltas, predictions.anchors)
        found = []
        for label in range(NUM_CLASSES):
            scores = logits[:, 1 + label].sigmoid()
            candidates = (scores > score_threshold).nonzero()[:, 0]
            kept = candidates[nms(boxes[candidates], scores[candidates], iou_threshold)]
            for box, score in zip(
                clip_boxes_to_image(boxes[kept], (SIZE, SIZE)), scores[kept], strict=True
            ):
                if (box[2] - box[0]) * (box[3] - box[1]) > 0:
                    found.append((score.item(), label, box.tolist()))
        images.append(sorted(found, reverse=True)[:limit])
    return images


def unpack(detections: Detections) -> list[list[tuple[float, int, list[float]]]]:
    return [
        [
            (score, label, box)
            for score, label, box, valid in zip(*(f.tolist() for f in fields), strict=True)
            if valid
        ]
        for fields in zip(
            detections.scores, detections.labels, detections.boxes, detections.valid, strict=True
        )
    ]


def assert_same(ours: list, expected: list) -> None:
    for image, expected_image in zip(ours, expected, strict=True):
        assert [label for _, label, _ in image] == [label for _, label, _ in expected_image]
        for (score, _, box), (expected_score, _, expected_box) in zip(
            image, expected_image, strict=True
        ):
            assert score == pytest.approx(expected_score, abs=1e-6)
            assert box == pytest.approx(expected_box, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("iou_threshold", [0.3, 0.6])
@pytest.mark.parametrize("score_threshold", [1e-8, 0.5])
@pytest.mark.parametrize("limit", [20, 100])
def test_equals_plain_loops(
    seed: int, iou_threshold: float, score_threshold: float, limit: int
) -> None:
    predictions = make_predictions(seed=seed)
    thresholds = {"iou_threshold": iou_threshold, "score_threshold": score_threshold}
    expected = detect_plainly(predictions, limit=limit, **thresholds)
    postprocess = Postprocess(max_detections=limit, **thresholds)
    assert any(expected)
    assert_same(unpack(postprocess(predictions, SIZE)), expected)


def test_few_candidates_are_exact_where_the_places_are_filled() -> None:
    predictions = make_predictions()
    whole = Postprocess(max_detections=20)(predictions, SIZE)
    limited = Postprocess(max_detections=20, num_candidates=60)(predictions, SIZE)
    assert limited.valid.all()
    assert_same(unpack(limited), unpack(whole))


@pytest.mark.parametrize("num_finite", [4, 1200])
def test_candidates_are_the_best_pairs(num_finite: int) -> None:
    """Of so many that they are looked for in columns of a table; the best one is left over."""
    num_anchors, num_classes, k = 30, 43, 6
    logits = torch.full((2, num_anchors * num_classes), -torch.inf)
    for image in logits:
        image[torch.randperm(len(image) - 1)[:num_finite]] = torch.linspace(-3, 3, num_finite)
        image[-1] = 4
    predictions = RawPredictions(
        deltas=torch.zeros(2, num_anchors, 4),
        logits=logits.view(2, num_anchors, num_classes),
        anchors=torch.tensor([[10.0, 10.0, 20.0, 20.0]]).repeat(num_anchors, 1),
        num_background=0,
    )
    found = Postprocess(iou_threshold=1.0, num_candidates=k)(predictions, SIZE)
    num_found = min(num_finite + 1, k)
    assert found.valid.sum(1).tolist() == [num_found] * 2
    best, pairs = logits.topk(num_found, dim=1)
    assert found.scores[found.valid].equal(best.sigmoid().flatten())
    assert found.labels[found.valid].equal((pairs % num_classes).flatten())


def test_batched_equals_single() -> None:
    predictions = make_predictions()
    batched = Postprocess()(predictions, SIZE)
    for i in range(3):
        image = slice(i, i + 1)
        single = Postprocess()(
            predictions._replace(
                deltas=predictions.deltas[image], logits=predictions.logits[image]
            ),
            SIZE,
        )
        assert_same(unpack(single), unpack(batched)[image])


def one_image(boxes: list, logits: list) -> RawPredictions:
    """Boxes as they are to come out; logits without the background's."""
    logits_tensor = torch.tensor(logits).float()
    background = torch.full((len(boxes), 1), 9.0)  # must not matter
    return RawPredictions(
        deltas=torch.zeros(1, len(boxes), 4),
        logits=torch.cat([background, logits_tensor], dim=1)[None],
        anchors=torch.tensor(boxes).float(),
    )


def test_detections_are_described() -> None:
    detections = Postprocess(score_threshold=0.5, max_detections=3)(
        one_image([[0, 0, 10, 10], [50, 50, 70, 90]], [[-9, 1], [2, -9]]), SIZE
    )
    assert detections.labels.tolist() == [[0, 1, 0]]
    assert detections.valid.tolist() == [[True, True, False]]
    assert detections.boxes.tolist() == [[[50, 50, 70, 90], [0, 0, 10, 10], [0, 0, 0, 0]]]
    expected = torch.tensor([[2.0, 1.0, 0.0]]).sigmoid() * detections.valid
    torch.testing.assert_close(detections.scores, expected)
    assert detections.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("boxes", "logits", "num_kept"),
    [
        pytest.param([[0, 0, 10, 10], [0, 0, 10, 9]], [[2], [1]], 1, id="overlap"),
        pytest.param([[0, 0, 10, 10], [0, 0, 10, 5]], [[2], [1]], 2, id="little overlap"),
        pytest.param([[0, 0, 10, 10], [0, 0, 10, 6]], [[2], [1]], 2, id="the threshold itself"),
        pytest.param(
            [[0, 0, 10, 10], [0, 0, 10, 9]], [[2, -30], [-30, 1]], 2, id="of different classes"
        ),
        # Clipped they would be equal.
        pytest.param([[0, 0, 900, 10], [0, 0, 100, 10]], [[2], [1]], 2, id="outside counts"),
        pytest.param([[-20, 0, -5, 10], [0, 0, 5, 5]], [[2], [1]], 1, id="outside is dropped"),
        pytest.param([[0, 0, 5, 5], [7, 7, 9, 9]], [[-30], [-30]], 0, id="low scores"),
    ],
)
def test_single_cases(boxes: list, logits: list, num_kept: int) -> None:
    assert Postprocess()(one_image(boxes, logits), SIZE).valid.sum() == num_kept


def test_a_box_outside_still_suppresses() -> None:
    """Suppression comes before clipping, as in the API."""
    boxes = [[-20, 0, 0, 10], [-20, 0, 1, 10]]
    assert not Postprocess()(one_image(boxes, [[2], [1]]), SIZE).valid.any()


def test_boxes_outside_take_no_place() -> None:
    outside = [[-10 * i - 10, 0, -10 * i - 5, 5] for i in range(200)]
    predictions = one_image([*outside, [0, 0, 5, 5]], [*[[2]] * 200, [1]])
    assert Postprocess(max_detections=100)(predictions, SIZE).valid.sum() == 1


def test_images_do_not_suppress_each_other() -> None:
    predictions = one_image([[0, 0, 10, 10]], [[2]])
    twice = RawPredictions(
        predictions.deltas.repeat(2, 1, 1), predictions.logits.repeat(2, 1, 1), predictions.anchors
    )
    assert Postprocess()(twice, SIZE).valid.sum(1).tolist() == [1, 1]


def test_far_boxes_do_not_blur_overlaps() -> None:
    """One wild box must not cost the others their fractions of a pixel."""
    boxes = [[0, 0, 1e6, 1e6], [0, 0, 10, 10], [0, 0, 10, 6.01], [20, 0, 30, 10], [20, 0, 30, 5.99]]
    logits = [[-30, 5], [-30, 4], [-30, 3], [-30, 2], [-30, 1]]
    detections = Postprocess(score_threshold=0.5)(one_image(boxes, logits), SIZE)
    heights = detections.boxes[0, :4, 3].tolist()
    assert detections.valid.sum() == 4 and heights == pytest.approx([100, 10, 10, 5.99])


def same_shapes(detections: Detections, num_images: int, num_detections: int) -> bool:
    return (
        detections.boxes.shape == (num_images, num_detections, 4)
        and detections.scores.shape == (num_images, num_detections)
        and detections.labels.shape == (num_images, num_detections)
        and detections.valid.shape == (num_images, num_detections)
    )


def test_nothing_found() -> None:
    predictions = make_predictions()
    nothing = predictions._replace(logits=torch.full_like(predictions.logits, -100))
    detections = Postprocess(max_detections=10)(nothing, SIZE)
    assert same_shapes(detections, 3, 10)
    assert not detections.valid.any() and not detections.scores.any()
    assert not detections.boxes.any() and not detections.labels.any()


@pytest.mark.parametrize(("num_images", "num_anchors"), [(0, 5), (2, 0)])
def test_nothing_given(num_images: int, num_anchors: int) -> None:
    detections = Postprocess()(make_predictions(num_images, num_anchors), SIZE)
    assert not detections.valid.any()
    assert detections.valid.shape[0] == num_images


def test_half_precision() -> None:
    predictions = make_predictions()
    halved = predictions._replace(
        deltas=predictions.deltas.bfloat16(), logits=predictions.logits.bfloat16()
    )
    detections = Postprocess()(halved, SIZE)
    assert detections.boxes.dtype == detections.scores.dtype == torch.float32


def test_no_gradient() -> None:
    predictions = make_predictions()
    predictions.logits.requires_grad_()
    scores: Tensor = Postprocess()(predictions, SIZE).scores
    assert not scores.requires_grad


@pytest.mark.parametrize("num_background", [0, 2])
def test_background_slots_are_no_classes(num_background: int) -> None:
    predictions = one_image([[0, 0, 10, 10], [50, 50, 70, 90]], [[-9, 1], [2, -9]])
    logits = predictions.logits[..., 1:]
    background = logits.new_full((*logits.shape[:2], num_background), 9.0)
    other = predictions._replace(
        logits=torch.cat([background, logits], dim=-1), num_background=num_background
    )
    for ours, expected in zip(
        Postprocess()(other, SIZE), Postprocess()(predictions, SIZE), strict=True
    ):
        assert ours.equal(expected)


def test_codes_have_the_weights_of_the_network() -> None:
    predictions = make_predictions()
    deltas = predictions.deltas * torch.tensor([0.1, 0.1, 0.2, 0.2])
    other = predictions._replace(deltas=deltas, code_weights=(1.0, 1.0, 1.0, 1.0))
    assert_same(unpack(Postprocess()(other, SIZE)), unpack(Postprocess()(predictions, SIZE)))


def test_candidates_of_each_level() -> None:
    """The best k of a level come in, however good those of another are."""
    boxes = [[10 * i, 0, 10 * i + 9, 9] for i in range(6)]
    predictions = one_image(boxes, [[5], [4], [3], [-1], [-2], [-3]])
    predictions = predictions._replace(level_sizes=(3, 3))
    for per_level, scores in ((True, [5, 4, -1, -2]), (False, [5, 4])):
        detections = Postprocess(num_candidates=2, per_level=per_level)(predictions, SIZE)
        expected = torch.tensor([scores]).float().sigmoid()
        torch.testing.assert_close(detections.scores, expected)
        places = [[5, 4, 3, -1, -2, -3].index(score) for score in scores]
        assert detections.boxes[0].tolist() == [boxes[place] for place in places]


def test_a_level_suppresses_what_another_one_has() -> None:
    predictions = one_image([[0, 0, 10, 10], [0, 0, 10, 9]], [[1], [2]])
    predictions = predictions._replace(level_sizes=(1, 1))
    detections = Postprocess(per_level=True)(predictions, SIZE)
    assert detections.boxes[0].tolist() == [[0, 0, 10, 9], [0, 0, 0, 0]]


def test_a_long_chain() -> None:
    """Each box overlaps the next, so every other one survives."""
    boxes = [[i, 0, i + 4, 10] for i in range(300)]
    predictions = one_image(boxes, [[9 - 0.01 * i] for i in range(300)])
    detections = Postprocess(iou_threshold=0.5, max_detections=200)(predictions, 400)
    kept = detections.boxes[0][detections.valid[0]]
    assert kept.tolist() == boxes[::2]


def test_what_is_needed_may_lie_beyond_the_best() -> None:
    """Two detections are first looked for among the best six of each image."""
    crowd = [[0, 0, 10, 10 - 0.1 * i] for i in range(6)]
    apart = [[20, 0, 30, 10], [40, 0, 50, 10]]
    outside = [[-40, 0, -30, 10]]
    rankings = [
        [*crowd[:5], *apart, crowd[5], *outside],  # two survive
        [*crowd, *apart, *outside],  # one
        [*outside, *crowd[:5], *apart, crowd[5]],  # two, of which one cannot be seen
    ]
    boxes = [*crowd, *apart, *outside]
    logits = torch.tensor([[[9.0 - ranking.index(box)] for box in boxes] for ranking in rankings])
    predictions = RawPredictions(
        deltas=torch.zeros(3, len(boxes), 4),
        logits=logits,
        anchors=torch.tensor(boxes),
        num_background=0,
    )
    detections = Postprocess(max_detections=2)(predictions, SIZE)
    assert detections.boxes.tolist() == [[crowd[0], apart[0]]] * 3
    # All six are good enough, and no other one is.
    sure = Postprocess(max_detections=2, score_threshold=torch.tensor(3.5).sigmoid().item())
    assert sure(predictions, SIZE).valid.sum(1).tolist() == [2, 1, 1]


def test_clip_first() -> None:
    """Clipped they are equal."""
    predictions = one_image([[0, 0, 900, 10], [0, 0, 100, 10]], [[2], [1]])
    assert Postprocess()(predictions, SIZE).valid.sum() == 2
    assert Postprocess(clip_first=True)(predictions, SIZE).valid.sum() == 1


def test_more_candidates_than_anchors_have_the_best_class() -> None:
    """An anchor may be several candidates, and the worst class of a good one beats a poor one."""
    predictions = one_image(
        [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], [[5, 4], [3, -9], [-5, -6]]
    )
    detections = Postprocess(num_candidates=3)(predictions, SIZE)
    assert detections.labels[0].tolist() == [0, 1, 0]
    torch.testing.assert_close(detections.scores[0], torch.tensor([5.0, 4.0, 3.0]).sigmoid())
