"""Overrides of the command line: checked, quoted where that is needed, laid over a saved config."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detection.config import config_dir
from detection.errors import UserError

# Keys that are null by default and take a text, by their last part; others take numbers.
TEXTS = re.compile(
    r"(.*\.)?(annotations|backbone_weights|checkpoint|compare|entity|ids|image_cache_folder|images"
    r"|license|output|root|source|tracking_uri|weights)"
)


def check_overrides(
    config_name: str, words: Sequence[str], *, sweeps: bool = True, folder: str | None = None
) -> list[str]:
    """Compose once to see whether the overrides fit.

    Args:
        sweeps: whether a key may have several values.
        folder: the key of the output folder, which a sweep needs.

    Returns:
        The words for Hydra, with quotes where it would not take a value as it is meant.

    Raises:
        UserError: naming the word that does not, and the nearest that would.
    """
    overrides = [_parse(word) for word in words]
    for override in overrides:
        if override.is_sweep_override() and not sweeps:
            raise UserError(
                f"{override.input_line}: several values are a sweep: add --multirun, or write a "
                f"list as [a,b], or a text as {shlex.quote(_quote(override))}"
            )
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = [own for own in overrides if _all_options(loader, own.key_or_group)]
        try:
            defaults = compose(config_name, overrides=[_first_of_sweep(own) for own in groups])
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            reason = _explain_groups(loader, groups) or " ".join(str(error).split())
            raise UserError(reason) from error
        saved = _read_saved(overrides)
        if saved is not None:
            OmegaConf.set_struct(defaults, False)
            defaults = OmegaConf.merge(defaults, saved)
            assert isinstance(defaults, DictConfig)
        overrides = [own if own in groups else _as_text(own, defaults) for own in overrides]
        keys = [own for own in overrides if own not in groups]
        if sweeps and folder is not None and defaults[folder] is None:
            single = {own.key_or_group for own in keys if not own.is_sweep_override()}
            if folder not in single:
                raise UserError(
                    f"a sweep needs {folder}=DIR: each of its jobs has a folder of its own there"
                )
        if saved is not None:
            _check_known(loader, defaults, keys)
            # Today's options may lack what those of the run have.
            overrides = [own if own in groups else _force(own) for own in overrides]
        composed = defaults
        if keys:
            try:
                composed = compose(config_name, overrides=[_first_of_sweep(o) for o in overrides])
            except (HydraException, OmegaConfBaseException) as error:
                _check_known(loader, defaults, keys)
                raise UserError(" ".join(str(error).split())) from error
        _check_additions(loader, defaults, keys)
        _check_types(keys, defaults, composed)
    return [str(own.input_line) for own in overrides]


def lay_over(saved: DictConfig, composed: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of a run to resume: the saved one with the overrides given now.

    Args:
        saved: the run folder's config.
        composed: today's config files with the overrides.
        overrides: only what they name is taken from `composed`.

    Raises:
        UserError: where an override would change what the weights depend on.
    """
    config = saved.copy()
    OmegaConf.set_struct(config, False)
    given = set()
    for override in map(_parse, overrides):
        key = override.key_or_group.replace("/", ".")
        if key == "experiment":
            raise UserError("resume=true goes on with the run's own config: leave experiment= out")
        if key.startswith("hydra."):
            continue
        if key in ("logger", "schedule"):
            own, new = (OmegaConf.select(each, f"{key}._target_") for each in (saved, composed))
            if own == new:
                continue  # the run has that option, maybe with other values
        OmegaConf.update(config, key, OmegaConf.select(composed, key), merge=False)
        given.add(key)
    # A schedule that ended with the run still does: saved configs are resolved.
    end = OmegaConf.select(saved, "schedule.steps")
    if (
        end is not None
        and end == OmegaConf.select(saved, "trainer.steps")
        and not given & {"schedule", "schedule.steps"}
    ):
        config.schedule.steps = config.trainer.steps
    # The place in the order of the images is counted in batches.
    for section in ("model", "data", "optimizer", "seed", "trainer.batch_size"):
        if OmegaConf.select(config, section) != OmegaConf.select(saved, section):
            raise UserError(
                f"resume=true cannot change {section}: start a new run for that, "
                "or leave the override out"
            )
    return config


def in_quotes(text: str) -> str:
    """A text as Hydra takes it for one, whatever is in it."""
    return QuotedString(text, Quote.double).with_quotes()


def _parse(word: str) -> Override:
    """An override; a value that Hydra cannot read is a text, and gets quotes."""
    key, equals, value = word.partition("=")
    if word.startswith("="):
        raise UserError(f"{word}: this is no override: write key=value")
    # No shell expands ~ behind a key with a dot.
    quoted = f"{key}={in_quotes(os.path.expanduser(value))}" if equals else word
    parser = OverridesParser.create()
    try:
        return parser.parse_override(word)
    except HydraException:
        try:
            return parser.parse_override(quoted)
        except HydraException as error:
            raise UserError(f"{word}: this is no override: write key=value") from error


def _quote(override: Override) -> str:
    """The override with its value, as it was typed, as a text."""
    key, _, value = str(override.input_line).partition("=")
    return f"{key}={in_quotes(value)}"


def _as_text(override: Override, defaults: DictConfig) -> Override:
    """With quotes, where a number stands for a text: a folder may be called 2024_01_05."""
    default, key = _select(defaults, override), override.key_or_group
    is_text = isinstance(default, str) or (default is None and TEXTS.fullmatch(key))
    if not is_text or override.is_sweep_override():
        return override
    return _parse(_quote(override)) if isinstance(override.value(), (int, float)) else override


def _force(override: Override) -> Override:
    return override if override.is_delete() else _parse(f"++{str(override.input_line).lstrip('+')}")


def _read_saved(overrides: Sequence[Override]) -> DictConfig | None:
    """The config of the run, or of a sweep's first, that `resume=true` goes on with.

    None where there is none that can be read, which is told of when it is needed.
    """
    given = {own.key_or_group: own for own in overrides}
    if "run_dir" not in given or "resume" not in given or given["resume"].value() is not True:
        return None
    folder = given["run_dir"].value()
    if not isinstance(folder, str):
        folder = str(given["run_dir"].input_line).partition("=")[2]
    for path in (Path(folder, "config.yaml"), Path(folder, "0", "config.yaml")):
        try:
            config = OmegaConf.load(path)
        except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException):
            continue
        return config if isinstance(config, DictConfig) else None
    return None


def _select(config: DictConfig, override: Override) -> Any:
    try:
        return OmegaConf.select(config, override.key_or_group)
    except OmegaConfBaseException:
        return None  # of an interpolation, which tells of itself where it is needed


def _check_types(keys: Sequence[Override], defaults: DictConfig, composed: DictConfig) -> None:
    """See that values are of their defaults' kind: Hydra takes `no` for a text, which is true."""
    for override in keys:
        default, value = _select(defaults, override), _select(composed, override)
        # A number may stand for a list of equal ones, and a list for a number.
        asked = {
            bool: "true or false",
            int: "a number",
            float: "a number",
            ListConfig: "a list, as [a,b]",
        }.get(type(default), "a value")
        if override.value() is None:  # those who read a section know what may be null in it
            wrong = default is not None and "." not in override.key_or_group
        elif isinstance(default, bool):
            wrong = not isinstance(value, bool)
        elif isinstance(default, int) and isinstance(value, (bool, float)):
            wrong, asked = "." not in override.key_or_group, "a whole number"
        else:
            wrong = isinstance(value, str) and isinstance(default, (int, float, ListConfig))
        if wrong:
            shown = "null" if value is None else value
            raise UserError(f"{override.key_or_group}={shown}: give {asked}")


def _first_of_sweep(override: Override) -> str:
    if not override.is_sweep_override():
        return str(override.input_line)
    first = next(iter(override.sweep_string_iterator()))
    return f"{override.get_key_element()}={first}"


def _explain_groups(loader: Any, groups: Sequence[Override]) -> str | None:
    """The first override that names no option of its group, and what it may have meant."""
    for override in groups:
        group, chosen = override.key_or_group, override.value()
        options = _all_options(loader, group)
        for value in map(str, chosen if isinstance(chosen, list) else [chosen]):
            if value not in options:
                return f"{group}={value}: there is no such {group}; {_suggest(value, options)}"
    return None


def _check_known(loader: Any, defaults: DictConfig, keys: Sequence[Override]) -> None:
    """Raise a UserError for the first override of a key that is not there."""
    known = {*_flatten(defaults), *loader.list_groups("")}
    for override in keys:
        key = override.key_or_group
        if key in known or key.startswith("hydra.") or _adds(override):
            continue
        if key.startswith("model.") and "model._target_" not in known:
            # What a model's own key stands for has been put in its place there.
            word = override.input_line
            word = f"{word}".replace("model.num_experts", "model.backbone.num_experts", 1)
            raise UserError(f"{key}: the model is that of the checkpoint; write +{word}")
        raise UserError(f"{key}: there is no such key; {_suggest(key, sorted(known))}")


def _check_additions(loader: Any, defaults: DictConfig, keys: Sequence[Override]) -> None:
    """Raise a UserError for one outside of all sections, where nothing reads it."""
    known = sorted({*map(str, defaults), *loader.list_groups("")})
    for override in keys:
        section = override.key_or_group.split(".", 1)[0]
        if _adds(override) and section not in (*known, "hydra"):
            raise UserError(f"{override.input_line}: nothing reads it; {_suggest(section, known)}")


def _adds(override: Override) -> bool:
    return override.is_add() or override.is_force_add()


def _all_options(loader: Any, group: str, prefix: str = "") -> list[str]:
    """Options of a group, those in its folders by their path."""
    options = [
        prefix + option for option in loader.get_group_options(f"{group}/{prefix}".rstrip("/"))
    ]
    for folder in loader.list_groups(f"{group}/{prefix}".rstrip("/")):
        options += _all_options(loader, group, f"{prefix}{folder}/")
    return options


def _flatten(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config:
        name = f"{prefix}{key}"
        yield name
        child = config._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _flatten(child, f"{name}.")


def _suggest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    # A key may be known under another section: `lr` is `optimizer.lr`.
    near += [name for name in known if name.rsplit(".", 1)[-1] == word and name not in near]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known are {', '.join(name for name in known if '.' not in name)}"
