"""A record is JSON lines that can be read at any moment of the run, and says nothing about who made it."""

from __future__ import annotations

import getpass
import json
import math
import os
import platform
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from gnlib import record as records
from gnlib.profiles import run_config
from gnlib.record import Record, Row


def row(step: int, **changes: Any) -> Row:
    plain: Row = {
        "outer_step": step, "tokens_train": 1000 * step, "tokens_search": 250 * step, "flops": 1.5e9 * step,
        "wall_s": 0.1 * step, "peak_bytes": 1 << 30, "train_loss": None if step == 0 else 1 / 3, "val_loss": 2 / 3,
        "step_size": None if step == 0 else 2**-0.5, "search_gain": None,
    }  # fmt: skip
    return plain | changes  # type: ignore[return-value, operator]


def made(status: str = "finished", steps: int = 2) -> Record:
    config = run_config("tiny", "gauss_newton", seed=3, use_tuned=False)
    return Record(config, {"python": "3.11.0"}, [row(step) for step in range(steps + 1)], status)


def strict(line: str) -> Any:
    """Parsed as JSON proper: Python's NaN and Infinity are refused."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "record.jsonl"


@pytest.mark.parametrize("status", ["finished", "diverged", "unfinished"])
def test_a_record_reads_back_as_it_was_written(path: Path, status: str) -> None:
    records.write(path, made(status))
    assert records.read(path) == made(status)
    kinds = [set(strict(line)) for line in path.read_text().splitlines()]
    ending = [] if status == "unfinished" else [{"status"}]
    assert kinds == [{"config", "environment"}, *[set(Row.__annotations__)] * 3, *ending]


def test_rows_appended_one_by_one_make_the_record_written_at_once(path: Path) -> None:
    whole = made()
    records.write(path, Record(whole.config, whole.environment, whole.rows[:1]))
    for line in [*whole.rows[1:], {"status": "finished"}]:
        records.append(path, line)
    appended = path.read_bytes()
    records.write(path, whole)
    assert appended == path.read_bytes()


def test_a_record_without_a_status_line_is_unfinished_and_has_not_ended(path: Path) -> None:
    records.write(path, made("unfinished"))
    read = records.read(path)
    assert read is not None and (read.status, read.ended) == ("unfinished", False)
    assert made("finished").ended and made("diverged").ended


def test_a_record_torn_anywhere_reads_as_its_whole_lines(path: Path) -> None:
    records.write(path, made())
    whole = path.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    for size in [*range(ends[0] - 2, len(whole), 7), *ends, *(end - 1 for end in ends)]:
        path.write_bytes(whole[:size])
        lines = sum(end <= size for end in ends)
        read = records.read(path)
        if lines == 0:
            assert read is None
        else:
            assert read is not None and read.rows == made().rows[: lines - 1]
            assert read.ended == (lines == len(ends))


def test_a_missing_or_empty_file_or_another_kind_of_file_is_no_record(path: Path) -> None:
    assert records.read(path) is None
    path.parent.mkdir()
    for text in ("", "\n", "not JSON\n", '{"status": "finished"}\n', "3\n", '["config"]\n', '"config"\n', "null\n"):
        path.write_text(text)
        assert records.read(path) is None and records.read_config(path) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_never_written(path: Path, value: float) -> None:
    records.write(path, made("unfinished"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        records.append(path, row(3, val_loss=value))
    assert path.read_bytes() == before
    assert records.finite(value) is None and records.finite(-0.5) == -0.5


def test_a_failed_rewrite_leaves_the_old_record_and_no_other_file(path: Path) -> None:
    records.write(path, made())
    with pytest.raises(ValueError, match="JSON"):
        records.write(path, Record(made().config, {}, [row(0, val_loss=math.nan)]))
    assert records.read(path) == made()
    assert os.listdir(path.parent) == ["record.jsonl"]


def test_the_environment_names_no_user_host_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"USER": "ada-lovelace", "LOGNAME": "ada-lovelace", "HOSTNAME": "engine-7", "HOME": str(tmp_path / "ada")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.setattr(getpass, "getuser", lambda: "ada-lovelace")
    monkeypatch.setattr(socket, "gethostname", lambda: "engine-7")
    monkeypatch.setattr(platform, "node", lambda: "engine-7")
    found = records.environment(torch.device("cpu"))
    assert set(found) == {"python", "torch", "pytorch_optimizer", "gnlib", "device"}
    assert found["gnlib"] == "unknown"  # outside a checkout
    assert not re.search(r"ada|engine|/|\\", json.dumps(found))


def test_the_environment_has_the_commit_and_a_plus_for_local_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    shipped = tmp_path / "data" / "tuned.json"
    shipped.parent.mkdir()
    for path in (tmp_path / "file", shipped):
        path.write_text("one")
    commit = ["-c", "commit.gpgsign=false", "commit", "-qm", "first"]
    for arguments in (["init", "-q"], ["add", "."], commit):
        subprocess.run([*git, *arguments], check=True)
    revision = records.environment(torch.device("cpu"))["gnlib"]
    assert re.fullmatch(r"[0-9a-f]{12}", revision)
    shipped.write_text("two")  # as tuning does before the data orders run
    assert records.environment(torch.device("cpu"))["gnlib"] == revision
    (tmp_path / "file").write_text("two")
    assert records.environment(torch.device("cpu"))["gnlib"] == revision + "+"
    monkeypatch.setenv("GNLIB_REVISION", "0123456789ab")  # says more than a copy's own git
    assert records.environment(torch.device("cpu"))["gnlib"] == "0123456789ab"
