"""Text sources: a name (`docstrings`, `c4`) or a path -> documents, one at a time, in bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from gnlib import docstrings
from gnlib.config import ConfigError
from gnlib.files import home

EXTENSIONS = tuple(kind + packing for kind in (".txt", ".jsonl", ".parquet") for packing in ("", ".gz", ".zst"))
C4 = "allenai/c4"
C4_REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"  # pinned: a resumed preparation must read the same rows
_ALLOWED = "allowed: docstrings, c4, synthetic, a .txt, .jsonl or .parquet file (also .gz, .zst), a folder of them"
_DOCUMENT_CHARACTERS = 8192


class Document(NamedTuple):
    text: str
    group: str | None = None
    """What it is a piece of, if a field was named for that."""


def documents(source: str, skip: int = 0) -> Iterator[str]:
    """The texts of `grouped_documents`."""
    return (document.text for document in grouped_documents(source, skip))


def grouped_documents(source: str, skip: int = 0, group: str | None = None) -> Iterator[Document]:
    """The documents of `source` in a fixed order, without the first `skip`; `ConfigError` if they cannot be read.

    `docstrings`; `c4` (streamed from Hugging Face) or `c4:FOLDER` (a local copy read the same way); the path of a file
    (field or column `text`) or a folder, its files sorted by path, without hidden ones. A .txt file in a folder is one
    document; a lone one is split at two or more blank lines or, if it has none, at the first blank line past 8 kB (line
    end past 16 kB). Empty documents of files are dropped. A document, a line and a row group of a parquet file must
    each fit in memory.

    `group` names a field of .jsonl rows or a column of .parquet files, whose text up to the first `#` is the group.
    """
    if source == "docstrings":
        refuse_group(source, group)
        return map(Document, islice(docstrings.documents(), skip, None))
    if source == "c4" or source.startswith("c4:"):
        refuse_group(source, group)
        return map(Document, _stream(None if source == "c4" else str(located(source)), skip))
    files = _files(source)
    whole = located(source).is_dir()
    found = (document for path in files for document in _read(path, whole, group))
    return islice((document for document in found if document.text.strip()), skip, None)


def refuse_group(source: str, group: str | None) -> None:
    """ConfigError if a field is named for a source whose documents have none."""
    if group:
        raise ConfigError(f"data.group: {source} has no field {group}; allowed for .jsonl and .parquet files")


def identity(source: str) -> list[str]:
    """What the text of `source` depends on: names, sizes (bytes) and SHA-256 of its files, or the revision of C4."""
    if source == "c4":
        return [C4, "en", C4_REVISION]
    if source == "docstrings":
        root = docstrings.library()
        return [sys.version, *(_summary(path, root) for path in docstrings.sources(root))]
    folder = located(source)
    return [_summary(path, folder) for path in _files(source)]


def check(source: str) -> None:
    """ConfigError where the text is not on this machine, without reading it; C4 is fetched when it is read."""
    if source == "docstrings":
        docstrings.library()
    elif source not in ("synthetic", "c4"):
        _files(source)


def one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Files


def located(source: str) -> Path:
    """The path of a file source: as given, else below the folder that holds data/, wherever one works from."""
    path = Path(source.removeprefix("c4:")).expanduser()
    return path if path.exists() or path.is_absolute() else home() / path


def _files(source: str) -> list[Path]:
    path = located(source)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
        files = sorted((file for file in found if file.name.endswith(EXTENSIONS)), key=lambda file: file.as_posix())
        if not files:
            raise ConfigError(f"data.source: no {', '.join(EXTENSIONS)} file in the folder {source}")
        return files
    if not path.exists():
        where = "" if Path(source).is_absolute() else f" here or in {home()}"
        raise ConfigError(f"data.source: {source}: no such source, nor a file{where}; {_ALLOWED}")
    if not path.name.endswith(EXTENSIONS):
        raise ConfigError(f"data.source: {source}: unknown extension; allowed: {', '.join(EXTENSIONS)}")
    return [path]


def _is_hidden(path: Path) -> bool:
    """By itself or in a hidden folder, as the copies that a notebook keeps."""
    return any(part.startswith(".") for part in path.parts)


def _summary(path: Path, root: Path) -> str:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"data.source: {path}: unreadable ({one_line(error)})") from None
    return f"{path.relative_to(root).as_posix()} {path.stat().st_size} {digest}"


def _read(path: Path, whole: bool, group: str | None) -> Iterator[Document]:
    kind = next(suffix for suffix in reversed(path.suffixes) if suffix not in (".gz", ".zst"))
    readers: dict[str, Callable[[Path, str | None], Iterator[Document]]] = {".jsonl": _jsonl, ".parquet": _parquet}
    try:
        if kind in readers:
            yield from readers[kind](path, group)
        else:
            refuse_group(str(path), group)
            yield from map(Document, (_whole if whole else _txt)(path))
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's and the decoders' are ValueErrors
        raise ConfigError(f"data.source: {path}: unreadable ({one_line(error)})") from None


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        stream: BinaryIO = pyarrow.input_stream(str(path), compression="zstd")
        return stream
    return open(path, "rb")


def _lines(path: Path) -> Iterator[str]:
    with _open(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        yield from text


def _whole(path: Path) -> Iterator[str]:
    yield "".join(_lines(path)).strip()


def _txt(path: Path) -> Iterator[str]:
    separated = _has_two_blank_lines(path)
    lines: list[str] = []
    size = blanks = 0
    for line in _lines(path):
        blanks = 0 if line.strip() else blanks + 1
        size += len(line)
        lines.append(line)
        long = size > 2 * _DOCUMENT_CHARACTERS or (size > _DOCUMENT_CHARACTERS and blanks > 0)
        if blanks == 2 if separated else long:
            yield "".join(lines).strip()
            lines, size = [], 0
    yield "".join(lines).strip()


def _has_two_blank_lines(path: Path) -> bool:
    """Between text; a pass of its own, because the rule depends on the whole file, which may not fit in memory."""
    text, blanks = False, 0
    for line in _lines(path):
        if line.strip():
            if text and blanks >= 2:
                return True
            text, blanks = True, 0
        else:
            blanks += 1
    return False


def _document(text: str, row: dict[str, Any], group: str | None, where: str) -> Document:
    if group and row.get(group) is None:
        raise ConfigError(f"data.group: {where} has no {group} among {', '.join(row)}")
    return Document(text, str(row[group]).split("#")[0] if group else None)


def _jsonl(path: Path, group: str | None) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"data.source: {path}: line {number} is not JSON ({error.msg})") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ConfigError(f'data.source: {path}: line {number} is not an object with a string "text"')
            yield _document(row["text"], row, group, f"{path}: line {number}")


def _parquet(path: Path, group: str | None) -> Iterator[Document]:
    with tempfile.TemporaryDirectory() if path.suffix != ".parquet" else contextlib.nullcontext() as folder:
        if folder:  # parquet needs random access
            with _open(path) as packed, open(Path(folder, "plain.parquet"), "wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
        with pyarrow.parquet.ParquetFile(Path(folder, "plain.parquet") if folder else path) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise ConfigError(f"data.source: {path}: no column text among {', '.join(names)}")
            columns = [name for name in dict.fromkeys(("text", group)) if name in names]
            for batch in table.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    yield _document(_text(row["text"], path), row, group, f"{path}: a row")


def _text(value: Any, where: object) -> str:
    """Of a row, where None is no text; ConfigError for anything else, such as bytes or a list."""
    if not isinstance(value, str | None):
        raise ConfigError(f"data.source: {where}: the column text holds {type(value).__name__}, not strings")
    return value or ""


# C4


def _stream(folder: str | None, skip: int) -> Iterator[str]:
    try:
        import datasets
    except ImportError:  # of the extra: nothing else needs it
        raise ConfigError("data.source: c4 needs the package datasets: pip install gnlib[data]") from None
    where: dict[str, Any] = {"path": C4, "name": "en", "revision": C4_REVISION} if folder is None else {"path": folder}
    try:
        rows = datasets.load_dataset(**where, split="train", streaming=True).skip(skip)
    except Exception as error:  # datasets raises a dozen types for a wrong name or no network
        raise ConfigError(f"data.source: cannot stream {where['path']}: {one_line(error)}") from None
    for row in rows:
        if "text" not in row:
            raise ConfigError(f"data.source: {where['path']}: no column text among {', '.join(row)}")
        yield _text(row["text"], where["path"])
