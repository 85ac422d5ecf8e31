from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.checkpoint import load_checkpoint, read_categories, save_checkpoint
from detection.errors import UserError
from detection.evaluation.coco import METRIC_NAMES
from eval_det import evaluate_checkpoint, name_apart


@pytest.fixture
def evaluate(compose_config: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Evaluates in this process, into `tmp_path / "out"`."""

    def evaluate(*overrides: str) -> dict[str, Any]:
        common = [f"output={tmp_path / 'out'}", "device=cpu", "evaluation.num_workers=0"]
        return evaluate_checkpoint(compose_config("eval", [*common, *overrides]))

    return evaluate


def custom(images: Path, annotations: Path) -> list[str]:
    return ["data=custom", f"data.val.images={images}", f"data.val.annotations={annotations}"]


def run_pycocotools(annotations: Path, detections: Path) -> list[float]:
    truth = COCO(str(annotations))
    evaluation = COCOeval(truth, truth.loadRes(str(detections)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def test_the_best_checkpoint_gives_the_metrics_of_its_run(
    trained: Path, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
):
    metrics = evaluate(f"checkpoint={trained / 'checkpoints' / 'best.pt'}")
    saved = json.loads((trained / "metrics.json").read_text())
    assert metrics == {key: value for key, value in saved.items() if key != "step"}
    for name in ("metrics.json", "detections.json", "visualizations/overview.jpg"):
        assert (tmp_path / "out" / name).exists()


def test_memory_of_a_batch_is_kept_for_the_next(
    trained: Path, evaluate: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    asked: list[bool] = []
    monkeypatch.setattr("detection.engine.memory.keep_freed_memory", lambda: asked.append(True))
    evaluate(f"checkpoint={trained / 'checkpoints' / 'best.pt'}", "device=cpu")
    assert asked == [True]


def test_the_weights_and_the_split_can_be_chosen(
    trained: Path, evaluate: Callable[..., dict[str, Any]]
):
    checkpoint = f"checkpoint={trained / 'checkpoints' / 'last.pt'}"
    averaged = evaluate(checkpoint)["loss"]
    assert evaluate(checkpoint, "weights=model")["loss"] != averaged
    assert evaluate(checkpoint, "split=train")["loss"] != averaged
    with pytest.raises(UserError, match="split=test: give one of train, val"):
        evaluate(checkpoint, "split=test")


def test_an_exported_file_gives_the_metrics_of_its_checkpoint(
    export_model: Callable[..., Path],
    evaluate: Callable[..., dict[str, Any]],
    detected_data: Callable[..., list[str]],
):
    file = export_model("ssd")
    with pytest.raises(UserError, match="names no data: give data=coco"):
        evaluate(f"checkpoint={file}")
    data = detected_data()
    found = evaluate(f"checkpoint={file}", *data)
    expected = evaluate(f"checkpoint={file.with_suffix('.pt')}", *data)
    assert expected["AP"] > 0.3
    for name in METRIC_NAMES:
        assert found[name] == pytest.approx(expected[name], abs=1e-3), name
    # Of another size than the network's: two libraries' resizing rounds apart, and random weights
    # tell, in the order of the detections more than in what is detected.
    data = detected_data((100, 80))
    found = evaluate(f"checkpoint={file}", *data)
    expected = evaluate(f"checkpoint={file.with_suffix('.pt')}", *data)
    assert expected["AP"] > 0.3 and found["AP"] == pytest.approx(expected["AP"], abs=0.1)
    assert found["AR100"] == pytest.approx(expected["AR100"], abs=0.02)


def test_plain_pycocotools_reproduces_the_metrics_on_real_images(
    real_data: Path,
    compose_config: Callable[..., Any],
    tiny_model: list[str],
    tmp_path: Path,
):
    """80 classes with gaps in their ids, a grey image, images without boxes."""
    from train_det import train

    files = [
        f"data.{split}.{key}"
        for split in ("train", "val")
        for key in (
            f"images={real_data / 'coco128' / 'images'}",
            f"annotations={real_data / 'coco128' / 'annotations' / f'instances_{split}.json'}",
        )
    ]
    # Short as it is, this training finds some objects, so that the metrics are not all zero.
    run = tmp_path / "run"
    overrides = ["data=custom", *files, "trainer.steps=25", "optimizer=adamw"]
    metrics = train(compose_config("train", [*tiny_model, *overrides, f"run_dir={run}"]))
    annotations = real_data / "coco128" / "annotations" / "instances_val.json"
    numbers = run_pycocotools(annotations, run / "detections.json")
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    assert [metrics[name] for name in names] == pytest.approx(numbers, abs=1e-6)
    assert max(numbers) > 0
    assert len(metrics["per_class"]) == 80


@pytest.mark.parametrize("name", ["bccd", "coco128"])
def test_ground_truth_as_detections_is_perfect(real_data: Path, name: str):
    from detection.data.coco import CocoIndex
    from detection.evaluation.coco import coco_results, evaluate_coco

    folder = real_data / name
    index = CocoIndex.load(
        images=folder / "images", annotations=folder / "annotations" / "instances_val.json"
    )
    results = [
        result
        for i, image_id in enumerate(index.image_ids)
        for result in coco_results(
            index.boxes(i), torch.ones(len(index.labels(i))), index.labels(i), image_id,
            index.categories,
        )
    ]  # fmt: skip
    metrics = evaluate_coco(index.ground_truth(), results)
    assert metrics["AP"] == pytest.approx(1.0, abs=1e-9)


def write_split(folder: Path, categories: list[dict[str, Any]], broken: bool = False) -> list[str]:
    (folder / "images").mkdir(parents=True)
    image = folder / "images" / "a.jpg"
    Image.new("RGB", (80, 60), (90, 120, 200)).save(image)
    records = [{"id": 5, "file_name": "a.jpg", "width": 80, "height": 60}]
    if broken:  # beside a whole one
        image.rename(folder / "images" / "b.jpg")
        image.write_bytes((folder / "images" / "b.jpg").read_bytes()[:300])
        records.append({**records[0], "id": 6, "file_name": "b.jpg"})
    content = {
        "images": records,
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": categories[0]["id"], "bbox": [5, 5, 30, 30]}
        ],
        "categories": categories,
    }
    (folder / "val.json").write_text(json.dumps(content))
    return custom(folder / "images", folder / "val.json")


def test_classes_are_matched_by_name(
    trained: Path, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
):
    """Data with fewer classes, other ids and another order than the checkpoint's."""
    data = write_split(tmp_path, [{"id": 70, "name": "cross"}, {"id": 71, "name": "ring"}])
    pictures = tmp_path / "out" / "visualizations"
    pictures.mkdir(parents=True)
    for name in ("7.jpg", "8.jpg", "mine.jpg"):
        (pictures / name).touch()
    (pictures / "pictures.txt").write_text("7.jpg\nmine.jpg\n")  # of an evaluation of other data
    metrics = evaluate(f"checkpoint={trained / 'checkpoints' / 'best.pt'}", *data)
    assert list(metrics["per_class"]) == ["cross", "ring"]
    names = ["5.jpg", "8.jpg", "mine.jpg", "overview.jpg", "pictures.txt"]
    assert sorted(path.name for path in pictures.iterdir()) == names
    assert (pictures / "pictures.txt").read_text() == "5.jpg\noverview.jpg\n"
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {result["category_id"] for result in results} <= {70, 71} and results


def test_classes_that_do_not_fit_are_named(
    trained: Path, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
):
    data = write_split(tmp_path, [{"id": 1, "name": "zebra"}])
    with pytest.raises(UserError, match=r"best\.pt: .*detects 5 classes, and none named 'zebra'"):
        evaluate(f"checkpoint={trained / 'checkpoints' / 'best.pt'}", *data)
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_is_named(
    trained: Path,
    evaluate: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    data = write_split(tmp_path, [{"id": 1, "name": "cross"}], broken=True)
    metrics = evaluate(f"checkpoint={trained / 'checkpoints' / 'best.pt'}", *data)
    assert "cannot read a.jpg" in capsys.readouterr().out
    assert metrics["AP"] == 0
    (tmp_path / "images" / "b.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of its 2 images can be read \(first: a\.jpg: "):
        evaluate(f"checkpoint={trained / 'checkpoints' / 'best.pt'}", *data)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("weights=emma", "weights=emma: give one of ema, model"),
        ("evaluation.batch_size=0", r"evaluation\.batch_size=0: give at least 1"),
        ("report_images=0", "report_images=0: give at least 1"),
    ],
)
def test_options_are_checked_before_files(
    evaluate: Callable[..., dict[str, Any]], override: str, answer: str
):
    with pytest.raises(UserError, match=answer):
        evaluate("checkpoint=none.pt", override)


def test_files_that_are_no_checkpoints(evaluate: Callable[..., dict[str, Any]], tmp_path: Path):
    with pytest.raises(UserError, match="checkpoint is not set"):
        evaluate()
    with pytest.raises(UserError, match="no such checkpoint file"):
        evaluate(f"checkpoint={tmp_path / 'none.pt'}")
    file = tmp_path / "file.pt"
    file.write_bytes(b"\x80not a checkpoint")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        evaluate(f"checkpoint={file}")
    torch.save({"weights": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="no checkpoint of this project"):
        evaluate(f"checkpoint={file}")


def test_a_truncated_checkpoint(
    trained: Path, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
):
    content = (trained / "checkpoints" / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged") as info:
        evaluate(f"checkpoint={tmp_path / 'cut.pt'}")
    assert "\n" not in str(info.value)


def save_with(trained: Path, path: Path, key: str, value: Any) -> None:
    """Save the run's best checkpoint with another value of a key of its config."""
    content = load_checkpoint(trained / "checkpoints" / "best.pt")
    *sections, name = key.split(".")
    section = content["config"]
    for own in sections:
        section = section[own]
    section[name] = value
    save_checkpoint(
        path,
        model=content["model"],
        config=content["config"],
        categories=read_categories(content),
    )


def test_weights_of_another_model(
    trained: Path, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
):
    save_with(trained, tmp_path / "other.pt", "model.backbone.num_experts", 3)
    with pytest.raises(UserError, match=r"other\.pt: .* of another model: .* is \(2, .*not \(3"):
        evaluate(f"checkpoint={tmp_path / 'other.pt'}")


def test_a_checkpoint_cannot_name_other_code(
    trained: Path, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
):
    save_with(trained, tmp_path / "evil.pt", "model._target_", "os.system")
    with pytest.raises(UserError, match=r"names 'os\.system'"):
        evaluate(f"checkpoint={tmp_path / 'evil.pt'}")


def test_a_report_and_a_comparison(
    trained: Path,
    evaluate: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    best = f"checkpoint={trained / 'checkpoints' / 'best.pt'}"
    last = f"compare={trained / 'checkpoints' / 'last.pt'}"
    metrics = evaluate(best, last, "report=true", "weights=model")
    printed = capsys.readouterr().out
    assert "last.pt less best.pt:" in printed and "report:" in printed
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(comparison["per_class"]) == list(metrics["per_class"])
    assert len(comparison["images"]) == 5
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert data["run"]["metrics"]["AP"] == pytest.approx(metrics["AP"], abs=1e-6)
    assert [run["name"] for run in (data["run"], data["comparison"]["other"])] == [
        "best.pt",
        "last.pt",
    ]
    assert data["training"] and all(image["source"] for image in data["images"])
    titles = [section["title"] for section in data["sections"]]
    assert titles == ["Experts by layer", "Routing by class", "Classes routed alike"]
    assert all(len(section["figures"]) > 0 for section in data["sections"])


def test_what_is_compared_is_read_before_anything_is_measured(
    trained: Path, evaluate: Callable[..., dict[str, Any]], tmp_path: Path
):
    with pytest.raises(UserError, match="no such checkpoint file"):
        evaluate(f"checkpoint={trained / 'checkpoints' / 'best.pt'}", "compare=none.pt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/checkpoints/best.pt"], ["a/best.pt"]),
        (["runs/a/model.onnx"], ["a/model.onnx"]),
        (["r/a/best.pt", "r/b/best.pt"], ["a/best.pt", "b/best.pt"]),
        (["r/a/best.pt", "r/a/last.pt"], ["best.pt", "last.pt"]),
        (["r/a/best.pt", "r/a/best.pt"], ["a/best.pt", "a/best.pt"]),
    ],
)
def test_names_tell_files_apart(paths: list[str], names: list[str], tmp_path: Path):
    assert name_apart([tmp_path / path for path in paths]) == names
