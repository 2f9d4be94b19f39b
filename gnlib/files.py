"""Where files live, and writing them so that a reader never sees half of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from threading import get_ident
from typing import Any

import torch
from filelock import FileLock, Timeout

from gnlib.config import ConfigError

PATIENCE = 2.0
"""Seconds that a process waits for another before it says so."""


def home() -> Path:
    """The folder with data/, figures/ and notebooks/: $GNLIB_HOME, which must exist, else the checkout, else the
    working directory."""
    if "GNLIB_HOME" in os.environ:
        chosen = Path(os.environ["GNLIB_HOME"])
        if not chosen.is_dir():  # a slip would look like a checkout without records
            raise ConfigError(f"GNLIB_HOME: no folder {str(chosen)!r}")
        return chosen
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "pyproject.toml").exists() else Path.cwd()


def data_folder() -> Path:
    """Prepared token files, start checkpoints and run folders; $GNLIB_DATA, made where it is first written to, else
    data/ under home."""
    if not os.environ.get("GNLIB_DATA"):
        return home() / "data"
    chosen = Path(os.environ["GNLIB_DATA"])
    there = next(path for path in (chosen, *chosen.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise ConfigError(f"GNLIB_DATA: {str(there)!r} is no folder; a folder is needed, or where one can be made")
    return chosen


def _make(folder: Path) -> None:
    """With those above it; ConfigError where $GNLIB_DATA is why it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if (chosen := os.environ.get("GNLIB_DATA")) and folder.is_relative_to(chosen):
            raise ConfigError(f"GNLIB_DATA: cannot make the folder {str(folder)!r} ({error.strerror})") from None
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it if the body succeeds and removed if not."""
    _make(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.tmp")  # a sweep's threads write too
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # before the rename: a crash must not leave an empty file under the name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`.lock, so that two processes never make the same thing at once."""
    _make(path.parent)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        print(f"gnlib: {path}: another process is at it; waiting", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_tensors(path: Path, device: torch.device) -> Any:
    """What torch saved there, as tensors and plain values; ConfigError for a file that is none or was cut short."""
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except (torch.OutOfMemoryError, torch.AcceleratorError, PermissionError):
        raise  # none of which the file can help
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, UnpicklingError) as error:
        raise ConfigError(f"{path}: damaged ({type(error).__name__}); delete it, and it is made anew") from None
