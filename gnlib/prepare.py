"""Documents -> tokenizer -> token files, once per source; the runs read them with `gnlib.data`.

A killed preparation continues where it stopped and ends with the same bytes; two processes at once make one of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from gnlib import corpus
from gnlib.config import ConfigError, DataConfig
from gnlib.data import SPLITS, Split, TokenFiles
from gnlib.files import data_folder, exclusive, replacing
from gnlib.tokenizer import end_of_text, kept_tokenizer, tokenizer_file

_FORMAT = 1  # raise it when the same text would give other tokens
_BPE_CHARACTERS = 20_000_000  # of training text, from the start
_PIECE = 1 << 17  # characters; encodings take about 100 bytes a token, so neither a piece nor a batch may be long
_BATCH = 1 << 21  # characters encoded at once
_CHECKPOINT = 1 << 26  # bytes of text between two points that a killed preparation resumes from
_SYNTHETIC = {"train": 200_000, "validation": 20_000}  # tokens


def prepare(config: DataConfig, progress: bool = True) -> TokenFiles:
    """Tokenise the source, or open the files if it was done before; `ConfigError` for a source or tokenizer in error.

    The folder's name is a hash of what the tokens depend on, so that a changed file is prepared anew. It is built under
    a lock in a hidden folder and renamed when whole; a killed preparation continues there, to the same bytes.
    A configuration with a fingerprint opens the folder that has it, wherever its text came from, or makes it and
    checks it.
    """
    folder = _carried(config) or _made(config, progress)
    files = TokenFiles.open(folder, config.sequence_length)
    if config.fingerprint not in (None, files.fingerprint):
        raise ConfigError(
            f"data.fingerprint: {config.source} gives {files.fingerprint} here, not {config.fingerprint}: "
            "another text or Python version than the run began with"
        )
    return files


def _carried(config: DataConfig) -> Path | None:
    """The folder with the fingerprint; without one, token files made elsewhere from a text that is not here.

    Docstrings made by another Python count as those: what is run in one data folder is of one text.
    """
    wanted = {"fingerprint": config.fingerprint} if config.fingerprint else _settings(config)
    if not config.fingerprint:
        if config.source == "docstrings":
            if _folder(config).exists():
                return None
            wanted |= {"format": _FORMAT}
        elif config.source in ("synthetic", "c4") or corpus.located(config.source).exists():
            return None
    for meta in sorted((data_folder() / "prepared").glob("[!.]*/meta.json")):
        if wanted.items() <= json.loads(meta.read_text(encoding="utf-8")).items():
            return meta.parent
    return None


def _settings(config: DataConfig) -> dict[str, Any]:
    """What the tokens depend on besides the text."""
    settings = config.model_dump(include={"source", "tokenizer", "vocabulary", "max_tokens", "validation_fraction"})
    return settings | ({"group": config.group} if config.group else {})  # left out, old folders keep their names


def _made(config: DataConfig, progress: bool) -> Path:
    folder = _folder(config)
    if not folder.exists():
        with exclusive(folder):
            if not folder.exists():  # another process may have made it meanwhile
                _build(config, folder, progress)
    return folder


def _folder(config: DataConfig) -> Path:
    """Where this text's token files are, or will be."""
    return data_folder() / "prepared" / _digest(_inputs(config))[:16]


def _inputs(config: DataConfig) -> dict[str, Any]:
    if config.source == "c4" and config.max_tokens is None:
        raise ConfigError("data.max_tokens: c4 has 156 billion tokens; set a number of training tokens")
    if config.source == "synthetic":
        corpus.refuse_group(config.source, config.group)
    file = tokenizer_file(config.tokenizer)
    return _settings(config) | {
        "format": _FORMAT,
        "text": [] if config.source == "synthetic" else corpus.identity(config.source),
        "tokenizer_file": _sha256(file) if file else None,
    }


def _build(config: DataConfig, folder: Path, progress: bool) -> None:
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    for stale in part.glob(".*.tmp"):  # of a process killed while it wrote
        stale.unlink()
    dtype = np.dtype("<u2" if config.vocabulary <= 1 << 16 else "<u4")
    try:
        end, counts = _written(config, part, dtype, progress)
    except ConfigError:
        if not (part / "progress.json").exists():  # else there is something to continue, once the source is mended
            shutil.rmtree(part)
        raise
    hashes: dict[str, str] = {split: _sha256(part / f"{split}.bin") for split in SPLITS}
    meta = {
        **_settings(config),
        **counts,
        "format": _FORMAT,
        "dtype": dtype.str,
        "end_of_text": end,
        "sha256": hashes,
        "fingerprint": _digest({**hashes, "vocabulary": config.vocabulary})[:16],
    }
    _write_json(part / "meta.json", meta)
    (part / "progress.json").unlink(missing_ok=True)
    os.rename(part, folder)


def _written(
    config: DataConfig, part: Path, dtype: np.dtype[Any], progress: bool
) -> tuple[int | None, dict[str, Any]]:
    """The end-of-text token and the counts of what was written."""
    if config.source == "synthetic":
        return None, _write_synthetic(config, part, dtype)
    tokenizer = kept_tokenizer(config, part / "tokenizer.json", _training_text(config))
    end = end_of_text(tokenizer, config.tokenizer, config.vocabulary)
    return end, _write_tokens(config, part, dtype, tokenizer, end, progress)


# Token files


def _training_text(config: DataConfig) -> Iterator[str]:
    characters = 0
    for piece in _pieces(config, 0):
        if piece.split == "train":
            yield piece.text
            characters += len(piece.text)
            if characters >= _BPE_CHARACTERS:
                return


class _Piece(NamedTuple):
    text: str
    split: Split
    last: bool
    """Ends its document."""


def _pieces(config: DataConfig, skip: int) -> Iterator[_Piece]:
    """Documents cut before spaces, where byte-level BPE cuts as well."""
    for document in corpus.grouped_documents(config.source, skip, config.group):
        encoded = document.text.encode("utf-8", "replace")  # JSON may hold half a surrogate pair, which has no UTF-8
        text = encoded.decode()
        split = _split(encoded if document.group is None else document.group.encode("utf-8", "replace"), config)
        start = 0
        while len(text) - start > _PIECE:
            space = text.rfind(" ", start + 1, start + _PIECE)
            end = space if space > 0 else start + _PIECE
            yield _Piece(text[start:end], split, False)
            start = end
        yield _Piece(text[start:], split, True)


def _split(hashed: bytes, config: DataConfig) -> Split:
    held_out = int.from_bytes(hashlib.sha256(hashed).digest()[:8], "big") < config.validation_fraction * 2**64
    return "validation" if held_out else "train"


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends to the part files and remembers the end of the last whole document, where a killed preparation resumes.

    `progress.json` is replaced only after the part files are on disk, so they are never shorter than it says.
    """

    def __init__(self, part: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = part / "progress.json", dtype
        self.counts = dict.fromkeys(("documents", "text_bytes", *SPLITS), 0)
        if self.path.exists():
            self.counts = json.loads(self.path.read_text(encoding="utf-8"))
        self.whole = dict(self.counts)
        self.files = {split: open(part / f"{split}.bin", "ab") for split in SPLITS}  # noqa: SIM115 closed by close()
        for split, file in self.files.items():
            file.truncate(self.counts[split] * dtype.itemsize)

    def add(self, piece: _Piece, ids: list[int]) -> None:
        self.files[piece.split].write(np.array(ids, self.dtype).tobytes())
        self.counts[piece.split] += len(ids)
        self.counts["text_bytes"] += len(piece.text.encode())
        if piece.last:
            self.counts["documents"] += 1
            self.whole = dict(self.counts)

    def sync(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        _write_json(self.path, self.whole)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _write_tokens(
    config: DataConfig, part: Path, dtype: np.dtype[Any], tokenizer: Tokenizer, end: int, progress: bool
) -> dict[str, Any]:
    """Every document's tokens and the end-of-text token; whole documents, so `max_tokens` may be passed by one."""
    writer = _Writer(part, dtype)
    saved = writer.counts["text_bytes"]
    limit = config.max_tokens or float("inf")
    bar = tqdm(desc="tokenise", unit="B", unit_scale=True, initial=saved, disable=not progress)
    try:
        for batch in _batches(_pieces(config, writer.counts["documents"])):
            encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
            for piece, encoding in zip(batch, encodings, strict=True):
                writer.add(piece, encoding.ids + [end] * piece.last)
                if piece.last and writer.counts["train"] >= limit:
                    return _counts(writer.counts)
            bar.update(writer.counts["text_bytes"] - bar.n)
            if writer.counts["text_bytes"] - saved >= _CHECKPOINT:
                writer.sync()
                saved = writer.counts["text_bytes"]
        return _counts(writer.counts)
    finally:
        bar.close()
        writer.close()


def _counts(counts: dict[str, int]) -> dict[str, Any]:
    tokens = {split: counts[split] for split in SPLITS}
    return {"documents": counts["documents"], "text_bytes": counts["text_bytes"], "tokens": tokens}


def _write_synthetic(config: DataConfig, part: Path, dtype: np.dtype[Any]) -> dict[str, Any]:
    """A first-order Markov chain: four usual successors a token, and one step in 16 anywhere. No text, no tokenizer."""
    size = config.vocabulary
    tokens = _SYNTHETIC | ({"train": config.max_tokens} if config.max_tokens else {})
    draw = np.random.PCG64(0).random_raw  # raw bits, the same in every numpy
    frequent = draw(4 * size) % size * (draw(4 * size) % size) // size  # a product: small ids are frequent
    usual = frequent.reshape(size, 4).tolist()
    state, states = 0, []
    for bits in draw(sum(tokens.values())).tolist():
        choice = (0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, None)[bits % 16]
        state = (bits >> 4) % size if choice is None else usual[state][choice]
        states.append(state)
    values = np.array(states, dtype)
    values[: tokens["train"]].tofile(part / "train.bin")
    values[tokens["train"] :].tofile(part / "validation.bin")
    return {"documents": 0, "text_bytes": 0, "tokens": tokens}


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
