"""From config to parts: the only place where a config names classes that are then called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from detection.errors import UserError, first_line
from detection.postprocess import Postprocess
from detection.preprocess import Preprocess

# A checkpoint's config may name these and nothing else: it can come from anywhere.
MODEL_TARGETS = frozenset(
    {
        "detection.losses.FocalCriterion",
        "detection.models.backbones.MobileNetV1",
        "detection.models.backbones.TimmBackbone",
        "detection.models.backbones.TorchvisionResNet",
        "detection.models.retinanet.FeaturePyramid",
        "detection.models.retinanet.RetinaNet",
        "detection.models.retinanet.RetinaNetHead",
        "detection.models.ssd.SSD",
        "detection.models.ssd.make_extras",
        "detection.models.ssd.make_predictor",
        "detection.models.ssd.ssd_mobilenet_v1",
        "detection.postprocess.Postprocess",
        "detection.preprocess.Letterbox",
        "detection.preprocess.Preprocess",
    }
)
# The same of its data.
DATA_TARGETS = frozenset(f"detection.data.sources.{name}" for name in ("coco", "custom", "shapes"))
# Keys beside a `backbone` section that say nothing themselves: keys of the sections refer to them.
SHORTHANDS = frozenset({"width", "num_experts", "norm_momentum"})


class ModelParts(NamedTuple):
    """A detector's network and what stands around it."""

    network: nn.Module
    preprocess: Preprocess
    criterion: nn.Module
    postprocess: Postprocess


def build_partial(config: Mapping[str, Any]) -> Callable[..., Any]:
    """What `_target_` names, with the config's other keys bound as arguments.

    Raises:
        UserError: where the target does not exist.
    """
    try:
        return instantiate(config, _partial_=True, _convert_="all")
    except InstantiationException as error:
        raise UserError(f"{config.get('_target_')}: {first_line(error)}") from error


def build(config: Mapping[str, Any], /, **arguments: Any) -> Any:
    """Call what `_target_` names with the config's other keys and `arguments`.

    Keys that hold a `_target_` of their own are built first; with `_partial_: true`, bound only.

    Raises:
        UserError: where a target does not exist or refuses its arguments.
    """
    built = {
        key: (build_partial if value.get("_partial_") else build)(value)
        for key, value in config.items()
        if isinstance(value, Mapping) and "_target_" in value
    }
    own = {key: value for key, value in config.items() if key not in built}
    try:
        # Bound first: Hydra would copy arguments such as parameters into a config.
        return build_partial(own)(**built, **arguments)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"{config['_target_']}: {error}") from error


def build_model(
    config: Mapping[str, Any], num_classes: int, *, initialize: bool = True
) -> ModelParts:
    """Build a detector from the `model` section of a config.

    Args:
        config: the network's target and arguments, and under `preprocess`, `criterion` and
            `postprocess` those of the other parts. Where `preprocess` leaves `mean` or `std` open,
            they are the backbone's. `weights`, which tells what training starts from, is left out.
        num_classes: from the category table; `config["num_classes"]` must agree where it is set.
        initialize: else the network's weights are on the meta device, for some to be loaded:
            drawing millions at random takes seconds.

    Raises:
        UserError: where a target is not in `MODEL_TARGETS`, or the class counts differ.
    """
    parts = {name: dict(config[name]) for name in ("preprocess", "criterion", "postprocess")}
    left_out = {*parts, "weights", *(SHORTHANDS if "backbone" in config else ())}
    arguments = {key: value for key, value in config.items() if key not in left_out}
    for part in [arguments, *parts.values()]:
        check_targets(part, MODEL_TARGETS, "model")
    configured = arguments.pop("num_classes", None)
    if configured is not None and configured != num_classes:
        raise UserError(
            f"model.num_classes={configured}, but the data has {num_classes} classes: "
            "leave model.num_classes out to take the data's"
        )
    with nullcontext() if initialize else torch.device("meta"):
        network = build(arguments, num_classes=num_classes)
    given = {key: value for key, value in parts["preprocess"].items() if value is not None}
    normalization = getattr(network.backbone, "normalization", {})
    return ModelParts(
        network=network,
        preprocess=build({**normalization, **given}, input_size=network.input_size),
        criterion=build(parts["criterion"]),
        postprocess=build(parts["postprocess"]),
    )


def check_targets(config: Mapping[str, Any], allowed: Set[str], section: str) -> None:
    """See that a config that may come from anywhere can call nothing but what is allowed.

    Raises:
        UserError: where it, or anything inside of it, names another target, or holds an
            interpolation, which could make one.
    """
    for target in [config.get("_target_"), *_nested_targets(list(config.values()))]:
        if target not in allowed:
            raise UserError(
                f"the {section} config names {target!r}; allowed are {', '.join(sorted(allowed))}"
            )


def _nested_targets(value: Any) -> Iterator[Any]:
    """Every `_target_`, and every text with an interpolation, inside of lists and mappings."""
    if isinstance(value, str) and "${" in value:
        yield value
    if isinstance(value, Mapping):
        yield from (target for key, target in value.items() if key == "_target_")
    if isinstance(value, (Mapping, list)):
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _nested_targets(child)
