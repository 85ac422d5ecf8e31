from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from detection.cli import resume_command, run_script


def test_flags_may_stand_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    found: list[Any] = []
    common = ["eval_det.py", "checkpoint=a,b"]
    monkeypatch.setattr(sys, "argv", [*common, "--multirun", f"output={tmp_path / 'a (1)'}"])
    run_script(found.append, config_name="eval", folder="output")
    assert [(own.checkpoint, own.output) for own in found] == [
        ("a", f"{tmp_path}/a (1)/0"),
        ("b", f"{tmp_path}/a (1)/1"),
    ]
    monkeypatch.setattr(sys, "argv", ["eval_det.py", "split=val", "--cfg", "job", "device=cpu"])
    run_script(found.append, config_name="eval")
    assert "device: cpu" in capsys.readouterr().out
    for flags, answer in (
        (["--multirun"], "a sweep needs output=DIR"),
        (["--multirun", "--cfg", "job"], "--cfg and --info run none: give one of them"),
    ):
        monkeypatch.setattr(sys, "argv", [*common, *flags])
        with pytest.raises(SystemExit):
            run_script(found.append, config_name="eval", folder="output")
        assert answer in capsys.readouterr().err


def test_a_folder_of_configs_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("root: /mine\n")
    arguments = ["--config-dir", str(tmp_path), "data=mine", "--cfg", "job", "-p", "data"]
    monkeypatch.setattr(sys, "argv", ["eval_det.py", *arguments])
    run_script(print, config_name="eval")
    assert "root: /mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("train_det.py", "torchrun -x train_det.py"),
        ("/my code/train_det.py", "torchrun -x '/my code/train_det.py'"),
        ("/venv/bin/train-det", "/venv/bin/train-det"),
        ("sweep.py", "torchrun -x train_det.py"),
    ],
)
@pytest.mark.parametrize("folder", ["runs/a-1", "a run, no (1)", 'it\'s "é"'])
def test_the_command_to_go_on(
    monkeypatch: pytest.MonkeyPatch, program: str, words: str, folder: str
):
    """The shell and Hydra read the folder from it."""
    monkeypatch.setattr(sys, "argv", [program])
    command = resume_command(Path(folder), "torchrun -x")
    assert command.startswith(f"{words} run_dir=")
    *_, run_dir, resume = shlex.split(command)
    overrides = OverridesParser.create().parse_overrides([run_dir, resume])
    assert [str(override.value()) for override in overrides] == [folder, "True"]


@pytest.mark.parametrize(
    "script",
    ["train_det.py", "eval_det.py", "visualize_det.py", "detection/export/__main__.py"],
)
def test_help_and_mistakes_answer_without_torch(script: str):
    """Importing torch takes seconds; --help must not."""
    root = Path(__file__).parents[2]
    code = (
        "import sys, runpy; sys.argv = [sys.argv[1], sys.argv[2]]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    for word, status, text in (("--help", 0, "checkpoint"), ("devicee=cpu", 1, "did you mean")):
        process = subprocess.run(
            [sys.executable, "-c", code, str(root / script), word],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert process.returncode == status, process.stderr
        assert text in process.stdout + process.stderr
        assert "Traceback" not in process.stderr


def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def job(config: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(sys, "argv", ["train_det.py"])
    with pytest.raises(SystemExit) as caught:
        run_script(job, config_name="train")
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: metrics.jsonl: No space left on device: make room")
    assert printed.count("\n") == 1
