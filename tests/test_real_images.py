"""Training on photographs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detection.engine.run_folder import RunFolder
from train_det import train


@pytest.mark.slow
def test_a_light_retinanet_learns_coco128(
    real_data: Path, compose_config: Callable[..., Any], tmp_path: Path
):
    root, run = real_data / "coco128", tmp_path / "run"
    overrides = [
        "model=retinanet_mobilenet_v1_fpnlite",
        "model.width=0.5",
        "model.pyramid.channels=64",
        "model.input_size=192",
        "data=custom",
        *(f"data.{split}.images={root / 'images'}" for split in ("train", "val")),
        *(
            f"data.{split}.annotations={root / 'annotations' / f'instances_{split}.json'}"
            for split in ("train", "val")
        ),
        "data.augmentation.crop=none",
        "optimizer=adamw",
        "optimizer.lr=5e-3",
        "schedule.warmup_steps=10",
        "trainer.steps=50",
        "trainer.batch_size=8",
        "trainer.log_every=1",
        f"run_dir={run}",
    ]
    metrics = train(compose_config("train", overrides))
    assert len(metrics["per_class"]) == 80
    losses = [line["loss"] for line in RunFolder(run).read_metrics() if line["kind"] == "train"]
    assert len(losses) == 50 and all(math.isfinite(loss) for loss in losses)
    # 80 classes start near the loss of their rarity, and 50 steps take them little from it.
    assert sum(losses[-10:]) < 0.92 * sum(losses[:10])
