"""A trained model's loss on another text, read with the tokenizer it was trained with.

Validation sequences come from the source of the training text; this says how far a loss carries over to another one.
"""

from __future__ import annotations

import math
from array import array
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from gnlib import corpus
from gnlib import record as records
from gnlib.config import ConfigError, RunConfig
from gnlib.data import TokenFiles
from gnlib.files import data_folder, read_tensors
from gnlib.losses import CrossEntropy
from gnlib.model import Decoder
from gnlib.objective import forward_loss
from gnlib.precision import matmul_precision
from gnlib.prepare import prepare
from gnlib.processor import use_processor
from gnlib.tokenizer import encoder, end_of_text
from gnlib.train import default_device


class Heldout(NamedTuple):
    loss: float
    """Nats per token, over whole sequences of the run's length; what is left at the end is not counted."""
    bits_per_byte: float
    """The same over the text's UTF-8 bytes, which compares tokenizers."""
    documents: int
    tokens: int
    """Predicted."""


def heldout(run: str, source: str, documents: int | None = None, device: torch.device | None = None) -> Heldout:
    """The loss of a run's kept weights on `source` (`corpus.documents`), or on the first `documents` of it.

    `run` is the name or the folder of a run made with `gnlib train --keep-weights`. ConfigError if there is none, if
    its validation losses are those of averaged parameters, which are not kept, if the text gives no whole sequence, or
    for all of C4.
    """
    if source == "c4" and documents is None:
        raise ConfigError("documents: c4 has 365 million; set how many are read")
    if documents is not None and documents < 1:
        raise ConfigError(f"documents: {documents}; at least 1")
    folder, device = _folder(run), device or default_device()
    record = records.read(folder / "record.jsonl")
    for name, missing in (("record.jsonl", record is None), ("weights.pt", not (folder / "weights.pt").exists())):
        if missing:
            raise ConfigError(f"run: {folder} has no {name}; make it by: gnlib train --keep-weights")
    assert record is not None
    config = record.config
    if config.evaluation.average:
        raise ConfigError("run: its losses are those of averaged parameters (evaluation.average), which are not kept")
    files = prepare(config.data)
    try:
        tokens, size, count = _tokens(files, source, documents)
    except ConfigError as error:  # here it is an argument, not a field
        raise ConfigError(str(error).replace("data.source:", "text:", 1)) from None
    length = config.data.sequence_length
    sequences = (len(tokens) - 1) // length
    if sequences < 1:
        raise ConfigError(f"text: {source} gives {len(tokens)} tokens, one sequence needs {length + 1}")
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length][:sequences]
    use_processor(config.compute.threads)  # as training does
    model = Decoder.from_config(config).to(device)
    model.load_state_dict(read_tensors(folder / "weights.pt", device))
    loss = _mean_loss(model, windows, config, device)
    return Heldout(loss, loss / math.log(2) * len(tokens) / size, count, sequences * length)


def _folder(run: str) -> Path:
    return Path(run) if Path(run).is_dir() else data_folder() / "runs" / run


def _tokens(files: TokenFiles, source: str, documents: int | None) -> tuple[np.ndarray, int, int]:
    """Of all documents, each with its end-of-text token; the bytes they come from; how many documents."""
    path = files.folder / "tokenizer.json"
    if not path.exists():
        raise ConfigError("run: it was trained on synthetic tokens, which no text has")
    tokenizer: Tokenizer = encoder(path)
    end = end_of_text(tokenizer, str(path), files.vocabulary)
    ids, size, count = array("I"), 0, 0
    for text in islice(corpus.documents(source), documents):
        encoded = text.encode("utf-8", "replace")  # as `prepare` does
        ids.extend([*tokenizer.encode(encoded.decode(), add_special_tokens=False).ids, end])
        size, count = size + len(encoded), count + 1
    return np.array(ids, np.uint32), size, count


@torch.no_grad()
def _mean_loss(model: Decoder, windows: np.ndarray, config: RunConfig, device: torch.device) -> float:
    value, total, step = forward_loss(CrossEntropy(), config.compute.compile), 0.0, config.compute.micro_batch
    with matmul_precision(config.compute, device):
        for first in range(0, len(windows), step):
            rows = torch.from_numpy(windows[first : first + step].astype(np.int64)).to(device)
            total += value(model, rows[:, :-1], rows[:, 1:]).item() * len(rows)
    return total / len(windows)
