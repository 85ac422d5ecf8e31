from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from detection.config import config_dir, plain
from detection.errors import UserError
from detection.overrides import TEXTS, check_overrides, lay_over


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trainer.stepz=3", "did you mean trainer.steps"),
        ("lr=0.1", "optimizer.lr"),
        ("modle=x", "did you mean model"),
        ("experiment=bcd", "did you mean bccd"),
        ("experiment=[bccd,bcd]", "experiment=bcd: there is no such experiment"),
        ("model=ssd300_mobilenet", "did you mean ssd300_mobilenet_v1"),
        ("data=cocoo", "did you mean coco"),
        ("logger=wandbb", "did you mean wandb"),
        ("foo", "foo: this is no override: write key=value"),
        ("trainer.steps=1 =3", "^=3: this is no override: write key=value"),
        ("model=5", "model=5: there is no such model; known are retinanet"),
        ("+foo=1", r"\+foo=1: nothing reads it; known are"),
        ("trainer.steps=1,2 optimizer.lrr=3", "did you mean optimizer.lr"),
        ("experiment=finetune model.criterion.alpha=0.5", r"write \+model.criterion.alpha=0.5"),
        ("experiment=finetune model.num_experts=4", r"write \+model.backbone.num_experts=4"),
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
        ("visualize", "batch_size=1.5", r"batch_size=1\.5: give a whole number"),
        ("visualize", "batch_size=true", "batch_size=True: give a whole number"),
        ("export", "num_samples=1.5", r"num_samples=1\.5: give a whole number"),
        ("eval", "report_images=1.5", r"report_images=1\.5: give a whole number"),
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
    assert lay_over(saved, composed, ["hydra.verbose=true"]) == saved  # pyright: ignore
    with pytest.raises(UserError, match="cannot change model"):
        lay_over(saved, composed, ["model.a=2"])  # pyright: ignore
    composed = OmegaConf.merge(saved, {"trainer": {"batch_size": 8}})
    with pytest.raises(UserError, match=r"cannot change trainer\.batch_size"):
        lay_over(saved, composed, ["trainer.batch_size=8"])  # pyright: ignore


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


def list_null_keys(value: Any, key: str = "") -> Iterator[str]:
    if value is None:
        yield key
    for name, child in value.items() if isinstance(value, dict) else ():
        if name not in ("defaults", "hydra"):
            yield from list_null_keys(child, name)


def test_every_null_key_is_known_to_take_a_text_or_not():
    """A folder called 2024_01_05 is a number to YAML."""
    files = config_dir().rglob("*.yaml")
    keys = {key for file in files for key in list_null_keys(yaml.safe_load(file.read_text()))}
    assert {key for key in keys if not TEXTS.fullmatch(key)} == {
        *("background_threshold", "checkpoint_every", "early_stopping", "ema_decay", "format"),
        *("gradient_clip_norm", "image_cache", "max_images", "mean", "mode", "multi_scale", "norm"),
        *("num_classes", "num_conditional_blocks", "on_device", "shrink", "std"),
    }
