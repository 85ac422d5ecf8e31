from __future__ import annotations

import pytest

from detection.engine.processes import join_processes, launcher
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
