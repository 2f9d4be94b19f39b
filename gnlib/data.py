"""Token files -> batches; the only counter of tokens.

A source is tokenised once into flat files (`gnlib.prepare`). A run reads them by a seeded permutation of fixed-length
sequences, so that one counter, the position, is all that a resumed run needs to continue with the same batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gnlib.config import ConfigError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")


@dataclass(frozen=True, eq=False)
class TokenFiles:
    """Prepared tokens. Sequence i covers tokens [i S, i S + S]: S inputs, and S targets shifted by one."""

    train: NDArray[Any]
    validation: NDArray[Any]
    vocabulary: int
    sequence_length: int
    """S, tokens predicted per sequence."""
    fingerprint: str
    """16 hex digits: hash of both token files and the vocabulary."""
    folder: Path

    @staticmethod
    def open(folder: Path, sequence_length: int) -> TokenFiles:
        """Map the files of a prepared folder; `ConfigError` if one is damaged or shorter than a sequence."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype, tokens = np.dtype(meta["dtype"]), meta["tokens"]
        for split in SPLITS:
            if (folder / f"{split}.bin").stat().st_size != tokens[split] * dtype.itemsize:
                raise ConfigError(f"data: {folder}/{split}.bin is damaged; delete the folder to prepare it again")
            if tokens[split] <= sequence_length:
                size, need = f"{tokens[split]} {split} tokens", f"one sequence needs {sequence_length + 1}"
                raise ConfigError(f"data.source: {meta['source']} gives {size}, {need}; use more text or another split")
        train, validation = (np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") for split in SPLITS)
        return TokenFiles(train, validation, meta["vocabulary"], sequence_length, meta["fingerprint"], folder)

    def sequences(self, split: Split) -> int:
        return max(0, len(self._tokens(split)) - 1) // self.sequence_length

    def gather(
        self, split: Split, indices: NDArray[np.int64], device: str | torch.device = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [len(indices), S]."""
        tokens, length = self._tokens(split), self.sequence_length
        if len(indices) and not 0 <= min(indices) <= max(indices) < self.sequences(split):
            raise IndexError(f"{split} sequences are 0 to {self.sequences(split) - 1}: {min(indices)}, {max(indices)}")
        windows = torch.empty(len(indices), length + 1, dtype=torch.int64)
        for row, index in zip(windows.numpy(), indices, strict=True):
            row[:] = tokens[index * length : index * length + length + 1]
        if torch.device(device).type == "cuda":
            windows = windows.pin_memory()  # or the copy would wait for the GPU
        windows = windows.to(device, non_blocking=True)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def _tokens(self, split: Split) -> NDArray[Any]:
        return self.train if split == "train" else self.validation


class TokenStream:
    """Training sequences without end: every epoch visits each one once, in a fresh seeded order.

    What comes next depends on `position` (sequences read so far) alone; `tokens_train` and `tokens_search` say what
    they were read for.
    """

    def __init__(self, files: TokenFiles, seed: int, device: str | torch.device = "cpu") -> None:
        self.files, self.seed, self.device = files, seed, device
        self.tokens_train = self.tokens_search = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)

    @property
    def position(self) -> int:
        return (self.tokens_train + self.tokens_search) // self.files.sequence_length

    def take(self, count: int, purpose: Literal["train", "search"] = "train") -> tuple[Tensor, Tensor]:
        """The next `count` sequences, int64 [count, S] twice, tallied under `purpose`."""
        if count < 1:
            raise ValueError(f"cannot take {count} sequences: at least 1")
        if purpose not in ("train", "search"):
            raise ValueError(f"purpose {purpose!r}: allowed are train, search")
        batch = self.files.gather("train", self._next(count), self.device)
        tokens = count * self.files.sequence_length
        if purpose == "train":
            self.tokens_train += tokens
        else:
            self.tokens_search += tokens
        return batch

    def state_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("position", "tokens_train", "tokens_search")}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """`ConfigError` if the state comes from sequences of another length."""
        if state["position"] * self.files.sequence_length != state["tokens_train"] + state["tokens_search"]:
            raise ConfigError(f"data.sequence_length: {self.files.sequence_length} is not that of the saved position")
        self.tokens_train, self.tokens_search = state["tokens_train"], state["tokens_search"]

    def _next(self, count: int) -> NDArray[np.int64]:
        total = self.files.sequences("train")
        parts, position = [], self.position
        while count:
            epoch, offset = divmod(position, total)
            parts.append(self._permutation(epoch, total)[offset : offset + count])
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _permutation(self, epoch: int, total: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            # numpy promises the raw bits of PCG64 for ever, but not Generator.permutation
            raw = np.random.PCG64([self.seed, epoch]).random_raw(total)
            self._epoch, self._order = epoch, np.argsort(raw, kind="stable")
        return self._order


def validation_batches(
    files: TokenFiles, sequences: int, batch: int, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `sequences` held-out sequences (all if there are fewer), in order, `batch` at a time."""
    count = min(sequences, files.sequences("validation"))
    if count < 1:
        raise ConfigError(f"data: no validation sequence of {files.sequence_length} tokens; use more text")
    starts = range(0, count, batch)
    return (files.gather("validation", np.arange(i, min(i + batch, count)), device) for i in starts)
