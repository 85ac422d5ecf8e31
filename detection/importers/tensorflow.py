"""Weights of the TensorFlow Object Detection API's SSD MobileNetV1, and of TF-slim's MobileNetV1.

`python -m detection.importers.tensorflow CHECKPOINT_OR_NPZ --output FILE.pt` writes a checkpoint
that detects what the TensorFlow model detects, on the same input: images are resized a little
otherwise, see docs/paper.md. TensorFlow's own checkpoints need tensorflow installed; an .npz file
of the variables by name does not.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from detection.errors import UserError

# What needs torch is imported where it is used: --help and a wrong path answer at once.
if TYPE_CHECKING:
    from torch import Tensor, nn

    from detection.models.ssd import SSD

AVERAGE_SUFFIX = "/ExponentialMovingAverage"
# What a training checkpoint holds beside the weights. All else must find its place.
IGNORED = {
    "optimizer slots": re.compile(r".+/(Momentum|RMSProp(_\d)?|Adam(_\d)?)"),
    "moving averages": re.compile(rf".+{AVERAGE_SUFFIX}"),
    "training counters": re.compile(r"global_step|beta[12]_power"),
}
SLIM_CLASSIFIER = re.compile(r"MobilenetV1/Logits/.+")

# Our parameter -> TensorFlow's variable, within a layer.
VARIABLES = {
    "conv.weight": "weights",
    "norm.weight": "BatchNorm/gamma",
    "norm.bias": "BatchNorm/beta",
    "norm.running_mean": "BatchNorm/moving_mean",
    "norm.running_var": "BatchNorm/moving_variance",
    "weight": "weights",
    "bias": "biases",
}


def load_tensorflow_ssd(
    variables: Mapping[str, np.ndarray], *, input_size: int = 300
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An SSD MobileNetV1 that the TensorFlow Object Detection API built.

    Width, number of classes and number of anchors follow from the variables; the input size does
    not. Variables of the kinds in `IGNORED` are left out.

    Args:
        variables: by name, in TensorFlow's layouts.
        input_size: side of the square input in pixels.

    Returns:
        The arguments of `ssd_mobilenet_v1`, and its state dict.

    Raises:
        UserError: naming what is missing, left over, or of another shape.
    """
    from detection.models.ssd import ssd_mobilenet_v1

    if input_size < 1:
        raise UserError(f"the input size must be positive, not {input_size}")
    num_anchors = _require(variables, "BoxPredictor_0/BoxEncodingPredictor/biases").size // 4
    num_logits = _require(variables, "BoxPredictor_0/ClassPredictor/biases").size
    if num_anchors not in (3, 6) or num_logits % num_anchors or num_logits < 2 * num_anchors:
        raise UserError(
            f"BoxPredictor_0 gives {num_anchors} boxes and {num_logits} logits a cell: "
            "only SSD MobileNetV1 with 3 or 6 anchors a cell there can be imported"
        )
    arguments = {
        "num_classes": num_logits // num_anchors - 1,
        "width": _derive_width(variables, "FeatureExtractor/MobilenetV1"),
        "num_experts": 1,
        "input_size": input_size,
        "reduce_boxes_in_lowest_layer": num_anchors == 3,
    }
    network = ssd_mobilenet_v1(**arguments)
    state = _convert(variables, network, _ssd_scopes(network), ignored=IGNORED.values())
    return arguments, state


def load_slim_mobilenet_v1(variables: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """State dict of a static `condconv.backbones.MobileNetV1` from TF-slim's classifier.

    Padding, batch norm epsilon and normalisation (x * 2 / 255 - 1) are the same there and here, so
    the function is too. At widths below 0.5 TF-slim's first layers have less than the 16 channels
    that detectors have at least: such a checkpoint is refused for its shapes. Variables of the
    classifier and of the kinds in `IGNORED` are left out.

    Raises:
        UserError: naming what is missing, left over, or of another shape.
    """
    from condconv.backbones import MobileNetV1

    backbone = MobileNetV1(width=_derive_width(variables, "MobilenetV1"))
    scopes = _mobilenet_scopes("MobilenetV1")
    return _convert(variables, backbone, scopes, ignored=[*IGNORED.values(), SLIM_CLASSIFIER])


def read_variables(path: str | Path) -> dict[str, np.ndarray]:
    """Variables by name, of an .npz file or of a TensorFlow checkpoint.

    In an .npz file "name:0" means "name", and where keys begin with "var/" only those are read.

    Raises:
        UserError: where the file cannot be read, or needs a tensorflow that is not installed.
    """
    path = Path(path)
    if path.suffix == ".npz":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            with np.load(path) as file:
                prefix = "var/" if any(name.startswith("var/") for name in file.files) else ""
                return {
                    name.removeprefix(prefix).removesuffix(":0"): file[name]
                    for name in file.files
                    if name.startswith(prefix)
                }
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        except TypeError as error:  # of an array, which is no context
            raise UserError(f"{path} holds one array, and not arrays by name") from error

    checkpoint = str(path).removesuffix(".index")
    if not Path(f"{checkpoint}.index").is_file():
        raise UserError(f"{path} is no .npz file and no checkpoint: there is no {checkpoint}.index")
    try:
        from tensorflow import errors, train  # pyright: ignore[reportMissingModuleSource]
    except ImportError as error:
        raise UserError(
            f"{path} is a TensorFlow checkpoint: install tensorflow, or give an .npz file of its "
            "variables, made where tensorflow is installed"
        ) from error
    try:
        reader = train.load_checkpoint(checkpoint)
        return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except errors.OpError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def count_ignored(names: Iterable[str]) -> Counter[str]:
    """How many variables there are of each kind in `IGNORED`."""
    return Counter(
        kind for name in names for kind, pattern in IGNORED.items() if pattern.fullmatch(name)
    )


def import_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    input_size: int = 300,
    categories: str | Path | None = None,
) -> list[str]:
    """Turn a TensorFlow SSD MobileNetV1 into a checkpoint of this project.

    Moving averages of the weights, where the source has them, become the checkpoint's. Classes
    that `categories` leaves out are cut off: a data set's own annotations thus give a checkpoint
    that can be evaluated and trained on it.

    Args:
        source: as `read_variables` takes it.
        output: the file to write.
        input_size: side of the square input in pixels.
        categories: as `read_categories` takes it; None takes `default_categories`.

    Returns:
        What was made and what was left out, a printable line each.

    Raises:
        UserError: where something cannot be read, fitted or written.
    """
    variables = read_variables(source)

    from detection.checkpoint import save_checkpoint
    from detection.importers.label_maps import COCO_NUM_IDS, default_categories, read_categories

    network, state = load_tensorflow_ssd(variables, input_size=input_size)
    num_slots = network["num_classes"]
    if categories is None:
        table = default_categories(num_slots)
    else:
        table = read_categories(categories, num_slots)
    averages = {
        name.removesuffix(AVERAGE_SUFFIX): value
        for name, value in variables.items()
        if name.endswith(AVERAGE_SUFFIX)
    }
    ema = load_tensorflow_ssd(variables | averages, input_size=input_size)[1] if averages else None
    save_checkpoint(
        output,
        model=_keep_classes(state, num_slots, table),
        ema=ema and _keep_classes(ema, num_slots, table),
        config={"model": _model_config(network | {"num_classes": len(table)})},
        categories=list(table.values()),
    )
    lines = [f"wrote {output}: {len(table)} classes, width {network['width']:g}, {input_size} px"]
    if categories is None and num_slots != COCO_NUM_IDS:
        lines.append("the classes have no names: --categories gives them")
    if len(table) < num_slots:
        lines.append(f"{num_slots - len(table)} classes that have no category: left out")
    for kind, count in count_ignored(variables).items():
        fate = "kept, for evaluation" if kind == "moving averages" else "left out"
        lines.append(f"{count} {kind}: {fate}")
    return lines


def _keep_classes(
    state: Mapping[str, Tensor], num_classes: int, slots: Iterable[int]
) -> dict[str, Tensor]:
    """The state dict with some of the class slots, and the background's."""
    kept = [0, *slots]
    return {
        name: tensor.unflatten(0, (-1, 1 + num_classes))[:, kept].flatten(0, 1)
        if name.startswith("class_predictors")
        else tensor
        for name, tensor in state.items()
    }


def _model_config(network: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section: the network, and around it what the API has around it."""
    parts = "detection.models.ssd"
    keys = ("num_classes", "input_size", "reduce_boxes_in_lowest_layer")
    width = {"width": network["width"]}
    return {
        "_target_": f"{parts}.SSD",
        **{key: network[key] for key in keys},
        "backbone": {"_target_": "detection.models.backbones.MobileNetV1", **width},
        "extras": {"_target_": f"{parts}.make_extras", "_partial_": True, **width},
        "head": {"_target_": f"{parts}.make_predictor", "_partial_": True},
        "preprocess": {"_target_": "detection.preprocess.Preprocess", "mean": 127.5, "std": 127.5},
        "criterion": {"_target_": "detection.losses.FocalCriterion"},
        "postprocess": {
            "_target_": "detection.postprocess.Postprocess",
            "score_threshold": 1e-8,
            "iou_threshold": 0.6,
            "max_detections": 100,
        },
    }


def _mobilenet_scopes(root: str) -> dict[str, str]:
    """Our layers -> TensorFlow's scopes."""
    scopes = {"stem": f"{root}/Conv2d_0"}
    for number in range(1, 14):
        for kind in ("depthwise", "pointwise"):
            scopes[f"blocks.{number - 1}.layers.{kind}"] = f"{root}/Conv2d_{number}_{kind}"
    return scopes


def _ssd_scopes(network: SSD) -> dict[str, str]:
    root = "FeatureExtractor/MobilenetV1"
    scopes = {f"backbone.{layer}": scope for layer, scope in _mobilenet_scopes(root).items()}
    state = network.state_dict()
    for i in range(len(network.extras)):
        for kind, scope in (("reduce", "1_Conv2d_{}_1x1_{}"), ("expand", "2_Conv2d_{}_3x3_s2_{}")):
            layer = f"extras.{i}.layers.{kind}"
            channels = state[f"{layer}.conv.weight"].shape[0]
            scopes[layer] = f"{root}/Conv2d_13_pointwise_{scope.format(i + 2, channels)}"
    for i in range(len(network.box_predictors)):
        scopes[f"box_predictors.{i}"] = f"BoxPredictor_{i}/BoxEncodingPredictor"
        scopes[f"class_predictors.{i}"] = f"BoxPredictor_{i}/ClassPredictor"
    return scopes


def _require(variables: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in variables:
        raise UserError(
            f"there is no variable {name}: are these a MobileNetV1's, under TensorFlow's names?"
        )
    return variables[name]


def _derive_width(variables: Mapping[str, np.ndarray], root: str) -> float:
    """The width multiplier: int(channels * width) is the same for it and for the original one."""
    return _require(variables, f"{root}/Conv2d_13_pointwise/weights").shape[-1] / 1024


def _convert(
    variables: Mapping[str, np.ndarray],
    network: nn.Module,
    scopes: Mapping[str, str],
    *,
    ignored: Collection[re.Pattern[str]],
) -> dict[str, Tensor]:
    """The state dict of `network`, whose layers are TensorFlow's `scopes`."""
    import torch

    remaining = dict(variables)
    state = network.state_dict()
    faults = []
    for layer, scope in scopes.items():
        for parameter, variable in VARIABLES.items():
            target = state.get(f"{layer}.{parameter}")
            if target is None:
                continue
            # (out, in, kh, kw) from (kh, kw, in, out), or (kh, kw, channel, 1) where depthwise.
            axes, back = ((2, 3, 1, 0), (3, 2, 0, 1)) if target.dim() == 4 else ((0,), (0,))
            if parameter == "conv.weight" and layer.endswith("depthwise"):
                variable, axes, back = "depthwise_weights", (2, 3, 0, 1), (2, 3, 0, 1)
            name = f"{scope}/{variable}"
            array = remaining.pop(name, None)
            shape = tuple(target.permute(axes).shape)
            if array is None:
                faults.append(f"{name} is missing")
            elif array.shape != shape:
                faults.append(f"{name} is {array.shape}, not {shape}")
            else:
                tensor = torch.from_numpy(array.astype(np.float32)).permute(back)
                if layer.startswith("box_predictors"):
                    # TensorFlow's codes are ty, tx, th, tw.
                    tensor = tensor.unflatten(0, (-1, 4))[:, [1, 0, 3, 2]].flatten(0, 1)
                state[f"{layer}.{parameter}"] = tensor.contiguous()
    faults += [
        f"{name} is left over"
        for name in remaining
        if not any(pattern.fullmatch(name) for pattern in ignored)
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"the variables do not fit: {'; '.join(faults[:5])}{more}")
    return state


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.importers.tensorflow",
        description="Turn an SSD MobileNetV1 of the TensorFlow Object Detection API into a "
        "checkpoint for eval_det.py and visualize_det.py.",
    )
    parser.add_argument("source", help="a TensorFlow checkpoint, or an .npz file of its variables")
    parser.add_argument("--output", required=True, help="the checkpoint to write, FILE.pt")
    parser.add_argument("--input-size", type=int, default=300, help="pixels (default: 300)")
    parser.add_argument(
        "--categories",
        help="a COCO JSON (only its classes are kept), or a text file with one name a line",
    )
    options = parser.parse_args(arguments)
    try:
        lines = import_checkpoint(
            options.source,
            options.output,
            input_size=options.input_size,
            categories=options.categories,
        )
    except UserError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
