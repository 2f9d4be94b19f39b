"""What a run makes of the CPU."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from gnlib.processor import use_processor

STEPS = """
import resource, torch
from gnlib.processor import use_processor
use_processor(1)
def step():  # 192 MiB of activations, let go at its end
    kept = [torch.ones(2**22) for _ in range(12)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 2 * 12 * 2**24 // 4096  # nearly all of which are faulted in by default


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_step_does_not_fault_in_the_memory_that_the_last_one_let_go() -> None:
    faults = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True).stdout
    assert int(faults) < PAGES / 4  # where a tensor lies may differ from step to step


def test_where_glibc_takes_no_such_threshold_the_largest_that_it_takes_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other alone would make things worse than they were."""
    for most, expected in ((2**30, [(-3, 2**30), (-1, 2**30)]), (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**30)]),
                           (0, [(-3, 2**30), (-3, 2**25)])):  # fmt: skip
        calls: list[tuple[int, int]] = []

        class Library:
            @staticmethod
            def mallopt(what: int, size: int, calls: list[tuple[int, int]] = calls, most: int = most) -> int:
                calls.append((what, size))
                return int(what == -1 or size <= most)

        monkeypatch.setattr("ctypes.CDLL", lambda name, found=Library: found)
        use_processor(1)
        assert calls == expected


def test_it_sets_the_threads_where_the_c_library_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    use_processor(3)
    assert asked == [3]
