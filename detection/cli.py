"""What the scripts share: composing the config, and one clear line for a mistake."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detection.errors import UserError


def config_dir() -> Path:
    """Where the configs lie: beside the scripts in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "configs"
    return checkout if (checkout / "train.yaml").is_file() else package / "configs"


def run_script(job: Callable[[DictConfig], object], *, config_name: str) -> None:
    """Compose the config from the command line and give it to `job`.

    A mistake of the user is one line and, at the end, status 1; the other jobs of a sweep run.
    """
    # A traceback is for bugs, and then a whole one.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    failed = False

    def guarded(config: DictConfig) -> None:
        nonlocal failed
        try:
            job(config)
            return
        except UserError as error:
            line = _line(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = error.filename or "a file could not be written"
            line = f"{place}: {error.strerror}: make room; a run goes on with resume=true"
        failed = True
        number = job_number()
        _print_mistake(line if number is None else f"job {number}: {line}")

    arguments = sys.argv[1:]
    if not {"--help", "-h", "--hydra-help", "--version"} & set(arguments):
        try:
            words = [word for word in arguments if not word.startswith("-")]
            sweeps = bool({"--multirun", "-m", "hydra.mode=MULTIRUN"} & set(arguments))
            check_overrides(config_name, words, sweeps=sweeps)
        except UserError as error:
            fail(error)
    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(
        guarded
    )()
    if failed:
        sys.exit(1)


def fail(error: UserError) -> NoReturn:
    """Print one line and exit with status 1."""
    _print_mistake(_line(error))
    sys.exit(1)


def _line(error: UserError) -> str:
    # One from a loader's worker carries the worker's traceback before its own line.
    return str(error).splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")


def _print_mistake(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


def check_overrides(config_name: str, words: list[str], *, sweeps: bool = True) -> None:
    """Compose once to see whether the overrides fit.

    Args:
        sweeps: whether a key may have several values.

    Raises:
        UserError: naming the word that does not, and the nearest that would.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            overrides = OverridesParser.create().parse_overrides(words)
        except HydraException as error:
            raise UserError(
                f"cannot read the overrides {' '.join(words)}: write key=value "
                f"({str(error).splitlines()[0]})"
            ) from error
        for override in overrides:
            if override.is_sweep_override() and not sweeps:
                raise UserError(
                    f"{override.input_line}: several values are a sweep: add --multirun, or "
                    "write a list as [a,b]"
                )
        single = [_first_of_sweep(override) for override in overrides]
        try:
            composed = compose(config_name, overrides=single)
        except (HydraException, OmegaConfBaseException) as error:
            reason = _explain(config_name, overrides) or " ".join(str(error).split())
            raise UserError(reason) from error
        _check_types(config_name, overrides, composed)


def _check_types(config_name: str, overrides: list[Override], composed: DictConfig) -> None:
    """See that values are of their defaults' kind: Hydra takes `no` for a text, which is true."""
    loader = GlobalHydra.instance().config_loader()
    groups, keys = [], []
    for override in overrides:
        is_group = bool(_all_options(loader, override.key_or_group))
        (groups if is_group else keys).append(override)
    if not keys:
        return
    defaults = compose(config_name, overrides=[_first_of_sweep(override) for override in groups])
    for override in keys:
        key = override.key_or_group
        try:
            default, value = (OmegaConf.select(config, key) for config in (defaults, composed))
        except OmegaConfBaseException:
            continue  # of an interpolation, which tells of itself where it is needed
        if isinstance(default, bool):
            wrong = None if isinstance(value, bool) or value is None else "true or false"
        else:  # a number may stand for a list of equal ones, and a list for a number
            asked = {int: "a number", float: "a number", ListConfig: "a list, as [a,b]"}
            wrong = asked.get(type(default)) if isinstance(value, str) else None
        if wrong:
            raise UserError(f"{key}={value}: give {wrong}")


def _first_of_sweep(override: Override) -> str:
    if not override.is_sweep_override():
        return str(override.input_line)
    first = next(iter(override.sweep_string_iterator()))
    return f"{override.get_key_element()}={first}"


def _explain(config_name: str, overrides: list[Override]) -> str | None:
    """The first override that names no group, option or key, and what it may have meant."""
    loader = GlobalHydra.instance().config_loader()
    choices = []
    for override in overrides:
        group, value = override.key_or_group, str(override.value())
        options = _all_options(loader, group)
        if options and value not in options:
            return f"{group}={value}: there is no such {group}; {_suggest(value, options)}"
        if options:
            choices.append(str(override.input_line))
    try:
        composed = compose(config_name, overrides=choices)
    except (HydraException, OmegaConfBaseException):
        return None
    keys = list(_flatten(composed))
    for override in overrides:
        key = override.key_or_group
        known = {*keys, *loader.list_groups("")}
        if key not in known and not override.is_add():
            if key.startswith("model.") and "model._target_" not in known:
                return f"{key}: the model is that of the checkpoint; write +{override.input_line}"
            return f"{key}: there is no such key; {_suggest(key, sorted(known))}"
    return None


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


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain containers, interpolations resolved.

    Raises:
        UserError: where a value is missing or cannot be resolved.
    """
    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def hydra_overrides() -> list[str]:
    """The overrides of the command line, or of the job of a sweep."""
    return list(HydraConfig.get().overrides.task)


def job_number() -> int | None:
    """The number of this job in a sweep (`--multirun`); None outside one."""
    config = HydraConfig.get()
    return config.job.num if config.mode == RunMode.MULTIRUN else None


def resume_command(run_dir: Path, launcher: str) -> str:
    """What to type into a shell to go on with a run of train_det.py.

    Args:
        launcher: the words before the script, where that is not itself the command.
    """
    script = Path(sys.argv[0])
    words = f"{launcher} train_det.py"
    if script.name == "train_det.py":
        words = f"{launcher} {shlex.quote(str(script))}"
    elif script.name == "train-det":
        words = shlex.quote(str(script))
    path = str(run_dir)
    if not re.fullmatch(r"[\w./-]+", path, re.ASCII):
        # Once for Hydra, to whom a comma is a sweep, and once for the shell.
        path = shlex.quote('"' + path.replace('"', '\\"') + '"')
    return f"{words} run_dir={path} resume=true"


def split_data(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `data` section as (the source's config, the augmentation's)."""
    source = {key: value for key, value in config.items() if key not in ("augmentation", "shrink")}
    return source, config["augmentation"]


def find_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section; without a network it is laid over that of its checkpoint.

    Raises:
        UserError: where there is no such checkpoint, or a key that would have no effect.
    """
    if "_target_" in config:
        return dict(config)
    # Heavy, and most runs do without.
    from detection.build import SHORTHANDS
    from detection.checkpoint import load_checkpoint
    from detection.importers.detector import DOWNLOAD

    if config["weights"] is None:
        raise UserError("no model: give model.weights=FILE, a checkpoint, or choose a model")
    if str(config["weights"]).startswith(DOWNLOAD):
        raise UserError(f"{config['weights']} names no model: give model=retinanet as well")
    for key in sorted(SHORTHANDS & config.keys()):
        raise UserError(f"model.{key} is resolved in a checkpoint: give +model.backbone.{key}=...")
    saved = load_checkpoint(config["weights"])["config"]["model"]
    return _merge({**saved, "num_classes": None}, config)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections laid over sections; OmegaConf would resolve what a checkpoint has in its strings."""
    sections = [key for key in above if isinstance(below.get(key), Mapping)]
    return {**below, **above, **{key: _merge(below[key], above[key]) for key in sections}}


def find_data(config: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The `data` section to evaluate on: the one chosen now, else the checkpoint's own.

    Raises:
        UserError: where there is neither, or the checkpoint's names another source than ours.
    """
    if config.get("data"):
        return config["data"]
    data = checkpoint["config"].get("data")
    if data is None:
        raise UserError(
            "the checkpoint names no data: give data=coco data.root=DIR, or data=custom "
            "data.val.images=DIR data.val.annotations=FILE"
        )
    # Here and not above: torch takes seconds to import.
    from detection.build import DATA_TARGETS, check_targets

    check_targets(split_data(data)[0], DATA_TARGETS, "checkpoint's data")
    return data


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
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override in parsed:
        key = override.key_or_group
        if key == "experiment":
            raise UserError("resume=true goes on with the run's own config: leave experiment= out")
        OmegaConf.update(config, key, OmegaConf.select(composed, key), merge=False)
    # A schedule that ended with the run still does: saved configs are resolved.
    given = {override.key_or_group for override in parsed}
    end = OmegaConf.select(saved, "schedule.steps")
    if (
        end is not None
        and end == OmegaConf.select(saved, "trainer.steps")
        and not given & {"schedule", "schedule.steps"}
    ):
        config.schedule.steps = config.trainer.steps
    for section in ("model", "data", "optimizer", "seed"):
        if config[section] != saved[section]:
            raise UserError(
                f"resume=true cannot change {section}: start a new run for that, "
                "or leave the override out"
            )
    return config
