from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from detection.overrides import check_overrides, lay_over

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sbatch"
# What the script calls: torchrun trains until it is told to stop, and then fails, as it does.
STUBS = {
    "bin/srun": 'exec "$@"',
    "bin/scontrol": """
        if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$*" >> requeued; fi""",
    ".venv/bin/torchrun": """
        trap 'exit 1' TERM
        printf '%s\\n' "$@" > arguments.part && mv arguments.part arguments
        [ -e ends ] && exit 0
        for _ in {1..600}; do sleep 0.05; done""",
}
EXAMPLE = ["experiment=paper/ssd300_mobilenet_v1_100_condconv", "data.root=a folder"]


@pytest.fixture
def submit(tmp_path: Path) -> Callable[[], tuple[subprocess.Popen[str], list[str]]]:
    """Runs the script's example as SLURM would: the job, and the overrides that it gives."""
    for name, code in STUBS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{code}\n")
        path.chmod(0o755)

    def submit() -> tuple[subprocess.Popen[str], list[str]]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_JOB_NODELIST": "node[1-2]",
        }
        file = tmp_path / "arguments"
        file.unlink(missing_ok=True)
        job = subprocess.Popen(
            ["bash", str(SCRIPT), *EXAMPLE], cwd=tmp_path, env=environment, text=True
        )
        while not file.exists():
            assert job.poll() is None
            time.sleep(0.02)
        words = file.read_text().splitlines()
        assert words[words.index("--rdzv-endpoint") + 1] == "node1:29500"
        return job, words[words.index("train_det.py") + 1 :]

    return submit


def test_a_job_goes_on_after_the_time_is_over(
    submit: Callable[[], tuple[subprocess.Popen[str], list[str]]],
    compose_config: Callable[..., Any],
    tmp_path: Path,
):
    job, first = submit()
    check_overrides("train", first)
    saved = compose_config("train", first)
    assert saved.data.root == "a folder" and saved.trainer.num_workers == 8
    folder = tmp_path / saved.run_dir
    folder.mkdir(parents=True)
    OmegaConf.save(saved, folder / "config.yaml")
    job.terminate()
    job.wait(timeout=30)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"

    (tmp_path / "ends").touch()
    job, second = submit()
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    check_overrides("train", second)
    config = lay_over(saved, compose_config("train", second), second)
    assert config == {**saved, "resume": True}
