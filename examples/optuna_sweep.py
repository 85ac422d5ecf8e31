"""Search optimizer settings with Optuna: an example to copy and change.

    pip install -e '.[optuna]'
    python examples/optuna_sweep.py --trials 20 --output DIR [group=option ...] [key=value ...]

The overrides are those of train_det.py. Each trial is a run in a folder of its own, DIR/0, DIR/1
and on; what Optuna knows is in DIR/study.db, so that the same command adds trials, also from
several machines at once (with --seed each call draws the same ones again). A trial that diverges
counts as failed, and the search goes on; SIGTERM and Ctrl-C end it, the trial at hand as failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import optuna
from hydra import compose, initialize_config_dir

from detection.cli import fail
from detection.config import config_dir
from detection.engine.stop import StopRequest
from detection.errors import UserError
from detection.overrides import check_overrides
from train_det import train


def suggest(trial: optuna.Trial) -> list[str]:
    """What a trial tries: the search space, as overrides."""
    values = {
        "optimizer.lr": trial.suggest_float("optimizer.lr", 1e-4, 1e-2, log=True),
        "optimizer.weight_decay": trial.suggest_float(
            "optimizer.weight_decay", 1e-5, 1e-1, log=True
        ),
        "trainer.ema_decay": trial.suggest_categorical("trainer.ema_decay", [0.99, 0.999]),
    }
    return [f"{key}={value}" for key, value in values.items()]


def search(
    *, num_trials: int, output: Path, overrides: Sequence[str], seed: int | None = None
) -> optuna.Study:
    """Run trials; the best of the study is that of the highest AP.

    Args:
        seed: of the sampler, which starts with it anew in each call: the same trials again.

    Raises:
        UserError: where the overrides are wrong.
    """
    overrides = check_overrides("train", overrides)
    output.mkdir(parents=True, exist_ok=True)

    def run_trial(trial: optuna.Trial) -> float:
        chosen = [*overrides, *suggest(trial), f"run_dir='{output / str(trial.number)}'"]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = compose("train", overrides=chosen)
        metrics = train(config, request=request)
        if request.received:
            study.stop()
            raise UserError(f"stopped: {output / str(trial.number)} is not trained to its end")
        return metrics["AP"]

    study = optuna.create_study(
        study_name="detection",
        storage=f"sqlite:///{output / 'study.db'}",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
    )
    with StopRequest() as request:
        study.optimize(run_trial, n_trials=num_trials, catch=(UserError,))
    return study


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int)
    arguments, overrides = parser.parse_known_args()
    try:
        study = search(
            num_trials=arguments.trials,
            output=arguments.output,
            seed=arguments.seed,
            overrides=overrides,
        )
        if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
            raise UserError(f"no trial of {arguments.output} has come to its end")
        print(f"best AP {study.best_value:.4f}: {study.best_params}, run {study.best_trial.number}")
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
