"""An optimiser class of the user's own: found by its import path, and known by what its files hold."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from contextlib import suppress
from modulefinder import ModuleFinder
from pathlib import Path

from torch.optim import Optimizer

from gnlib.config import ConfigError


def imported(path: str) -> type[Optimizer]:
    """The torch.optim.Optimizer class at an import path; ConfigError if there is none."""
    module_name, _, class_name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")) or not module_name:
        raise ConfigError(f"method.inner.optimizer: {path!r} is no import path such as my_module.MyOptimizer")
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # whatever the module does as it is imported
        why = (str(error).strip().splitlines() or [""])[0]
        why = why if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {why}"
        raise ConfigError(f"method.inner.optimizer: cannot import {path!r} ({why})") from None
    if not (inspect.isclass(kind) and issubclass(kind, Optimizer)):
        raise ConfigError(f"method.inner.optimizer: {path!r} is no torch.optim.Optimizer class")
    return kind


def source_hash(name: str) -> str | None:
    """12 hex digits of the SHA-256 of the file that an import path's class is in, and of the files that it imports from
    the same folder or package; None for torch's and for a name that is no path."""
    if "." not in name or name.partition(".")[0] == "torch":
        return None
    kind = imported(name)
    try:
        path = inspect.getsourcefile(kind)
    except TypeError:  # made by an extension module
        return None
    if not path or not Path(path).exists():
        return None
    files = sorted({Path(path).resolve(), *_imported_beside(kind.__module__, Path(path).resolve())})
    contents = [file.read_bytes() for file in files]
    if len(contents) > 1:
        contents = [hashlib.sha256(content).digest() for content in contents]
    return hashlib.sha256(b"".join(contents)).hexdigest()[:12]


def _imported_beside(module: str, path: Path) -> set[Path]:
    """What a module imports, and what that imports, as far as it lies below the folder that the module is found in; of
    an installed package nothing, as its version speaks for it."""
    depth = module.count(".") + (path.name == "__init__.py")
    root = path.parents[depth]
    if {"site-packages", "dist-packages"} & set(path.parts):
        return set()
    finder = ModuleFinder(path=[str(root)])
    with suppress(ImportError, SyntaxError):
        finder.import_hook(module)
    return {Path(found.__file__).resolve() for found in finder.modules.values() if found.__file__}  # type: ignore[attr-defined]
