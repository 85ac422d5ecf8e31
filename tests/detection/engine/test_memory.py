from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from detection.engine import memory

# Asks 10 times for the 64 MiB that it has just freed.
COUNT_FAULTS = """
import resource, sys, torch
from detection.engine.memory import keep_freed_memory
assert sys.argv[1] == "give" or keep_freed_memory()
for _ in range(20):  # aligned blocks fit into those before only after some
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_used_again():
    def count_faults(mode: str) -> int:
        command = [sys.executable, "-c", COUNT_FAULTS, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert count_faults("keep") < 0.2 * count_faults("give")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
