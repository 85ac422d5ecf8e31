"""What the scripts share: running a job from the command line, one clear line for a mistake."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from detection.config import config_dir
from detection.errors import UserError
from detection.overrides import check_overrides, in_quotes


def run_script(
    job: Callable[[DictConfig], object], *, config_name: str, folder: str | None = None
) -> None:
    """Compose the config from the command line and give it to `job`.

    A mistake of the user is one line and, at the end, status 1; the other jobs of a sweep run.

    Args:
        folder: the key of the output folder: each job of a sweep has one of its own in it.
    """
    # A traceback is for bugs, and then a whole one.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    failed = False

    def guarded(config: DictConfig) -> None:
        nonlocal failed
        number = job_number()
        if folder is not None and number is not None:
            config[folder] = f"{config[folder]}/{number}"
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
        _print_mistake(line if number is None else f"job {number}: {line}")

    arguments = sys.argv[1:]
    if not {"--help", "-h", "--hydra-help", "--version"} & set(arguments):
        try:
            known = get_args_parser().parse_intermixed_args(arguments)
            words = known.overrides
            flags = [word for word in arguments if word not in words]
            if known.multirun and (known.cfg or known.info):
                raise UserError("--multirun runs jobs, --cfg and --info run none: give one of them")
            if not (known.config_dir or known.config_path or known.config_name):  # else not ours
                sweeps = known.multirun or "hydra.mode=MULTIRUN" in words
                words = check_overrides(config_name, words, sweeps=sweeps, folder=folder)
            # What Hydra reads: its own parser takes no flags between overrides.
            sys.argv[1:] = [*words, *flags]
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
        path = shlex.quote(in_quotes(path))
    return f"{words} run_dir={path} resume=true"
