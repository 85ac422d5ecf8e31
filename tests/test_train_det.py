from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.checkpoint import load_checkpoint, save_checkpoint
from detection.engine.processes import Processes
from detection.engine.run_folder import RunFolder
from detection.errors import UserError
from detection.losses import FocalCriterion


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return RunFolder(folder).read_metrics()


def list_checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_run_folder_is_whole(run: Callable[..., Path]):
    folder = run("trainer.steps=4", "trainer.evaluate_every=2", "logger=tensorboard")
    for name in ("config.yaml", "train.log", "metrics.jsonl", "metrics.json", "detections.json"):
        assert (folder / name).stat().st_size > 0, name
    assert list_checkpoints(folder) == ["best.pt", "last.pt", "step_00000002.pt"]
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "visualizations" / "overview.jpg").exists()

    lines = read_lines(folder)
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("train", 1), ("train", 2), ("evaluation", 2)),
        *(("train", 3), ("train", 4), ("evaluation", 4)),
    ]
    assert {"AP", "AP50", "AR100", "loss", "loss_classification"} <= lines[-1].keys()
    assert {"loss", "learning_rate", "images_per_second"} <= lines[0].keys()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["per_class"]) == 5
    content = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert content["step"] == 4 and len(content["categories"]) == 5


def test_training_learns(run: Callable[..., Path]):
    folder = run(
        "trainer.steps=40",
        "data.num_train=2",
        "data.augmentation.crop=none",
        "optimizer=adamw",
        "optimizer.lr=5e-3",
        "schedule=constant",
        "schedule.warmup_steps=5",
    )
    losses = [line["loss"] for line in read_lines(folder) if line["kind"] == "train"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_workers_change_nothing(
    run: Callable[..., Path], assert_equal_weights: Callable[[Path, Path], None]
):
    common = ("trainer.steps=3", "data.augmentation.photometric=0.5")
    alone = run(*common, name="0")
    for num_workers in (1, 2):
        folder = run(*common, f"trainer.num_workers={num_workers}", name=str(num_workers))
        assert_equal_weights(alone, folder)


def test_a_cache_of_images_changes_nothing(
    run: Callable[..., Path], tmp_path: Path, assert_equal_weights: Callable[[Path, Path], None]
):
    """Neither empty nor full, nor with workers, nor when a run goes on with another."""
    common = ("data.shrink=1", "data.augmentation.photometric=0.5", "schedule.steps=8")
    whole = run(*common, "trainer.steps=8", name="whole")  # 10 images, 4 a step
    disk = ("trainer.image_cache=disk", f"trainer.image_cache_folder={tmp_path / 'kept'}")
    run(*common, *disk, "trainer.steps=4", name="parts")
    ram = ("trainer.image_cache=ram", "trainer.image_cache_folder=null", "trainer.num_workers=1")
    parts = run("resume=true", *ram, "trainer.steps=8", name="parts")
    assert_equal_weights(whole, parts)


def test_shrunk_images_are_others(
    run: Callable[..., Path], load_weights: Callable[[Path], dict[str, torch.Tensor]]
):
    weights = [
        load_weights(run("trainer.steps=1", f"data.shrink={shrink}", name=shrink))
        for shrink in ("null", "2", "0.5")
    ]
    whole, large, small = (next(iter(own.values())) for own in weights)
    assert whole.equal(large) and not whole.equal(small)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.shrink=0", "data.shrink=0: give how many times"),
        ("trainer.image_cache=memory", "trainer.image_cache=memory: give ram, disk or null"),
        ("trainer.image_cache_folder=x", "trainer.image_cache_folder is for"),
        (
            "trainer.image_cache=disk trainer.image_cache_folder=/dev/null/x",
            "cannot be written",
        ),
    ],
)
def test_wrong_reading(run: Callable[..., Path], tmp_path: Path, override: str, line: str):
    with pytest.raises(UserError, match=line):
        run("trainer.steps=1", *override.split())
    assert not (tmp_path / "run").exists()


def test_micro_batches_change_nothing_but_rounding(
    run: Callable[..., Path], load_weights: Callable[[Path], dict[str, torch.Tensor]]
):
    """With batch norm in inference mode a step is the same however its batch is cut."""
    common = ("trainer.steps=3", "trainer.freeze_batch_norm=true")
    whole, cut = run(*common, name="1"), run(*common, "trainer.num_micro_batches=2", name="2")
    for a, b in zip(read_lines(whole)[:3], read_lines(cut)[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    second = load_weights(cut)
    for name, value in load_weights(whole).items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5)


def test_resumed_equals_uninterrupted(
    run: Callable[..., Path], assert_equal_weights: Callable[[Path, Path], None]
):
    common = ("trainer.evaluate_every=3", "schedule.steps=6", "trainer.checkpoint_every=2")
    whole = run(*common, "trainer.steps=6", name="whole")
    # Stops in the middle of an epoch (10 images, 4 a step).
    run(*common, "trainer.steps=4", name="parts")
    parts = run("resume=true", "trainer.steps=6", name="parts")
    assert_equal_weights(whole, parts)
    steps = [(line["kind"], line["step"]) for line in read_lines(parts)]
    assert steps == sorted(set(steps), key=lambda pair: (pair[1], pair[0] != "train"))


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        (["trainer.steps=4"], [1.0, 0.5, 0.5, (1 - 0.5**0.5) / 2]),
        (["schedule=constant", "schedule.warmup_steps=0", "trainer.steps=3"], [1.0, 0.5, 1.0]),
    ],
    ids=["longer", "another"],
)
def test_a_schedule_given_at_resume_is_that_of_the_first_step(
    run: Callable[..., Path], overrides: list[str], rates: list[float]
):
    run("trainer.steps=2", "schedule.warmup_steps=0", "optimizer=sgd", "optimizer.lr=0.01")
    folder = run("resume=true", *overrides)
    lines = [line for line in read_lines(folder) if line["kind"] == "train"]
    assert [line["learning_rate"] for line in lines] == pytest.approx([r * 0.01 for r in rates])


@pytest.mark.parametrize("wish", [True, False])
def test_memory_is_kept_where_asked(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, wish: bool
):
    asked: list[bool] = []
    monkeypatch.setattr("detection.engine.run.keep_freed_memory", lambda: asked.append(True))
    run("trainer.steps=1", f"trainer.keep_memory={str(wish).lower()}")
    assert asked == [True] * wish


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def zero(path: Path) -> None:
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(500) + content[half + 500 :])


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    assert_equal_weights: Callable[[Path, Path], None],
):
    common = ("trainer.checkpoint_every=1", "trainer.keep_last=3", "schedule.steps=6")
    whole = run(*common, "trainer.steps=6", name="whole")
    folder = run(*common, "trainer.steps=4", name="stopped")
    cut(folder / "checkpoints" / "last.pt")
    zero(folder / "checkpoints" / "step_00000003.pt")
    run("resume=true", "trainer.steps=6", name="stopped")
    printed = capsys.readouterr().out
    assert re.search(r"going on from \S*step_00000002.pt, step 2\n", printed)
    assert printed.count("is damaged") == 2
    assert_equal_weights(whole, folder)
    steps = [(line["kind"], line["step"]) for line in read_lines(folder)]
    assert steps == sorted(set(steps), key=lambda pair: (pair[1], pair[0] != "train"))


@pytest.mark.parametrize(
    ("harms", "step"),
    [
        ([], 4),
        ([cut], 3),
        ([zero], 3),
        ([Path.unlink], 3),  # killed between the two renames
        ([cut, zero], 2),
        ([cut, cut, cut], 1),
        ([cut, cut, cut, cut], None),
    ],
)
def test_the_newest_whole_checkpoint_is_taken(
    tmp_path: Path, harms: list[Callable[[Path], None]], step: int | None
):
    folder = RunFolder(tmp_path)
    folder.last.parent.mkdir()
    files = [folder.last, folder.numbered(3), folder.numbered(2), folder.best]
    for number, file in zip((4, 3, 2, 1), files, strict=True):
        save_checkpoint(
            file, model={"weight": torch.rand(999)}, config={}, categories=[], step=number
        )
    for harm, file in zip(harms, files, strict=False):
        harm(file)
    alone = Processes(0, 1, torch.device("cpu"))
    if step is None:
        with pytest.raises(UserError, match="holds no whole checkpoint"):
            folder.load_newest(alone)
    else:
        content = folder.load_newest(alone)
        assert content is not None and content["step"] == step
    assert len(list(folder.last.parent.glob("*.damaged"))) == len(harms) - (Path.unlink in harms)


@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_newest_checkpoints_and_the_best_are_kept(run: Callable[..., Path], keep_last: int):
    folder = run(
        "trainer.steps=6",
        "trainer.evaluate_every=5",
        "trainer.checkpoint_every=1",
        f"trainer.keep_last={keep_last}",
    )
    earlier = {"step_00000004.pt": 4, "step_00000005.pt": 5} if keep_last == 3 else {}
    assert list_checkpoints(folder) == ["best.pt", "last.pt", *earlier]
    for name, step in {"last.pt": 6, **earlier}.items():
        assert load_checkpoint(folder / "checkpoints" / name)["step"] == step
    assert load_checkpoint(folder / "checkpoints" / "best.pt")["step"] in (5, 6)


def test_a_full_disk_stops_a_run_that_then_goes_on(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    assert_equal_weights: Callable[[Path, Path], None],
):
    common = ("trainer.steps=5", "trainer.checkpoint_every=1", "trainer.keep_last=1")
    whole = run(*common, name="whole")
    save, num_saves = torch.save, 0

    def fill_the_disk(content: Any, file: Any) -> None:
        nonlocal num_saves
        num_saves += 1
        if num_saves == 4:
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file)

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(UserError, match=r"cannot write .*last\.pt: No space left.*untouched"):
        run(*common, name="full")
    folder = whole.with_name("full")
    assert list_checkpoints(folder) == ["last.pt"]
    assert load_checkpoint(folder / "checkpoints" / "last.pt")["step"] == 3
    monkeypatch.undo()
    run("resume=true", name="full")
    assert_equal_weights(whole, folder)


@pytest.fixture
def hold_lock() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts a process that has the lock of a run folder, without the seconds that torch takes."""
    processes: list[subprocess.Popen[str]] = []
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "file.truncate(0); file.write('process 7 on host'); file.flush()\n"
        "print(flush=True); sys.stdin.read()"
    )

    def hold(folder: Path) -> subprocess.Popen[str]:
        folder.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder / ".lock")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused(
    run: Callable[..., Path], tmp_path: Path, hold_lock: Callable[[Path], subprocess.Popen[str]]
):
    message = "run is in use by process 7 on host: stop that run"
    holder = hold_lock(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        run("trainer.steps=1")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    holder.kill()
    holder.wait()
    folder = run("trainer.steps=1")
    hold_lock(folder)
    with pytest.raises(UserError, match=message):
        run("resume=true", "trainer.steps=2")
    assert load_checkpoint(folder / "checkpoints" / "last.pt")["step"] == 1


def test_a_loss_that_is_not_finite_stops_the_run(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    forward, calls = FocalCriterion.forward, 0

    def poisoned(self: Any, predictions: Any, targets: Any) -> Any:
        nonlocal calls
        calls += 1
        losses = forward(self, predictions, targets)
        if calls == 3:
            losses.sums["localization"] *= float("nan")
        return losses

    monkeypatch.setattr(FocalCriterion, "forward", poisoned)
    with pytest.raises(UserError, match=r"step 3: .*localization nan.* on the images \[\d") as info:
        run("trainer.steps=5", "trainer.checkpoint_every=1")
    assert "\n" not in str(info.value) and "last good step" not in str(info.value)
    content = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert content["step"] == 2
    assert all(value.isfinite().all() for value in content["model"].values())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_not_finite_stops_the_run(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str
):
    """At a finite loss; in fp16 it is an overflow, and the step is left out."""
    forward, calls = FocalCriterion.forward, 0

    def poisoned(self: Any, predictions: Any, targets: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            predictions.deltas.register_hook(lambda gradient: gradient * float("inf"))
        return forward(self, predictions, targets)

    monkeypatch.setattr(FocalCriterion, "forward", poisoned)
    options = ["trainer.steps=3", "trainer.checkpoint_every=1", f"trainer.precision={precision}"]
    if precision == "fp16":
        log = (run(*options) / "train.log").read_text()
        assert "step 3: its gradient overflowed" in log
        assert re.search(r"[1-3] of 3 steps were left out", log)
    else:
        with pytest.raises(UserError, match=r"step 3: .*, gradient norm (nan|inf)\) on the images"):
            run(*options)
    content = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert content["step"] == (3 if precision == "fp16" else 2)
    assert all(value.isfinite().all() for value in content["model"].values())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_replaced_and_counted(
    run: Callable[..., Path], tmp_path: Path, num_workers: int
):
    run("trainer.steps=1", f"data.root={tmp_path / 'shapes'}", name="first")
    (source,) = (tmp_path / "shapes").iterdir()
    images = [f"data.{split}.images={tmp_path / split}" for split in ("train", "val")]
    files = [
        f"data.{split}.annotations={source / 'annotations' / f'instances_{split}.json'}"
        for split in ("train", "val")
    ]
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number, file in enumerate(sorted((source / "images" / split).iterdir())):
            content = file.read_bytes()
            (tmp_path / split / file.name).write_bytes(content[:200] if number == 0 else content)
    options = [f"{section}.num_workers={num_workers}" for section in ("trainer", "evaluation")]
    data = ["data=custom", *images, *files]
    options.append("data.augmentation.max_boxes=1")
    folder = run("trainer.steps=3", *options, data=data, name="broken")
    log = (folder / "train.log").read_text()
    assert "another image takes its place" in log
    assert "1 images could not be read" in log
    assert "evaluated as an image without detections" in log
    found = json.loads((folder / "detections.json").read_text())
    assert len({result["image_id"] for result in found}) == 4
    assert "images have more than max_boxes=1 boxes" in log


def test_early_stopping(run: Callable[..., Path]):
    folder = run(
        "trainer.steps=20",
        "trainer.evaluate_every=1",
        "trainer.early_stopping=2",
        "optimizer.lr=1e-9",
    )
    evaluations = [line for line in read_lines(folder) if line["kind"] == "evaluation"]
    assert len(evaluations) < 20
    assert "no better AP in 2 evaluations" in (folder / "train.log").read_text()
    run("resume=true")
    assert read_lines(folder)[-1] == evaluations[-1]


def test_a_split_without_boxes_ends_a_run_as_any_other(run: Callable[..., Path], tmp_path: Path):
    """AP is -1 there."""
    run("trainer.steps=1", f"data.root={tmp_path / 'shapes'}", name="first")
    (source,) = (tmp_path / "shapes").iterdir()
    content = json.loads((source / "annotations" / "instances_val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps({**content, "annotations": []}))
    data = [
        "data=custom",
        f"data.train.images={source / 'images' / 'train'}",
        f"data.train.annotations={source / 'annotations' / 'instances_train.json'}",
        f"data.val.images={source / 'images' / 'val'}",
        f"data.val.annotations={tmp_path / 'val.json'}",
    ]
    folder = run("trainer.steps=1", data=data, name="empty")
    assert json.loads((folder / "metrics.json").read_text())["AP"] == -1
    for record in content["annotations"]:
        record["category_id"] = str(record["category_id"])
    (tmp_path / "train.json").write_text(json.dumps(content))
    data += [f"data.train.annotations={tmp_path / 'train.json'}"]
    data += [f"data.train.images={source / 'images' / 'val'}"]
    with pytest.raises(UserError, match=r"no annotation is left to train on: .* is a text"):
        run("trainer.steps=1", data=data, name="text")
    assert list_checkpoints(folder) == ["best.pt", "last.pt"]


def test_an_overflow_leaves_no_trace_in_the_optimizer(run: Callable[..., Path]):
    options = ["trainer.precision=fp16", "optimizer=sgd", "optimizer.lr=1e-3"]
    folder = run("trainer.steps=1", "model.criterion.classification_weight=1e6", *options)
    content = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert content["scaler"]["scale"] == 2.0**15
    assert content["optimizer"]["state"] == {}


@pytest.mark.parametrize(
    "overrides",
    [
        # torch leaves parts of bf16 gradients unset where a padded convolution has a 1 x 1 map.
        ["trainer.precision=bf16", "model.input_size=300"],
        [
            *("trainer.channels_last=false", "trainer.ema_decay=null", "model.num_experts=1"),
            *("data.augmentation.zoom_out=0.5", "trainer.gradient_clip_norm=1"),
        ],
    ],
)
def test_options_train(run: Callable[..., Path], overrides: list[str]):
    losses = [line["loss"] for line in read_lines(run("trainer.steps=2", *overrides))]
    assert all(0 < loss < 100 for loss in losses)


def test_a_run_is_not_overwritten(run: Callable[..., Path]):
    run("trainer.steps=1")
    with pytest.raises(UserError, match="already holds a run"):
        run("trainer.steps=1")


@pytest.mark.parametrize("override", ["model.width=0.5", "data.num_train=11", "optimizer.lr=1"])
def test_resume_refuses_what_changes_the_weights(run: Callable[..., Path], override: str):
    run("trainer.steps=1")
    with pytest.raises(UserError, match=f"cannot change {override.split('.')[0]}"):
        run("resume=true", override)


def test_resume_refuses_other_classes_and_a_new_average(run: Callable[..., Path]):
    path = run("trainer.steps=1", "trainer.ema_decay=null") / "checkpoints" / "last.pt"
    with pytest.raises(UserError, match=r"trainer\.ema_decay: the run has no moving average"):
        run("resume=true", "trainer.ema_decay=0.9")
    content = load_checkpoint(path)
    first, second = content["categories"][:2]
    first[1], second[1] = second[1], first[1]
    torch.save(content, path)
    names = f"has the category 1 '{second[1]}' where the run has the category 1 '{first[1]}'"
    with pytest.raises(UserError, match=names):
        run("resume=true", "trainer.ema_decay=null")


def test_nothing_is_written_where_the_data_is_wrong(run: Callable[..., Path], tmp_path: Path):
    with pytest.raises(UserError, match=r"model\.num_classes=3, but the data has 5 classes"):
        run("model.num_classes=3")
    with pytest.raises(UserError, match="cannot be shared"):
        run("trainer.num_micro_batches=3")
    with pytest.raises(UserError, match="sync_batch_norm=true works on GPUs only"):
        run("trainer.sync_batch_norm=true")
    for word, answer in (
        ("evaluation.batch_size=0", r"evaluation\.batch_size=0: give at least 1"),
        ("evaluation.backend=typo", "backend"),
        ("+schedule.foo=1", "schedule: .*unexpected keyword argument 'foo'"),
        ("schedule.steps=null", "schedule: "),
        ("seed=null", "seed=None: give a whole number"),
        ("seed=99999999999999999999", "below 2"),
        ("trainer.device=mps", "device=mps: give auto, cpu, cuda"),
        ("data.augmentation.multi_scale=96", "multi_scale: "),
        ("data.augmentation.crop_areas=[0.5]", r"crop_areas=\[0\.5\]: it is \[least,most\]"),
        ("optimizer.betas=[0.9]", "AdamW: "),
        ("model.preprocess.mean=[0,0]", "one for each of 3 channels, not"),
    ):
        with pytest.raises(UserError, match=answer):
            run(word, "optimizer=adamw")
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_begin_leaves_its_folder_free(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb"):
        run("trainer.steps=1", "logger=wandb")
    assert (run("trainer.steps=1") / "metrics.json").exists()


def test_a_damaged_run_folder_is_one_line(run: Callable[..., Path]):
    folder = run("trainer.steps=1")
    (folder / "detections.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*detections\.json.* evaluate its best\.pt"):
        run("resume=true")
    for text in ("", "a: [", "a: 1"):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"cannot read .*config\.yaml"):
            run("resume=true")


def test_a_network_that_diverged_is_one_line(run: Callable[..., Path]):
    with pytest.raises(UserError, match=r"loss on these images is nan: .*lower optimizer\.lr"):
        run("trainer.steps=1", "optimizer=sgd", "optimizer.lr=1e38", "schedule.warmup_steps=0")


def test_another_seed_gives_other_weights(
    run: Callable[..., Path], assert_equal_weights: Callable[[Path, Path], None]
):
    """So the tests of equal weights above can fail."""
    a, b = run("trainer.steps=2", name="a"), run("trainer.steps=2", "seed=1", name="b")
    with pytest.raises(AssertionError):
        assert_equal_weights(a, b)


def test_the_final_figures_come_from_the_reference(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("hotcoco", reason="hotcoco is not installed")
    from detection.evaluation.coco import CocoEvaluator

    backends = []
    evaluate = CocoEvaluator.evaluate

    def recorded(self: CocoEvaluator, results: list[dict[str, Any]]) -> dict[str, Any]:
        backends.append(self.backend)
        return {**evaluate(self, results), "AR1": float(len(backends))}

    monkeypatch.setattr(CocoEvaluator, "evaluate", recorded)
    folder = run("trainer.steps=1")
    assert backends == ["hotcoco", "pycocotools"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["AR1"], metrics["step"]) == (2.0, 1)
