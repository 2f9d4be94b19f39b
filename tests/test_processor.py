"""What a run makes of the CPU."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from gnlib.processor import use_processor

STEPS = """
import resource, sys, torch
from gnlib.processor import use_processor
if sys.argv[1] == "kept":
    use_processor(1)
def step():  # 64 MiB of activations, let go at its end
    kept = [torch.ones(2**22) for _ in range(4)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_step_does_not_fault_in_the_memory_that_the_last_one_let_go() -> None:
    pages = 10 * 4 * 2**24 // 4096
    assert faults("by default") > pages / 2  # else there would be nothing to keep
    assert faults("kept") < pages / 100


def test_it_sets_the_threads_where_the_c_library_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    use_processor(3)
    assert asked == [3]
