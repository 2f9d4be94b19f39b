"""Fixtures of the numerical tests; the models and losses themselves are in cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import CASES, Case


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> Iterator[None]:
    """Sums are ordered by the number of threads; no test draws numbers that an earlier test moved."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each tiny model with its loss and batch, freshly built."""
    return CASES[request.param]()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of gnlib, where training is allowed."""
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("CI", raising=False)
    return tmp_path
