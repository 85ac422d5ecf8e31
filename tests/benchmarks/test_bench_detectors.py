from __future__ import annotations

import pytest
import torch

from benchmarks.bench_detectors import (
    Figure,
    as_sigmoid,
    as_softmax,
    build_detectors,
    check_detections,
    list_figures,
    main,
    measure,
)
from detection.structures import Detections

NAMES = ("post-processing", "inference", "assignment", "loss", "training step")


def test_both_sides_have_the_same_results():
    """They are compared before each figure."""
    for detectors in build_detectors(retinanet_size=128):
        figures = [figure.name for figure in list_figures(detectors, batch=2)]
        assert figures == [f"{detectors.name} {name}" for name in NAMES]


@pytest.mark.slow
def test_the_script(capsys: pytest.CaptureFixture[str]):
    main(["--quick", "--threads", "1"])
    printed = capsys.readouterr().out
    assert all(
        f"{detector} {name}" in printed for detector in ("SSD", "RetinaNet") for name in NAMES
    )


def test_scores_are_the_same_on_both_sides():
    logits = torch.tensor([[-9.0, 2.0, -7.0], [-8.0, -8.0, -8.0]])
    theirs = as_softmax(logits)
    torch.testing.assert_close(theirs.softmax(-1)[:, 1:], logits.sigmoid(), rtol=1e-5, atol=0)
    torch.testing.assert_close(as_sigmoid(theirs)[:, 1:], logits, rtol=1e-4, atol=1e-4)
    crowded = as_softmax(torch.tensor([[3.0, 3.0]])).softmax(-1)
    assert crowded[0, 0] > 0 and crowded[0, 1] == crowded[0, 2] < 0.5


def test_differences_are_found():
    num = 12
    scores = torch.linspace(0.9, 0.1, num)
    boxes = torch.rand(num, 4)
    labels = torch.arange(num)
    ours = Detections(boxes[None], scores[None], labels[None], torch.ones(1, num).bool())
    order = torch.randperm(num)
    theirs = {"boxes": boxes[order], "scores": scores[order], "labels": labels[order] + 1}
    check_detections(ours, [theirs], first_label=1)
    for changed in (
        theirs | {"boxes": theirs["boxes"] + 1},
        theirs | {"scores": theirs["scores"] * 0.9},
        theirs | {"labels": theirs["labels"].flip(0)},
        {name: values[1:] for name, values in theirs.items()},
    ):
        with pytest.raises(AssertionError):
            check_detections(ours, [changed], first_label=1)


def test_ratio_is_theirs_over_ours():
    slow, fast = torch.rand(400, 400), torch.rand(4, 4)
    timing = measure(Figure("", 1, 0.0, lambda: slow @ slow @ slow, lambda: fast @ fast), rounds=5)
    assert timing.ratio == timing.theirs / timing.ours > 1
    assert timing.low <= timing.high
