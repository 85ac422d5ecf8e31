"""From config to parts: the only place where a config names classes that are then called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn

from detection.errors import UserError
from detection.postprocess import Postprocess
from detection.preprocess import Preprocess

# A checkpoint's config may name these and nothing else: it can come from anywhere.
MODEL_TARGETS = frozenset(
    {
        "detection.losses.SSDCriterion",
        "detection.models.ssd.ssd_mobilenet_v1",
        "detection.postprocess.Postprocess",
        "detection.preprocess.Preprocess",
    }
)


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
        raise UserError(f"{config.get('_target_')}: {str(error).splitlines()[0]}") from error


def build(config: Mapping[str, Any], **arguments: Any) -> Any:
    """Call what `_target_` names with the config's other keys and `arguments`.

    Raises:
        UserError: where the target does not exist or refuses its arguments.
    """
    try:
        # Bound first: Hydra would copy arguments such as parameters into a config.
        return build_partial(config)(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{config['_target_']}: {error}") from error


def build_model(config: Mapping[str, Any], num_classes: int) -> ModelParts:
    """Build a detector from the `model` section of a config.

    Args:
        config: the network's target and arguments, and under `preprocess`, `criterion` and
            `postprocess` those of the other parts.
        num_classes: from the category table; `config["num_classes"]` must agree where it is set.

    Raises:
        UserError: where a target is not in `MODEL_TARGETS`, or the class counts differ.
    """
    parts = {name: dict(config[name]) for name in ("preprocess", "criterion", "postprocess")}
    network = {key: value for key, value in config.items() if key not in parts}
    for part in [network, *parts.values()]:
        if part.get("_target_") not in MODEL_TARGETS:
            raise UserError(
                f"the model config names {part.get('_target_')!r}; "
                f"allowed are {', '.join(sorted(MODEL_TARGETS))}"
            )
    configured = network.pop("num_classes", None)
    if configured is not None and configured != num_classes:
        raise UserError(
            f"model.num_classes={configured}, but the data has {num_classes} classes: "
            "leave model.num_classes out to take the data's"
        )
    return ModelParts(
        network=build(network, num_classes=num_classes),
        preprocess=build(parts["preprocess"], input_size=network["input_size"]),
        criterion=build(parts["criterion"]),
        postprocess=build(parts["postprocess"]),
    )
