from __future__ import annotations

import errno
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from detection.cli import (
    check_overrides,
    config_dir,
    find_data,
    lay_over,
    plain,
    resume_command,
    run_script,
)
from detection.errors import UserError

CONFIGS = config_dir()


def options(group: str) -> list[str]:
    folder = CONFIGS / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


MODELS, DATA = ([o for o in options(g) if "/" not in o] for g in ("model", "data"))


@pytest.mark.parametrize(("model", "data"), list(itertools.product(MODELS, DATA)))
def test_every_model_composes_with_every_data(
    compose_config: Callable[..., Any], model: str, data: str
):
    content = plain(compose_config("train", [f"model={model}", f"data={data}"]))
    assert content["model"]["_target_"].startswith("detection.models.")
    assert content["data"]["_target_"] == f"detection.data.sources.{data}"
    assert content["trainer"]["steps"] > 0


@pytest.mark.parametrize(
    "group", ["experiment", "optimizer", "schedule", "trainer", "evaluation", "logger"]
)
def test_every_option_composes(compose_config: Callable[..., Any], group: str):
    assert options(group)
    for option in options(group):
        content = plain(compose_config("train", [f"{group}={option}"]))
        assert content["model" if group == "experiment" else group]


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trainer.stepz=3", "did you mean trainer.steps"),
        ("lr=0.1", "optimizer.lr"),
        ("modle=x", "did you mean model"),
        ("experiment=bcd", "did you mean bccd"),
        ("model=ssd300_mobilenet", "did you mean ssd300_mobilenet_v1"),
        ("data=cocoo", "did you mean coco"),
        ("logger=wandbb", "did you mean wandb"),
        ("foo", "foo: this is no override: write key=value"),
        ("trainer.steps=1 =3", "^=3: this is no override: write key=value"),
        ("model=5", "model=5: there is no such model; known are retinanet"),
        ("+foo=1", r"\+foo=1: nothing reads it; known are"),
        ("trainer.steps=1,2 optimizer.lrr=3", "did you mean optimizer.lr"),
        ("experiment=finetune model.criterion.alpha=0.5", r"write \+model.criterion.alpha=0.5"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(word: str, answer: str):
    with pytest.raises(UserError, match=answer) as info:
        check_overrides("train", word.split())
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.width=0.5", "trainer.steps=3"],
        ["data=coco", "data.root=/x", "data.val.ids=f"],
        ["trainer.steps=1,2", "seed=range(3)"],
        ["+hydra.job.name=x", "~logger"],
        ["model.preprocess.mean=[1,2,3]", "model.preprocess.std=1", "trainer.ema_decay=null"],
    ],
)
def test_right_words_pass(words: list[str]):
    assert check_overrides("train", words) == words


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("source=José (v2)/it's {a}, #1 = [b].jpg", "José (v2)/it's {a}, #1 = [b].jpg"),
        ('source=a"b\\"', 'a"b\\"'),
        ("source=f(1).jpg", "f(1).jpg"),
        ("source=~/a.jpg", str(Path.home() / "a.jpg")),
        ("source='a,b.jpg'", "a,b.jpg"),
        ("source=2024_01_05", "2024_01_05"),
        ("checkpoint=007", "007"),
        ("output=5", "5"),
        ("output=true", "true"),
        ("max_images=5", 5),
    ],
)
def test_a_text_is_read_as_it_is_meant(
    compose_config: Callable[..., Any], word: str, value: str | int
):
    words = check_overrides("visualize", [word], sweeps=False)
    assert compose_config("visualize", words)[word.partition("=")[0]] == value


@pytest.mark.parametrize(
    ("config", "word", "answer"),
    [
        ("export", "specialize=no", "specialize=no: give true or false"),
        ("train", "resume=off", "resume=off: give true or false"),
        ("train", "model.extras.separable=maybe", "separable=maybe: give true or false"),
        ("train", "optimizer.lr=abc", r"optimizer\.lr=abc: give a number"),
        ("visualize", "score_threshold=abc", "score_threshold=abc: give a number"),
        ("train", "optimizer.betas=abc", r"optimizer\.betas=abc: give a list"),
        ("train", "seed=rnge(3)", r"seed=rnge\(3\): give a number"),
        ("visualize", "batch_size=null", "batch_size=null: give a number"),
        ("visualize", "output=null", "output=null: give a value"),
        ("eval", "report_images=null", "report_images=null: give a number"),
    ],
)
def test_a_value_of_another_kind_is_refused(config: str, word: str, answer: str):
    with pytest.raises(UserError, match=answer):
        check_overrides(config, [word])


def test_several_values_need_multirun():
    with pytest.raises(UserError, match="seed=1,2: several values are a sweep: add --multirun"):
        check_overrides("train", ["seed=1,2"], sweeps=False)
    with pytest.raises(UserError, match=r"""or a text as 'source="a,b.jpg"'$"""):
        check_overrides("visualize", ["source=a,b.jpg"], sweeps=False)


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
    ("words", "changes"),
    [
        (["logger.mode=offline"], {"mode": "offline"}),
        (["logger=wandb", "logger.mode=offline"], {"mode": "offline"}),
        (["data.train.images=/x"], {}),
        (["data.train.images=/y"], "cannot change data"),
        (["model/backbone=mobilenet_v2"], "cannot change model"),
        (["logger.mod=offline"], r"logger\.mod: there is no such key; did you mean logger\.mode"),
    ],
)
def test_overrides_of_a_resumed_run_are_of_its_config(
    compose_config: Callable[..., Any],
    tmp_path: Path,
    words: list[str],
    changes: dict[str, str] | str,
):
    data = ["data=custom", "data.train.images=/x"]
    saved = compose_config("train", ["logger=wandb", "logger.project=mine", *data])
    saved = OmegaConf.create(plain(saved))
    OmegaConf.save(saved, tmp_path / "config.yaml")

    def resume() -> Any:
        own = check_overrides("train", [f"run_dir={tmp_path}", "resume=true", *words])
        return lay_over(saved, compose_config("train", own), own)

    if isinstance(changes, str):
        with pytest.raises(UserError, match=changes):
            resume()
    else:
        assert resume().logger == {**saved.logger, **changes}


def test_only_what_overrides_name_is_laid_over():
    saved = OmegaConf.create(
        {"model": {"a": 1}, "data": {}, "optimizer": {}, "seed": 0, "trainer": {"s": 1, "t": 1}}
    )
    composed = OmegaConf.merge(saved, {"model": {"a": 2}, "trainer": {"s": 5, "t": 7}})
    assert lay_over(saved, composed, ["trainer.s=5"]).trainer == {"s": 5, "t": 1}  # pyright: ignore
    with pytest.raises(UserError, match="cannot change model"):
        lay_over(saved, composed, ["model.a=2"])  # pyright: ignore


@pytest.mark.parametrize(
    ("saved_end", "words", "end"),
    [
        (6, ["trainer.steps=10"], 10),
        (8, ["trainer.steps=10"], 8),
        (6, ["trainer.steps=10", "schedule.steps=7"], 7),
        (6, [], 6),
    ],
)
def test_a_schedule_goes_on_to_the_end_of_the_run(saved_end: int, words: list[str], end: int):
    rest = {"model": {}, "data": {}, "optimizer": {}, "seed": 0}
    saved = OmegaConf.create(rest | {"trainer": {"steps": 6}, "schedule": {"steps": saved_end}})
    composed = OmegaConf.merge(saved, OmegaConf.from_dotlist(words))
    assert lay_over(saved, composed, words).schedule.steps == end  # pyright: ignore


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


def test_a_missing_value_is_named():
    with pytest.raises(UserError, match=r"model\.width"):
        plain(OmegaConf.create({"model": {"width": "???"}}))


@pytest.mark.parametrize(
    "change",
    [
        {"_target_": "os.system"},
        {"root": {"_target_": "os.system"}},
        {"root": "${oc.create:{_target_:pathlib.Path}}"},
    ],
)
def test_a_checkpoint_names_no_other_source_of_data(change: dict[str, Any]):
    data = {"_target_": "detection.data.sources.coco", "root": "x", "augmentation": {}}
    assert find_data({"data": None}, {"config": {"data": data}}) == data
    with pytest.raises(UserError, match="allowed are detection"):
        find_data({"data": None}, {"config": {"data": data | change}})
    assert find_data({"data": change}, {"config": {"data": data}}) == change


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
