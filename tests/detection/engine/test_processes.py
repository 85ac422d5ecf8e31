from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detection.data.coco import CocoIndex
from detection.data.shapes import Recipe, provide
from detection.engine.processes import Processes, join_processes, launcher
from detection.engine.settings import TrainerSettings
from detection.engine.train import open_image_cache
from detection.errors import UserError


@pytest.mark.parametrize(
    ("num_nodes", "per_node", "words"),
    [
        (None, None, "python"),
        ("1", "8", "torchrun --nproc-per-node 8"),
        ("2", "4", "torchrun --nnodes 2 --nproc-per-node 4"),
    ],
)
def test_the_launcher_is_named(
    monkeypatch: pytest.MonkeyPatch, num_nodes: str | None, per_node: str | None, words: str
):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if num_nodes is not None and per_node is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("GROUP_WORLD_SIZE", num_nodes)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node)
    assert launcher() == words


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            "^DataLoader worker .pid 7. is",
        ),
        ("[gloo/transport/tcp/pair.cc:1] Connection closed by peer", "another process of this run"),
    ],
)
def test_a_death_is_one_line(message: str, answer: str):
    with pytest.raises(UserError, match=answer) as info, join_processes("cpu"):
        raise RuntimeError(message)
    assert "\n" not in str(info.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes differ") as info, join_processes("cpu"):
        raise RuntimeError("shapes differ")
    assert not isinstance(info.value, UserError)


def in_group(answer: Callable[..., Any], rank: int, port: int, answers: Any, *args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with join_processes("cpu") as processes:
        assert (processes.rank, processes.local_rank) == (rank, rank)
        try:
            answers.put((rank, answer(processes, *args)))
        except UserError as error:
            answers.put((rank, str(error)))
        assert processes.share("still in step") == "still in step"


def ask_two(answer: Callable[..., Any], *args: Any) -> dict[int, Any]:
    """What `answer(processes, *args)` gives in each process of a group of two, by rank."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = [
        context.Process(target=in_group, args=(answer, rank, port, answers, *args))
        for rank in (0, 1)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(timeout=60)
    try:
        assert [process.exitcode for process in group] == [0, 0]
    finally:
        for process in group:
            process.kill()
    return dict(answers.get() for _ in group)


def load_in_turns(processes: Processes, folder: Path, fails: str) -> bool:
    """Whether it finds the file that it then makes."""

    def load() -> bool:
        if str(processes.rank) in fails:
            raise UserError(f"rank {processes.rank} cannot")
        found = (folder / "made").exists()
        time.sleep(0.3)
        (folder / "made").touch()
        return found

    return processes.first_then_others(load)


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        ("", {0: False, 1: True}),
        ("0", {0: "rank 0 cannot", 1: "rank 0 cannot"}),
        ("1", {0: "rank 1 cannot", 1: "rank 1 cannot"}),
        ("01", {0: "rank 0 cannot", 1: "rank 0 cannot"}),
    ],
)
def test_one_process_goes_first(tmp_path: Path, fails: str, expected: dict[int, Any]):
    assert ask_two(load_in_turns, tmp_path, fails) == expected


def open_late(processes: Processes, index: CocoIndex, settings: TrainerSettings) -> int:
    """The number of the cache's file; the first process takes its time."""
    if processes.is_main:
        time.sleep(0.3)
    with open_image_cache(index, None, settings, processes) as cache:
        assert cache is not None
        return os.fstat(cache._file.fileno()).st_ino


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_processes_have_one_cache_of_images(tmp_path: Path, kind: str):
    folder = provide(Recipe(num_train=3, num_val=1, image_size=(64, 80)), tmp_path)
    annotations = folder / "annotations" / "instances_train.json"
    index = CocoIndex.load(images=folder / "images" / "train", annotations=annotations)
    settings = TrainerSettings(steps=1, batch_size=2, image_cache=kind)
    if kind == "disk":
        settings.image_cache_folder = str(tmp_path / "kept")
    answers = ask_two(open_late, index, settings)
    assert answers[0] == answers[1]


def test_one_process_alone_only_loads():
    with join_processes("cpu") as processes:
        assert processes.first_then_others(lambda: 7) == 7
