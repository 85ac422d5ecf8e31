from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_index
from benchmarks.bench_index import (
    compare_memory,
    compare_times,
    in_fresh_process,
    measure_workers,
    open_index,
)


def test_an_index_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bench_index.write_data(tmp_path, 3, 21)
    open_index(tmp_path)
    (cache,) = (tmp_path / "cache").rglob("*.pt")
    boxes = open_index(tmp_path)._content["boxes"]
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(cache) in line
    ]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    assert any(start <= boxes.data_ptr() < end for start, end in spans)


@pytest.mark.slow
def test_workers_share_what_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bench_index.write_data(tmp_path, 3000, 21_000)
    # Of a process in which other tests have run, workers write to more than is theirs.
    nothing, ours = (
        in_fresh_process(measure_workers, tmp_path, which, "fork") for which in ("nothing", "ours")
    )
    theirs = measure_workers(tmp_path, "CocoDetection", "fork")
    assert compare_memory({"nothing": nothing, "ours": ours}) == []
    for (_, own), (_, other), (_, bare) in zip(ours, theirs, nothing, strict=True):
        assert own - bare < 20 < other - bare


def test_targets_of_memory():
    bare = [(10.0, 10.0)]
    for worker, words in [
        ((29.0, 29.0), []),
        ((31.0, 31.0), ["worker 0 takes more than 20 MB"]),
        ((11.0, 17.0), ["worker 0 grows by more than 5 MB an epoch"]),
    ]:
        assert compare_memory({"nothing": bare, "ours": [worker], "CocoDetection": bare}) == words


@pytest.mark.parametrize(
    ("seconds", "num_missed"),
    [((10, 14, 0.4), 0), ((10, 16, 0.4), 1), ((10, 14, 0.6), 1), ((10, 16, 0.6), 2)],
)
def test_targets_of_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: tuple[float, float, float],
    num_missed: int,
):
    answers = iter(seconds * 3)
    monkeypatch.setattr(bench_index, "in_fresh_process", lambda *_: next(answers))
    assert len(compare_times(tmp_path, 3)) == num_missed
