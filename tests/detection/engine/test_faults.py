"""Runs that lose a process, a file or their patience. Each run is a process of its own, forked from
one that has imported torch already."""

from __future__ import annotations

import json
import multiprocessing
import os
import pkgutil
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import eval_det
import train_det
from detection.checkpoint import load_checkpoint
from detection.data.coco_json import CocoReader
from detection.data.image_cache import SHARED_MEMORY
from detection.data.shapes import Recipe, provide
from detection.detector import Detector
from detection.engine.run_folder import RunFolder
from detection.engine.state import TrainState
from detection.engine.stop import start_loader
from detection.engine.train import take_step
from detection.errors import UserError


def run_script(
    script: str,
    arguments: list[str],
    output: Path,
    environment: dict[str, str],
    kill_at: int | None,
    signal_at: str | None,
) -> None:
    """As `python SCRIPT.py ARGUMENTS > OUTPUT 2>&1`; tells also what annotations it parses.

    Args:
        kill_at: SIGKILL comes some milliseconds after the start of the step that follows this one.
        signal_at: SIGTERM comes to rank 0 each time that it calls this function.
    """
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as elsewhere
    sys.argv = [f"{script}.py", *arguments]
    torch.set_num_threads(1)

    dies = kill_at is not None

    def take_step_and_die(state: TrainState, *rest: Any) -> Any:
        nonlocal dies
        # The kill before may have come late, after a checkpoint that is beyond this moment.
        if dies and state.step >= kill_at:
            dies = False
            delay = random.random() / 30
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return take_step(state, *rest)

    read = CocoReader.read

    def read_and_tell(self: CocoReader) -> Any:
        print(f"parsing {self.annotations_file.name}")
        return read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detection.engine.train.take_step", take_step_and_die)
        patch.setattr(CocoReader, "read", read_and_tell)
        if signal_at is not None and environment.get("RANK", "0") == "0":
            call = pkgutil.resolve_name(signal_at)

            def terminate_and_call(*arguments: Any) -> Any:
                os.kill(os.getpid(), signal.SIGTERM)
                return call(*arguments)

            patch.setattr(signal_at, terminate_and_call)
        {"train_det": train_det, "eval_det": eval_det}[script].main()


LAUNCHERS = {1: "python", 2: "torchrun --nproc-per-node 2"}
ON_DEVICE = [
    "data.augmentation.mosaic=0.5",
    "data.augmentation.mixup=0.5",
    "data.augmentation.photometric=0.5",
    "data.augmentation.multi_scale=[48,80,16]",
    "data.augmentation.on_device=1.5",
]


class Run:
    """A training in processes of its own.

    Args:
        folder: the run folder.
        processes: one for each rank.
        outputs: what each printed.
    """

    def __init__(self, folder: Path, processes: list[ForkServerProcess], outputs: list[Path]):
        self.folder = folder
        self.processes = processes
        self.outputs = outputs

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert all(p.is_alive() for p in self.processes), self.printed()
            time.sleep(0.005)

    def wait(self) -> list[int | None]:
        """The exit statuses, a signal's negative."""
        for process in self.processes:
            process.join(timeout=300)
        return [process.exitcode for process in self.processes]

    def printed(self) -> str:
        return "\n".join(path.read_text() for path in self.outputs if path.exists())

    def step(self) -> int:
        """The last one logged."""
        return max((line["step"] for line in self.lines()), default=0)

    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl; the one that a kill cut short is left out."""
        return RunFolder(self.folder).read_metrics()


@pytest.fixture
def start(
    tiny_model: list[str], tiny_data: list[str], tmp_path: Path
) -> Iterator[Callable[..., Run]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train_det", "eval_det", "detection.engine.run", "detection.cli"]
    )
    started: list[ForkServerProcess] = []

    def start(
        *overrides: str,
        name: str = "run",
        num_processes: int = 1,
        kill_at: int | None = None,
        signal_at: str | None = None,
        script: str = "train_det",
        data: list[str] = tiny_data,
    ) -> Run:
        folder = tmp_path / name
        common = [*tiny_model, f"run_dir={folder}"] if script == "train_det" else []
        arguments = [*common, *data, *overrides]
        environment = {}
        if num_processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(num_processes), "TORCHELASTIC_RUN_ID": "test"}
            environment |= {"LOCAL_WORLD_SIZE": str(num_processes), "GROUP_WORLD_SIZE": "1"}
        run = Run(folder, [], [])
        for rank in range(num_processes):
            output = tmp_path / f"{name}-{len(started)}.txt"
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(
                target=run_script,
                args=(script, arguments, output, environment | ranks, kill_at, signal_at),
            )
            process.start()
            started.append(process)
            run.processes.append(process)
            run.outputs.append(output)
        return run

    yield start
    for process in started:
        process.kill()
        process.join()


def list_children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("num_kills", "steps"), [(2, 30), pytest.param(20, 200, marks=pytest.mark.slow)]
)
def test_kills_at_random_moments_lose_nothing_but_the_steps_since_the_last_checkpoint(
    start: Callable[..., Run],
    run: Callable[..., Path],
    num_kills: int,
    steps: int,
    assert_equal_weights: Callable[[Path, Path], None],
):
    """The first comes before there is any checkpoint."""
    every = 7
    options = [f"trainer.steps={steps}", f"trainer.checkpoint_every={every}"]
    options += ["trainer.num_workers=1", "trainer.evaluate_every=25"]
    killed = None
    moments = [0, *sorted(random.sample(range(1, steps - 5), num_kills - 1))]
    for moment in moments:
        resume = f"resume={str(killed is not None).lower()}"
        anew = killed is not None and not any(killed.folder.glob("checkpoints/*.pt"))
        killed = start(*options, resume, name="killed", kill_at=moment)
        assert killed.wait() == [-signal.SIGKILL], killed.printed()
        files = killed.folder.glob("checkpoints/*.pt")
        saved = max((load_checkpoint(file)["step"] for file in files), default=0)
        assert killed.step() - saved <= every, moments
        assert anew == ("has no checkpoint yet: starting anew" in killed.printed())
    resumed = start("resume=true", name="killed")
    assert resumed.wait() == [0], resumed.printed()
    whole = run(*options, name="whole")
    assert_equal_weights(whole, resumed.folder)
    numbers = [(line["kind"], line["step"]) for line in resumed.lines()]
    assert numbers.count(("train", steps)) == 1 and len(numbers) == len(set(numbers))


@pytest.mark.parametrize(
    ("number", "num_processes"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)]
)
def test_a_signal_saves_and_says_how_to_go_on(
    start: Callable[..., Run], number: signal.Signals, num_processes: int
):
    """Sent to the loaders' workers as well, as a terminal and a scheduler do, and often amid an
    evaluation."""
    options = ["trainer.steps=5000", "trainer.num_workers=1", "evaluation.num_workers=1"]
    run = start(*options, "trainer.evaluate_every=2", num_processes=num_processes)
    run.wait_for(lambda: run.step() > 0)
    time.sleep(random.random())
    for process in run.processes:
        assert process.pid is not None
        os.killpg(process.pid, number)
    assert run.wait() == [0] * num_processes, run.printed()
    step = load_checkpoint(run.last)["step"]
    assert 0 < step < 5000
    line = f"stopped at step {step}; go on with: {LAUNCHERS[num_processes]} train_det.py run_dir="
    assert run.printed().count(f"{line}{run.folder} resume=true\n") == 1


@pytest.mark.slow  # half a minute: its parts are tested above and in test_cli.py
def test_the_printed_command_goes_on(
    start_script: Callable[..., subprocess.Popen[str]],
    tiny_model: list[str],
    tiny_data: list[str],
    tmp_path: Path,
):
    """In a folder that the clock of one process names, with what needs quotes; torchrun takes
    Ctrl-C for a failure of its own."""
    parent = tmp_path / "a run, no (1)"
    options = [*tiny_model, *tiny_data, "trainer.steps=100000", f"run_dir='{parent}/${{now:%f}}'"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    process = start_script("train_det.py", *options, launcher=launcher)
    while not any(Run(folder, [], []).step() for folder in parent.glob("*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0, printed
    (line,) = re.findall(r"stopped at step \d+; go on with: (.*)", printed)
    assert line.startswith("torchrun ")
    (folder,) = parent.iterdir()
    run = Run(folder, [], [])
    step = load_checkpoint(run.last)["step"]
    bin = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    again = subprocess.run(
        f"{line} trainer.steps={step + 1}",
        shell=True,
        env=environment,
        cwd=Path(train_det.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr
    assert load_checkpoint(run.last)["step"] == step + 1


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_signal_in_the_start_ends_before_the_first_step(
    start: Callable[..., Run], num_processes: int
):
    """To one process of two. What was begun goes on."""
    options = ["trainer.steps=2", "trainer.num_workers=1"]
    run = start(*options, num_processes=num_processes, signal_at="detection.engine.run.load_split")
    assert run.wait() == [0] * num_processes, run.printed()
    assert run.printed().count(f"stopped at step 0; go on with: {LAUNCHERS[num_processes]}") == 1
    assert run.lines() == [] and not run.last.exists()
    run = start("resume=true", num_processes=num_processes)
    assert run.wait() == [0] * num_processes, run.printed()
    assert load_checkpoint(run.last)["step"] == 2


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_signal_in_the_final_evaluation_ends_it(start: Callable[..., Run], num_processes: int):
    place = "detection.engine.run.metrics_table"
    run = start("trainer.steps=1", num_processes=num_processes, signal_at=place)
    assert run.wait() == [0] * num_processes, run.printed()
    assert run.printed().count(f"stopped at step 1; go on with: {LAUNCHERS[num_processes]}") == 1
    pictures = run.folder / "visualizations"
    assert not pictures.exists()
    run = start("resume=true", num_processes=num_processes)
    assert run.wait() == [0] * num_processes, run.printed()
    assert "done: best AP" in run.printed() and (pictures / "overview.jpg").exists()


def test_a_signal_ends_a_sweep(start: Callable[..., Run]):
    sweep = start("trainer.steps=100000", "seed=0,1,2", "--multirun", name="sweep")
    job = Run(sweep.folder / "0", sweep.processes, sweep.outputs)
    job.wait_for(lambda: job.step() > 0)
    sweep.processes[0].terminate()
    assert sweep.wait() == [0], sweep.printed()
    assert load_checkpoint(job.last)["step"] > 0
    assert "stopped before job 1\nstopped before job 2\n" in sweep.printed()
    assert sorted(path.name for path in sweep.folder.iterdir()) == ["0", "multirun.yaml"]


def test_a_sweep_goes_on_after_a_mistake(start: Callable[..., Run]):
    """Each job has a folder."""
    options = ["trainer.steps=1", "trainer.batch_size=4,3,8", "trainer.num_micro_batches=2"]
    sweep = start(*options, "--multirun", name="sweep")
    assert sweep.wait() == [1], sweep.printed()
    assert sweep.printed().count("error: ") == 1
    assert "error: job 1: trainer.batch_size=3 cannot be shared" in sweep.printed()
    ended = [(sweep.folder / name / "metrics.json").exists() for name in "012"]
    assert ended == [True, False, True]
    for name, batch_size in (("0", 4), ("2", 8)):
        config = RunFolder(sweep.folder / name).read_config()
        assert config.trainer.batch_size == batch_size


@pytest.mark.parametrize("stopped_at", [2, 4])
def test_a_signal_in_an_evaluation_ends_it(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    stopped_at: int,
    assert_equal_weights: Callable[[Path, Path], None],
):
    """The one that is owed comes first when the run goes on, also after the last step."""
    common = ("trainer.steps=4", "trainer.evaluate_every=2", "evaluation.batch_size=1")
    whole = run(*common, name="whole")
    forward, num_batches = Detector.forward, 0

    def forward_and_signal(self: Detector, images: torch.Tensor) -> Any:
        nonlocal num_batches
        num_batches += 1
        if num_batches == (2 if stopped_at == 2 else 7):  # the second of five images
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "forward", forward_and_signal)
        folder = run(*common, name="stopped")
    assert num_batches == (2 if stopped_at == 2 else 7)
    assert load_checkpoint(folder / "checkpoints" / "last.pt")["step"] == stopped_at
    assert f"stopped at step {stopped_at}; go on" in (folder / "train.log").read_text()
    run("resume=true", name="stopped")
    assert_equal_weights(whole, folder)
    first, second = (
        [
            {key: value for key, value in line.items() if key != "images_per_second"}
            for line in RunFolder(path).read_metrics()
        ]
        for path in (whole, folder)
    )
    assert first == second
    assert (whole / "metrics.json").read_text() == (folder / "metrics.json").read_text()
    assert (
        load_checkpoint(folder / "checkpoints" / "best.pt")["best_metric"]
        == (load_checkpoint(whole / "checkpoints" / "best.pt")["best_metric"])
    )


@pytest.mark.parametrize("resume", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_of_two_runs_in_one_folder_one_is_refused(
    start: Callable[..., Run], run: Callable[..., Path], resume: bool
):
    if resume:
        run("trainer.steps=1")
    options = ["trainer.steps=100000", f"resume={str(resume).lower()}"]
    runs = [start(*options), start(*options)]
    end = time.monotonic() + 60
    while all(one.processes[0].is_alive() for one in runs) and time.monotonic() < end:
        time.sleep(0.01)
    refused, goes_on = sorted(runs, key=lambda one: one.processes[0].is_alive())
    assert refused.processes[0].exitcode == 1, refused.printed()
    reason = r"is in use by (process \d+ on|another run)" + r"|already holds a run" * (not resume)
    (line,) = [line for line in refused.printed().splitlines() if line.startswith("error: ")]
    assert re.match(f"error: {refused.folder} ({reason})", line)
    goes_on.wait_for(lambda: goes_on.step() > 2)
    goes_on.processes[0].terminate()
    assert goes_on.wait() == [0], goes_on.printed()
    steps = [line["step"] for line in goes_on.lines() if line["kind"] == "train"]
    assert steps == list(range(1, load_checkpoint(goes_on.last)["step"] + 1))


def test_a_killed_worker_is_named(start: Callable[..., Run]):
    run = start("trainer.steps=5000", "trainer.num_workers=1", "trainer.checkpoint_every=1")
    run.wait_for(lambda: run.step() > 1)
    pid = run.processes[0].pid
    assert pid is not None
    (worker,) = list_children(pid)
    os.kill(worker, signal.SIGKILL)
    assert run.wait() == [1]
    # torch knows the signal where it learns of it at once.
    cause = r"\(pid %d\) is killed by signal: Killed|\(pid\(s\) %d\) exited unexpectedly"
    assert re.search(f"error: DataLoader worker ({cause % (worker, worker)})", run.printed())
    assert "Traceback" not in run.printed()
    assert load_checkpoint(run.last)["step"] > 0


def test_a_worker_that_dies_while_it_hands_over_is_named():
    loader = DataLoader(TensorDataset(torch.zeros(4, 1)), num_workers=1)

    def lose_the_connection(kill: bool) -> None:
        with start_loader(loader) as batches:
            (worker,) = batches._workers  # pyright: ignore
            if kill:
                os.kill(worker.pid, signal.SIGKILL)
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.* (exited|killed)"):
        lose_the_connection(kill=True)
    with pytest.raises(ConnectionResetError):
        lose_the_connection(kill=False)


def test_a_data_folder_that_vanishes_is_one_line(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    assert_equal_weights: Callable[[Path, Path], None],
):
    root = tmp_path / "shapes"
    common = (f"data.root={root}", "trainer.steps=4", "trainer.checkpoint_every=1")
    whole = run(*common, name="whole")
    (images,) = root.glob("*/images/train")
    aside = tmp_path / "aside"

    def take_step_and_the_folder(state: TrainState, *arguments: Any) -> Any:
        found = take_step(state, *arguments)
        if state.step == 1:
            images.rename(aside)
        return found

    with monkeypatch.context() as patch:
        patch.setattr("detection.engine.train.take_step", take_step_and_the_folder)
        with pytest.raises(UserError, match=f"{images}: the folder of images is gone"):
            run(*common, name="run")
    aside.rename(images)
    run("resume=true", *common, name="run")
    assert_equal_weights(whole, tmp_path / "run")


def test_a_vanished_folder_is_one_line_from_a_worker_too(
    start: Callable[..., Run], custom_data: list[str]
):
    options = ["trainer.num_workers=1", "evaluation.num_workers=1", "trainer.steps=100000"]
    run = start(*options, "trainer.evaluate_every=20", data=custom_data)
    run.wait_for(lambda: run.step() > 0)
    (word,) = [word for word in custom_data if word.startswith("data.val.images=")]
    images = Path(word.split("=")[1])
    images.rename(images.with_name("aside"))
    assert run.wait() == [1], run.printed()
    assert run.printed().splitlines()[-1].startswith(f"error: {images}: the folder of images is")
    assert run.printed().count("error: ") == 1 and "Traceback" not in run.printed()


def test_the_death_of_one_process_ends_them_all(
    tiny_model: list[str],
    tiny_data: list[str],
    tmp_path: Path,
    start_script: Callable[..., subprocess.Popen[str]],
):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = Run(tmp_path / "run", [], [])
    options = ["trainer.steps=100000", f"run_dir={run.folder}"]
    process = start_script("train_det.py", *tiny_model, *tiny_data, *options, launcher=launcher)
    while run.step() < 1:
        assert process.poll() is None
        time.sleep(0.05)
    ranks = {int(read_environment(pid)["RANK"]): pid for pid in list_children(process.pid)}
    os.kill(ranks[1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert "another process of this run has ended" in printed
    assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9", printed), printed


@pytest.mark.slow
def test_two_nodes_are_one_run(
    start_script: Callable[..., subprocess.Popen[str]],
    tiny_model: list[str],
    tiny_data: list[str],
    tmp_path: Path,
):
    """Each with a process of local rank 0, and a clock of its own that names the run folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting_point = f"127.0.0.1:{probe.getsockname()[1]}"
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-id=1", f"--rdzv-endpoint={meeting_point}"]
    folder = "run_dir=runs/${now:%Y-%m-%d_%H-%M-%S-%f}"
    options = [*tiny_model, *tiny_data, "trainer.steps=2", folder]
    nodes = [
        start_script("train_det.py", *options, launcher=launcher, cwd=tmp_path) for _ in range(2)
    ]
    printed = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    (path,) = (tmp_path / "runs").iterdir()
    run = Run(path, [], [])
    assert [line["step"] for line in run.lines()] == [1, 2, 2]
    random_states = load_checkpoint(run.last)["random_states"]
    assert len(random_states) == 2
    assert sum(f"run folder runs/{path.name}" in text for text in printed) == 1


def read_environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(ON_DEVICE, marks=pytest.mark.slow)],
    ids=["plain", "on the device"],
)
def test_two_processes_give_the_losses_of_one_also_after_a_fall_back(
    start: Callable[..., Run], run: Callable[..., Path], options: list[str]
):
    """At the same whole batch, batch norm in inference mode; five images to evaluate, for two."""
    common = ["trainer.freeze_batch_norm=true", "trainer.checkpoint_every=1", "schedule.steps=8"]
    common += options
    one = run(*common, "trainer.steps=8", "trainer.evaluate_every=6", name="one")
    common += ["trainer.evaluate_every=6", "logger=tensorboard"]
    stopped = start(*common, "trainer.steps=6", name="two", num_processes=2)
    assert stopped.wait() == [0, 0], stopped.printed()
    assert len(list((stopped.folder / "tensorboard").iterdir())) == 1
    stopped.last.write_bytes(stopped.last.read_bytes()[:1000])
    two = start("resume=true", "trainer.steps=8", name="two", num_processes=2)
    assert two.wait() == [0, 0], two.printed()
    assert two.printed().count("step_00000005.pt, step 5") == 1
    expected, found = Run(one, [], []).lines(), two.lines()
    assert [line["step"] for line in expected] == [line["step"] for line in found]
    for a, b in zip(expected, found, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert expected[-1]["AP"] == pytest.approx(found[-1]["AP"], abs=1e-6)


def test_two_processes_measure_what_they_save(start: Callable[..., Run]):
    """Batch norm's statistics are each process's own, and those of one are saved."""
    options = ["trainer.ema_decay=0.5", "evaluation.batch_size=1", "trainer.steps=4"]
    run = start(*options, "optimizer.lr=0.01", "schedule=constant", num_processes=2)
    assert run.wait() == [0, 0], run.printed()
    output = run.folder / "again"
    options = [f"checkpoint={run.last}", "device=cpu", "evaluation.batch_size=1"]
    again = start(*options, f"output={output}", script="eval_det", data=[])
    assert again.wait() == [0], again.printed()
    expected, found = (
        json.loads((folder / "metrics.json").read_text()) for folder in (run.folder, output)
    )
    for name in ("AP", "AP50", "loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_two_processes_detect_what_one_does(
    start: Callable[..., Run], custom_data: list[str], trained: Path, tmp_path: Path
):
    """Five images for two, each a batch of its own, as the size of a batch may change rounding."""
    options = [f"checkpoint={trained / 'checkpoints' / 'last.pt'}", "device=cpu"]
    options += ["evaluation.num_workers=1", "evaluation.batch_size=1"]
    results, metrics = [], []
    for num_processes in (1, 2):
        output = tmp_path / str(num_processes)
        own = {"num_processes": num_processes, "script": "eval_det", "data": custom_data}
        run = start(*options, f"output={output}", **own)
        assert run.wait() == [0] * num_processes, run.printed()
        found = json.loads((output / "detections.json").read_text())
        results.append(sorted(found, key=lambda result: sorted(map(str, result.items()))))
        metrics.append(json.loads((output / "metrics.json").read_text()))
    assert len({result["image_id"] for result in results[0]}) == 5
    assert results[0] == results[1]
    one, two = metrics
    losses = [name for name in one if name.startswith("loss")]
    assert [one.pop(name) for name in losses] == pytest.approx([two.pop(name) for name in losses])
    assert one == two


@pytest.fixture
def custom_data(tmp_path: Path) -> list[str]:
    """A split that no run has seen, and old enough to be kept as parsed."""
    folder = provide(Recipe(num_train=10, num_val=5, image_size=(64, 80)), tmp_path / "shapes")
    overrides = ["data=custom"]
    for split in ("train", "val"):
        annotations = folder / "annotations" / f"instances_{split}.json"
        os.utime(annotations, (0, 0))
        for path in (folder / "images" / split).iterdir():
            os.utime(path, (0, 0))
        overrides += [f"data.{split}.images={folder / 'images' / split}"]
        overrides += [f"data.{split}.annotations={annotations}"]
    return overrides


def test_one_of_two_processes_parses_the_annotations(
    start: Callable[..., Run], custom_data: list[str]
):
    run = start("trainer.steps=1", num_processes=2, data=custom_data)
    assert run.wait() == [0, 0], run.printed()
    first, second = (path.read_text() for path in run.outputs)
    assert first.count("parsing instances_") == 2 and "parsing" not in second


def test_annotations_that_one_process_cannot_read_end_both(
    start: Callable[..., Run], custom_data: list[str], trained: Path
):
    file = Path(custom_data[-1].split("=")[1])
    file.write_text("{")
    option = f"checkpoint={trained / 'checkpoints' / 'best.pt'}"
    run = start(option, num_processes=2, script="eval_det", data=custom_data)
    assert run.wait() == [1, 1], run.printed()
    first, second = (path.read_text().splitlines()[-1] for path in run.outputs)
    assert first == second and first.startswith(f"error: {file}")
    # The second did not try.
    assert "parsing" not in run.outputs[1].read_text()


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_processes_share_the_cache_of_images(
    start: Callable[..., Run],
    run: Callable[..., Path],
    custom_data: list[str],
    tmp_path: Path,
    kind: str,
    assert_equal_weights: Callable[[Path, Path], None],
):
    """Two epochs and more; nothing of a cache in memory is left."""
    before = set(SHARED_MEMORY.iterdir())
    options = ["trainer.steps=8", "data.shrink=1", "data.augmentation.photometric=0.5"]
    cached = [f"trainer.image_cache={kind}", "trainer.num_workers=1"]
    if kind == "disk":
        cached += [f"trainer.image_cache_folder={tmp_path / 'kept'}"]
    two = start(*options, *cached, name="two", num_processes=2, data=custom_data)
    assert two.wait() == [0, 0], two.printed()
    plain = start(*options, name="plain", num_processes=2, data=custom_data)
    assert plain.wait() == [0, 0], plain.printed()
    assert_equal_weights(two.folder, plain.folder)
    assert two.printed().count("image cache: 10 images") == 1
    assert not {
        path.name for path in set(SHARED_MEMORY.iterdir()) - before if "condconv" in path.name
    }
    if kind == "disk":
        (file,) = (tmp_path / "kept").iterdir()
        filled = np.fromfile(file, np.uint8) > 0
        assert filled.mean() > 0.95  # so the place of each image is
