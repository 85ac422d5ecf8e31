from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from condconv.backbones import MobileNetV1
from detection.checkpoint import load_checkpoint, load_model
from detection.detector import Detector
from detection.errors import UserError
from detection.importers.tensorflow import (
    count_ignored,
    load_slim_mobilenet_v1,
    load_tensorflow_ssd,
    main,
    read_variables,
)
from detection.models.ssd import ssd_mobilenet_v1
from train_det import train

LEAVES = {
    "conv.weight": "weights",
    "norm.weight": "BatchNorm/gamma",
    "norm.bias": "BatchNorm/beta",
    "norm.running_mean": "BatchNorm/moving_mean",
    "norm.running_var": "BatchNorm/moving_variance",
}
CLASS_BIASES = "BoxPredictor_0/ClassPredictor/biases"


def randomize(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5 if name.endswith("running_var") else -0.5, 1, generator=generator)
    return network.eval()


def to_tensorflow(network: nn.Module, root: str = "MobilenetV1") -> dict[str, np.ndarray]:
    """A static network's state under TensorFlow's names and in its layouts."""
    variables = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        name = name.removeprefix("backbone.")
        if match := re.fullmatch(r"(box|class)_predictors\.(\d)\.(weight|bias)", name):
            kind = {"box": "BoxEncodingPredictor", "class": "ClassPredictor"}[match[1]]
            if match[1] == "box":  # tx, ty, tw, th -> ty, tx, th, tw
                tensor = tensor.view(-1, 4, *tensor.shape[1:])[:, [1, 0, 3, 2]].flatten(0, 1)
            name = f"BoxPredictor_{match[2]}/{kind}/{match[3]}".replace("bias", "biases")
            name = name.replace("weight", "weights")
        elif match := re.fullmatch(r"extras\.(\d)\.layers\.(reduce|expand)\.(.+)", name):
            kernel = "1_Conv2d_{}_1x1_{}" if match[2] == "reduce" else "2_Conv2d_{}_3x3_s2_{}"
            channels = network.state_dict()[f"extras.{match[1]}.layers.{match[2]}.norm.bias"]
            kernel = kernel.format(int(match[1]) + 2, len(channels))
            name = f"{root}/Conv2d_13_pointwise_{kernel}/{LEAVES[match[3]]}"
        elif match := re.fullmatch(r"blocks\.(\d+)\.layers\.(\w+)\.(.+)", name):
            name = f"{root}/Conv2d_{int(match[1]) + 1}_{match[2]}/{LEAVES[match[3]]}"
            if match[2] == "depthwise":
                name = name.replace("/weights", "/depthwise_weights")
        else:
            name = f"{root}/Conv2d_0/{LEAVES[name.removeprefix('stem.')]}"
        if tensor.dim() == 4:
            order = (2, 3, 0, 1) if name.endswith("depthwise_weights") else (2, 3, 1, 0)
            tensor = tensor.permute(order)
        variables[name] = tensor.numpy().copy()
    return variables


def make_ssd(num_classes: int = 2, width: float = 0.1, **arguments) -> nn.Module:
    return randomize(
        ssd_mobilenet_v1(num_classes=num_classes, width=width, input_size=64, **arguments)
    )


def ssd_variables(network: nn.Module) -> dict[str, np.ndarray]:
    return to_tensorflow(network, "FeatureExtractor/MobilenetV1")


@pytest.fixture(scope="module")
def variables() -> dict[str, np.ndarray]:
    return ssd_variables(make_ssd())


@pytest.mark.parametrize(
    ("num_classes", "width", "reduce_boxes"),
    [(1, 0.1, True), (3, 0.35, True), (90, 0.1, False), (2, 0.7, False)],
)
def test_ssd_is_rebuilt(num_classes: int, width: float, reduce_boxes: bool) -> None:
    network = make_ssd(num_classes, width, reduce_boxes_in_lowest_layer=reduce_boxes)
    arguments, state = load_tensorflow_ssd(ssd_variables(network), input_size=64)
    assert arguments["num_classes"] == num_classes
    rebuilt = ssd_mobilenet_v1(**arguments)
    rebuilt.load_state_dict(state)
    assert rebuilt.anchors.equal(network.anchors)
    for name, tensor in network.state_dict().items():
        assert state[name].equal(tensor), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"BoxPredictor_3/ClassPredictor/biases": None}, "BoxPredictor_3/.*/biases is missing"),
        ({"FeatureExtractor/extra": np.zeros(1)}, "FeatureExtractor/extra is left over"),
        (
            {"FeatureExtractor/MobilenetV1/Conv2d_0/weights": np.zeros((3, 3, 1, 16))},
            r"Conv2d_0/weights is \(3, 3, 1, 16\), not \(3, 3, 3, 16\)",
        ),
        ({CLASS_BIASES: None}, f"no variable {CLASS_BIASES}"),
        ({CLASS_BIASES: np.zeros(10)}, "3 boxes and 10 logits"),
        ({CLASS_BIASES: np.zeros(3)}, "3 boxes and 3 logits"),
        ({"BoxPredictor_0/BoxEncodingPredictor/biases": np.zeros(16)}, "4 boxes"),
    ],
)
def test_what_does_not_fit_is_named(variables: dict, change: dict, words: str) -> None:
    changed = {k: v for k, v in (variables | change).items() if v is not None}
    with pytest.raises(UserError, match=words) as raised:
        load_tensorflow_ssd(changed)
    assert "\n" not in str(raised.value)


def test_many_faults_are_counted(variables: dict) -> None:
    kept = {k: v for k, v in variables.items() if "_depthwise" not in k}
    with pytest.raises(UserError, match=f"and {13 * 5 - 5} more"):
        load_tensorflow_ssd(kept)


def test_leftovers_of_training_are_ignored_and_counted(variables: dict) -> None:
    extra = {
        f"{CLASS_BIASES}/Momentum": np.zeros(9),
        f"{CLASS_BIASES}/RMSProp": np.zeros(9),
        f"{CLASS_BIASES}/RMSProp_1": np.zeros(9),
        f"{CLASS_BIASES}/ExponentialMovingAverage": np.zeros(9),
        "global_step": np.zeros(()),
    }
    load_tensorflow_ssd(variables | extra)
    counts = {"optimizer slots": 3, "moving averages": 1, "training counters": 1}
    assert count_ignored(variables | extra) == counts
    assert not count_ignored(variables)


@pytest.mark.parametrize("input_size", [0, -300])
def test_impossible_input_size(variables: dict, input_size: int) -> None:
    with pytest.raises(UserError, match="input size"):
        load_tensorflow_ssd(variables, input_size=input_size)


def test_slim_backbone_is_rebuilt() -> None:
    backbone = randomize(MobileNetV1(width=0.5))
    variables = to_tensorflow(backbone)
    variables["MobilenetV1/Logits/Conv2d_1c_1x1/weights"] = np.zeros((1, 1, 512, 1001))
    variables["global_step"] = np.zeros(())
    state = load_slim_mobilenet_v1(variables)
    assert state.keys() == backbone.state_dict().keys()
    for name, tensor in backbone.state_dict().items():
        assert state[name].equal(tensor), name


def test_slim_with_fewer_channels_than_a_detector_is_refused() -> None:
    variables = to_tensorflow(MobileNetV1(width=0.25))
    variables["MobilenetV1/Conv2d_0/weights"] = np.zeros((3, 3, 3, 8))
    with pytest.raises(UserError, match=r"Conv2d_0/weights is \(3, 3, 3, 8\), not"):
        load_slim_mobilenet_v1(variables)


@pytest.mark.parametrize("form", ["{}", "{}:0", "var/{}", "var/{}:0"])
def test_npz_names(tmp_path: Path, form: str) -> None:
    beside = {"image": np.ones(2)} if form.startswith("var/") else {}
    np.savez(tmp_path / "a.npz", **{form.format("a/b"): np.arange(3)}, **beside)
    variables = read_variables(tmp_path / "a.npz")
    assert {name: value.tolist() for name, value in variables.items()} == {"a/b": [0, 1, 2]}


def test_checkpoint_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With moving averages, an odd input size and COCO's class count, through the command line."""
    network = make_ssd(90)
    average = f"{CLASS_BIASES}/ExponentialMovingAverage"
    extra = {average: np.full(3 * 91, 2.0), "global_step": np.zeros(())}
    np.savez(tmp_path / "ssd.npz", **ssd_variables(network), **extra)
    output = tmp_path / "ssd.pt"
    main([str(tmp_path / "ssd.npz"), "--output", str(output), "--input-size", "97"])
    printed = capsys.readouterr().out
    assert "90 classes" in printed and "1 moving averages" in printed
    assert "1 training counters" in printed and "no names" not in printed

    checkpoint = load_checkpoint(output)
    assert checkpoint["categories"][12] == [13, "stop sign"]
    assert checkpoint["model"]["class_predictors.0.bias"].equal(network.class_predictors[0].bias)
    assert checkpoint["ema"]["class_predictors.0.bias"].eq(2).all()
    assert load_model(checkpoint).network.input_size == 97
    (detections,) = Detector.from_checkpoint(output).predict([Image.new("RGB", (60, 40))])
    assert len(detections.scores) > 0


def test_checkpoint_file_with_categories(
    tmp_path: Path, variables: dict, capsys: pytest.CaptureFixture
) -> None:
    np.savez(tmp_path / "ssd.npz", **variables)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    arguments = [str(tmp_path / "ssd.npz"), "--output", str(tmp_path / "ssd.pt")]
    main(arguments)
    assert "no names" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "ssd.pt")["ema"] is None
    main([*arguments, "--categories", str(tmp_path / "names.txt")])
    assert "no names" not in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "ssd.pt")["categories"] == [[1, "cat"], [2, "dog"]]


def test_classes_without_a_category_are_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    network = make_ssd(num_classes=5)
    np.savez(tmp_path / "ssd.npz", **ssd_variables(network))
    categories = [{"id": 4, "name": "dog"}, {"id": 2, "name": "cat"}]
    (tmp_path / "val.json").write_text(json.dumps({"categories": categories}))
    output = tmp_path / "ssd.pt"
    main([str(tmp_path / "ssd.npz"), "--output", str(output), "--input-size", "64",
          "--categories", str(tmp_path / "val.json")])  # fmt: skip
    assert "3 classes that have no category: left out" in capsys.readouterr().out
    checkpoint = load_checkpoint(output)
    assert checkpoint["categories"] == [[2, "cat"], [4, "dog"]]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = load_model(checkpoint).network.eval()(images).logits
        expected = network(images).logits[..., [0, 2, 4]]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_an_imported_detector_is_finetuned(
    tmp_path: Path, variables: dict, compose_config: Callable[..., Any], tiny_data: list[str],
    num_experts: int,
) -> None:  # fmt: skip
    """On other classes, as it is or made conditional."""
    np.savez(tmp_path / "ssd.npz", **variables)
    (tmp_path / "names.txt").write_text("ring\nlamp\n")
    output = tmp_path / "ssd.pt"
    main([str(tmp_path / "ssd.npz"), "--output", str(output), "--input-size", "64",
          "--categories", str(tmp_path / "names.txt")])  # fmt: skip
    overrides = [
        "experiment=finetune", f"model.weights={output}",
        f"+model.backbone.num_experts={num_experts}",
        "data=shapes", *tiny_data, "trainer.steps=2", "trainer.batch_size=4",
        "trainer.num_workers=0", "evaluation.num_workers=0", f"run_dir={tmp_path / 'run'}",
        "trainer.ema_decay=null", "optimizer.lr=0", "trainer.device=cpu", "logger=none",
    ]  # fmt: skip
    train(compose_config("train", overrides))
    log = (tmp_path / "run" / "train.log").read_text()
    assert "classes it keeps (1): ring" in log
    assert "classes of it that the data lacks (1): lamp" in log

    before = load_model(load_checkpoint(output)).network.eval()
    trained = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    after = load_model(trained).network.eval()
    assert ("backbone.blocks.12.router.linear.weight" in trained["model"]) == (num_experts > 1)
    slot = 1 + [name for _, name in trained["categories"]].index("ring")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        start, end = before(images), after(images)
    # Steps of size 0 leave what was imported, but for the batch norm that follows the backbone.
    places = slice(sum(start.level_sizes[:2]))
    for own, expected in (
        (end.deltas[:, places], start.deltas[:, places]),
        (end.logits[:, places, slot], start.logits[:, places, 1]),
    ):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["absent.npz", "broken.npz", "absent.ckpt", "array.npz", "empty.npz", "single.npz"],
)
def test_unreadable_source_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.npz").write_text("no archive")
    (tmp_path / "empty.npz").touch()
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    np.savez(tmp_path / "array.npz", a=np.array([{}]))  # a pickled object
    with pytest.raises(SystemExit) as raised:
        main([str(tmp_path / name), "--output", str(tmp_path / "x.pt")])
    message = str(raised.value.code)
    assert message.startswith("error: ") and name in message and "\n" not in message
    assert not (tmp_path / "x.pt").exists()


def test_checkpoint_without_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.ckpt.index").touch()
    monkeypatch.setitem(__import__("sys").modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"install tensorflow, or give an \.npz"):
        read_variables(tmp_path / "model.ckpt")


@pytest.mark.parametrize("suffix", ["", ".index"])
def test_tensorflow_checkpoint(tmp_path: Path, suffix: str) -> None:
    tf = pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    saver = tf.compat.v1.train.Saver({"a/weights": tf.Variable([1.0, 2.0])})
    path = saver.save(None, str(tmp_path / "model.ckpt"))
    assert read_variables(path + suffix)["a/weights"].tolist() == [1.0, 2.0]
    Path(f"{path}.index").write_text("no checkpoint")
    with pytest.raises(UserError, match="cannot read"):
        read_variables(path)
