"""English that every Python carries: paragraphs of the standard library's docstrings, so that the first run needs no
download.

The text depends on the Python build only (Debian leaves out tkinter): not on installed packages, locale, hash seed or
working directory.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from functools import lru_cache
from pathlib import Path

from gnlib.config import ConfigError

_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages"}  # no prose of Python
_COMPILED = ("_collections", "_functools", "_io", "_thread", "builtins", "gc", "itertools", "posix", "time")
_SIGNATURE = re.compile(r"\s*[\w.]+\s?\(.*\)\s*(->.*)?:?")


def library() -> Path:
    """The folder of the standard library; ConfigError for a Python without its sources."""
    root = Path(sysconfig.get_path("stdlib"))
    if not _topics(root).exists():
        raise ConfigError(f"data.source: this Python has no library sources in {root}; name a file or folder of text")
    return root


def _topics(root: Path) -> Path:
    return root / "pydoc_data" / "topics.py"


def _modules(root: Path) -> list[Path]:
    """Sources of the standard library; what others have installed in its folder is left out by name."""
    names = sys.stdlib_module_names
    tops = [root / f"{name}.py" for name in names] + [path for name in names for path in (root / name).rglob("*.py")]
    found = (path for path in tops if path.is_file() and not _SKIPPED.intersection(path.relative_to(root).parts))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def sources(root: Path) -> list[Path]:
    """The files that the text comes from, but for the modules linked into the interpreter."""
    return [*_modules(root), _topics(root)]


@lru_cache(maxsize=1)  # parsed twice otherwise (tokenizer, tokens), at 5 s each for 2 MB
def documents() -> tuple[str, ...]:
    """One a module or help topic, in a fixed order; no paragraph twice."""
    root = library()
    seen: set[str] = set()
    groups = [_parsed(path) for path in _modules(root)] + [_compiled(name) for name in _COMPILED]
    groups += [[text] for _, text in sorted(_literal(_topics(root)).items())]
    found = []
    for group in groups:
        paragraphs = [text for docstring in group for text in _prose(docstring)]
        new = [text for text in dict.fromkeys(paragraphs) if text not in seen]  # none in both training and validation
        seen.update(new)
        if new:
            found.append("\n\n".join(new))
    return tuple(found)


def _parsed(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library's own sources
        tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [ast.get_docstring(node) or "" for node in nodes]


def _compiled(name: str) -> list[str]:
    """Modules linked into the interpreter, so that no file of the same name can stand in for them."""
    if name not in sys.builtin_module_names:
        return []
    members = [value for key, value in sorted(vars(importlib.import_module(name)).items()) if not key.startswith("_")]
    classes = [value for value in members if inspect.isclass(value) and value.__module__ in (name, name.lstrip("_"))]
    # a notebook replaces functions of builtins (input), and must see the same text
    routines = [value for value in members if inspect.isbuiltin(value) and name != "builtins"]
    methods = [value for kind in classes for _, value in sorted(vars(kind).items()) if inspect.isroutine(value)]
    texts = (getattr(value, "__doc__", None) for value in [*classes, *methods, *routines])
    return [inspect.cleandoc(text) for text in texts if isinstance(text, str)]


def _literal(path: Path) -> dict[str, str]:
    values = [node.value for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.Assign)]
    topics: dict[str, str] = ast.literal_eval(values[-1])
    return topics


def _prose(docstring: str) -> list[str]:
    """Paragraphs of English: no doctests, signatures, code, tables or outlines; spaces collapsed."""
    kept = []
    for block in re.split(r"\n\s*\n", docstring):
        lines = block.split("\n")
        session = [i for i, line in enumerate(lines) if line.lstrip().startswith(">>>")]
        prose = [line for line in lines[: session[0] if session else None] if not _SIGNATURE.fullmatch(line)]
        text = " ".join(" ".join(prose).split())
        plain = sum(character.isalpha() or character in " ,.'" for character in text)
        if len(text.split()) >= 4 and plain >= 0.9 * len(text):
            kept.append(text)
    return kept
