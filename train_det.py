"""Train a detector: `python train_det.py [key=value ...]`; configs/train.yaml has the keys."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detection.cli import hydra_overrides, job_number, resume_command, run_script
from detection.config import find_model, plain
from detection.engine.stop import StopRequest
from detection.overrides import lay_over

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """The command `train-det`."""
    with StopRequest() as request:
        run_script(partial(_job, request=request), config_name="train", folder="run_dir")


def _job(config: DictConfig, request: StopRequest) -> None:
    number = job_number()
    if number and request.received:  # a signal stops a sweep, not only the job that runs
        print(f"stopped before job {number}", flush=True)
        return
    train(config, overrides=hydra_overrides(), request=request)


def train(
    config: DictConfig, *, overrides: Sequence[str] = (), request: StopRequest | None = None
) -> dict[str, Any]:
    """Train as a config says.

    Args:
        config: composed from configs/train.yaml.
        overrides: those of the command line; where `config.resume`, they are laid over the config
            that the run was started with.

    Returns:
        The metrics of the best checkpoint so far; empty where there is none yet.

    Raises:
        UserError: where the config, the data or a file is wrong.
    """
    # Imported here: torch takes seconds.
    from detection.engine.processes import launcher
    from detection.engine.run import run
    from detection.engine.run_folder import LOGGER, RunFolder

    if config.resume:
        config = lay_over(RunFolder(config.run_dir).read_config(), config, overrides)
    content = plain(config)
    content["model"] = find_model(content["model"])
    with nullcontext(request) if request else StopRequest() as own_request:
        outcome = run(content, own_request)
    if not outcome.is_finished:
        command = resume_command(Path(content["run_dir"]), launcher())
        LOGGER.info("stopped at step %d; go on with: %s", outcome.step, command)
    return outcome.metrics


if __name__ == "__main__":
    main()
