"""What a run leaves behind: one file of JSON lines, and a checkpoint while it is under way.

    line 1      {"config": ..., "environment": ...}
    then        one row per evaluated outer step (the columns of `Row`)
    last line   {"status": "finished"} or {"status": "diverged"}; absent while the run is under way

Lines are written whole. A torn last line, left by a killed process, is dropped by the reader. A resumed run first cuts
the rows back to its checkpoint, so that a record never holds a step twice.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch

from gnlib.config import ConfigError, RunConfig
from gnlib.files import home, replacing


class Row(TypedDict):
    """State after an outer step; step 0 is the start."""

    outer_step: int
    tokens_train: int  # read by inner steps so far
    tokens_search: int  # read by line searches so far
    flops: float  # of the model's matrix products so far, line search included; not evaluation, not the optimisers' own
    wall_s: float  # seconds so far in outer steps, evaluation not included
    peak_bytes: int  # largest memory: of the GPU's tensors, or resident on CPU
    train_loss: float | None  # nats per token at theta_t on this step's training batches; None at the start
    val_loss: float | None  # nats per token on the validation sequences; None if not finite
    step_size: float | None  # of the line search; 1 without one
    search_gain: float | None  # nats per token that the line search found; None without one


@dataclass
class Record:
    """A run as read from its file."""

    config: RunConfig
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    status: str = "unfinished"
    label: str | None = field(default=None, compare=False)
    """What a study calls the run; not in the file."""

    @property
    def ended(self) -> bool:
        return self.status in ("finished", "diverged")


def read(path: Path) -> Record | None:
    """The record in a file, without a torn last line; None if there is not even a first line of a record, or an end
    without a row. ConfigError, naming the file, for a configuration that is none of this version.
    """
    lines = _whole_lines(path)
    first = next(lines, {})
    if "config" not in first:
        return None
    record = Record(_parsed(path, first), first.get("environment", {}))
    for line in lines:
        if "status" in line:
            record.status = line["status"]
        else:
            record.rows.append(line)  # type: ignore[arg-type]
    return record if record.rows or not record.ended else None


def read_config(path: Path) -> RunConfig | None:
    """The configuration alone, from the first line."""
    first = next(_whole_lines(path), {})
    return _parsed(path, first) if "config" in first else None


def _parsed(path: Path, first: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.parse(first["config"])
    except ConfigError as error:
        raise ConfigError(f"{path} is of another version: {error}") from None


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                parsed = json.loads(line)
            except ValueError:  # no JSON, or no text
                return
            if not line.endswith(b"\n") or not isinstance(parsed, dict):
                return
            yield parsed


def write(path: Path, record: Record) -> None:
    """The whole record, under a temporary name first."""
    lines: list[Any] = [{"config": record.config.model_dump(mode="json"), "environment": record.environment}]
    lines += record.rows
    if record.ended:
        lines.append({"status": record.status})
    with replacing(path) as temporary:
        temporary.write_text("".join(_line(line) for line in lines))


def append(path: Path, line: Any) -> None:
    """One more line, in one write."""
    with open(path, "a") as file:
        file.write(_line(line))


def _line(line: Any) -> str:
    return json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, git revision and device; nothing that names the machine or its user."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_optimizer": version("pytorch_optimizer"),
        "gnlib": _revision(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


def _revision() -> str:
    """$GNLIB_REVISION, for copies of a checkout; else its commit, with `+` for local changes but of what runs write
    (records, figures, outputs of notebooks); `unknown` outside one."""
    if "GNLIB_REVISION" in os.environ:
        return os.environ["GNLIB_REVISION"]
    git = ["git", "-C", str(home())]
    commit = [*git, "describe", "--always", "--abbrev=12"]
    changed = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!data", ":!figures", ":!notebooks"]
    try:
        name = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
        return name + ("+" if subprocess.run(changed, capture_output=True).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
