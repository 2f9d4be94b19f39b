"""The command line's arguments: commands and values, with one line for what is wrong with them."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from functools import partial, wraps
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import tyro

from gnlib.config import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


class Commands:
    """Functions as subcommands by tyro: each is called once its arguments are parsed, outside of the parser."""

    def __init__(self) -> None:
        self._app = tyro.extras.SubcommandApp()

    def command(self, function: F) -> F:
        @wraps(function)
        def chosen(*arguments: Any, **options: Any) -> Callable[[], Any]:
            return partial(function, *arguments, **options)

        self._app.command(chosen)
        return function

    def cli(self, **options: Any) -> None:
        """As `tyro.cli`; ConfigError of one line for wrong arguments."""
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                call = self._app.cli(**options)
        except SystemExit as stop:
            if not stop.code:
                raise
            raise ConfigError(one_line(said.getvalue())) from None
        call()


def one_line(box: str) -> str:
    """What a box of tyro's says: of each part the first paragraph, of options that it thinks were meant the names.

    Where the terminal has no lines to draw with, a title and a rule stand for the box.
    """
    rows = box.splitlines()
    inside = [row.strip("│ ") for row in [row for row in rows if row.startswith("│")] or rows[2:]]
    parts = [list(part) for is_rule, part in groupby(inside, key=_is_rule) if not is_rule]
    return "; ".join(map(_short, parts)) or box.strip()


def _is_rule(row: str) -> bool:
    return len(row) > 2 and set(row) <= {"─", "-"}


def _short(part: list[str]) -> str:
    first = part[: part.index("")] if "" in part else part
    if not first[0].startswith("Perhaps you meant"):
        said = " ".join(first).removesuffix(".").removeprefix("Argument helptext: ")
        return re.sub(r"^For full helptext,? \w+:? ", "see ", said)
    names = (row.split()[0] for row in first if row.startswith("--"))
    return f"near: {', '.join(dict.fromkeys(names))}"


def assignment(text: str, option: str = "--set") -> tuple[str, object]:
    """field=value, the value as JSON or as Python writes it (False, None, (0.9, 0.95)), else a bare word."""
    field, equals, value = text.partition("=")
    if not (field and equals):
        raise ConfigError(f"{option} {text}: expected field=value")
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return field, read(value)
    return field, value


def writable(path: Path | None) -> None:
    """ConfigError, before the work, where its result could not be written."""
    if path is None:
        return
    if not path.name or path.is_dir():
        raise ConfigError(f"json: {path} is a folder; a file's name is needed")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"json: no folder {folder}")
    try:
        TemporaryFile(dir=folder).close()  # its permissions do not tell: of a read-only disk, or to root
    except OSError as error:
        raise ConfigError(f"json: cannot write in {folder} ({error.strerror})") from None
