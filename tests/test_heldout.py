"""A run's loss on another text: the tokenizer of the run, whole sequences, every document once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gnlib.config import ConfigError, RunConfig
from gnlib.heldout import heldout
from gnlib.model import Decoder
from gnlib.prepare import prepare
from gnlib.profiles import run_config
from gnlib.tokenizer import encoder
from gnlib.train import pinned, run_folder, train

CPU = torch.device("cpu")
LENGTH = 16
OTHER = ["A pot of tea, and then another; the third was cold. " * 3, "Ünïcode is longer in bytes than in letters. " * 3]


pytestmark = pytest.mark.usefixtures("home")


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def trained(tmp_path: Path) -> RunConfig:
    """Two steps in float64 on a text of its own, weights kept."""
    texts = [f"Number {i} comes before number {i + 1}, and {7 * i % 11} has nothing to do with it." for i in range(400)]
    changes = {
        "data.source": str(jsonl(tmp_path / "own.jsonl", texts)),
        "data.validation_fraction": 0.1,
        "start.chinchilla_fraction": 0.0,
        "outer_steps": 2,
        "compute.precision": "fp64",
        "compute.micro_batch": 2,  # which does not divide the sequences of OTHER
    }
    config = pinned(run_config("tiny", "adamw", changes=changes, use_tuned=False))
    train(config, CPU, keep_weights=True)
    return config


def slow_loss(config: RunConfig, texts: list[str]) -> tuple[float, int, int]:
    """Nats per token by one forward pass a sequence; tokens read, bytes."""
    tokenizer = encoder(prepare(config.data).folder / "tokenizer.json")
    tokens = [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False).ids, 0]]
    model = Decoder.from_config(config)
    model.load_state_dict(torch.load(run_folder(config) / "weights.pt", weights_only=True))
    losses = []
    for start in range(0, len(tokens) - LENGTH, LENGTH):
        window = torch.tensor(tokens[start : start + LENGTH + 1])
        logits = model(window[None, :-1])[0].log_softmax(-1)
        losses += [-logits[position, target].item() for position, target in enumerate(window[1:])]
    return sum(losses) / len(losses), len(tokens), sum(len(text.encode()) for text in texts)


def test_what_is_wrong_with_the_runs_own_text_is_not_said_of_the_other(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: object) -> None:
        raise ConfigError("data.source: gone")

    monkeypatch.setattr("gnlib.heldout.prepare", gone)
    with pytest.raises(ConfigError, match=r"^data\.source: gone$"):
        heldout(trained.run_id, str(jsonl(tmp_path / "other.jsonl", OTHER)), device=CPU)


def test_it_takes_as_many_threads_as_the_run_was_given(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    heldout(trained.run_id, str(jsonl(tmp_path / "other.jsonl", OTHER)), device=CPU)
    assert asked == [trained.compute.threads]


@pytest.mark.parametrize("documents", [None, 1])
def test_the_loss_on_another_text_is_that_of_a_slow_loop_over_its_tokens(
    documents: int | None, trained: RunConfig, tmp_path: Path
) -> None:
    text = jsonl(tmp_path / "other.jsonl", OTHER)
    found = heldout(trained.run_id, str(text), documents, CPU)
    chosen = OTHER[:documents]
    assert documents or found.tokens // LENGTH % 2 == 1
    loss, tokens, size = slow_loss(trained, chosen)
    assert found.loss == pytest.approx(loss, rel=1e-12)
    assert found.bits_per_byte == pytest.approx(loss / math.log(2) * tokens / size, rel=1e-12)
    assert (found.documents, found.tokens) == (len(chosen), (tokens - 1) // LENGTH * LENGTH)


def test_a_sequence_counts_if_the_token_after_it_is_there(trained: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of exactly three sequences have two whole ones with a next token each."""
    for tokens in (3 * LENGTH, 3 * LENGTH + 1):
        monkeypatch.setattr("gnlib.heldout._tokens", lambda *_, n=tokens: (np.arange(n, dtype=np.uint32) % 200, 1, 1))
        assert heldout(trained.run_id, "any", device=CPU).tokens == (tokens - 1) // LENGTH * LENGTH


def test_half_a_surrogate_pair_is_read_as_in_preparation(trained: RunConfig, tmp_path: Path) -> None:
    text = tmp_path / "half.jsonl"
    text.write_text('{"text": "' + "tea " * 40 + '\\ud800"}\n')
    whole = jsonl(tmp_path / "whole.jsonl", ["tea " * 40 + "?"])
    assert heldout(trained.run_id, str(text), device=CPU) == heldout(trained.run_id, str(whole), device=CPU)


def test_a_run_that_was_evaluated_by_an_average_is_refused(trained: RunConfig, tmp_path: Path) -> None:
    config = pinned(trained.replace({"evaluation.average": 0.5}))
    train(config, CPU, keep_weights=True)
    with pytest.raises(ConfigError, match="averaged parameters"):
        heldout(config.run_id, str(jsonl(tmp_path / "other.jsonl", OTHER)), device=CPU)


def test_a_run_is_found_by_its_folder_too_also_relative_to_the_working_directory(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = str(jsonl(tmp_path / "other.jsonl", OTHER))
    run_folder(trained).rename(tmp_path / "copied")
    monkeypatch.chdir(tmp_path)
    assert heldout("copied", text, device=CPU) == heldout(str(tmp_path / "copied"), text, device=CPU)
    with pytest.raises(ConfigError, match=r"runs/copying has no record\.jsonl"):
        heldout("copying", text, device=CPU)


def test_weights_that_are_not_there_or_damaged_are_one_line_with_their_file(trained: RunConfig, tmp_path: Path) -> None:
    text, weights = str(jsonl(tmp_path / "other.jsonl", OTHER)), run_folder(trained) / "weights.pt"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ConfigError, match=r"weights\.pt: damaged \(\w+\); delete it, and it is made anew$"):
        heldout(trained.run_id, text, device=CPU)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"has no weights\.pt; make it by: gnlib train --keep-weights$"):
        heldout(trained.run_id, text, device=CPU)


@pytest.mark.parametrize(
    ("run", "text", "documents", "message"),
    [
        ("nowhere", "other.jsonl", None, "no record.jsonl"),
        ("nowhere", "c4", 10, "no record.jsonl"),  # some documents of it may be read
        ("", "absent.jsonl", None, "^text: .*absent.jsonl: no such source, nor a file"),
        ("", "short.jsonl", None, "one sequence needs 17"),
        ("", "c4", None, "documents: c4"),
        ("", "other.jsonl", 0, "at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    run: str, text: str, documents: int | None, message: str, trained: RunConfig, tmp_path: Path
) -> None:
    jsonl(tmp_path / "other.jsonl", OTHER)
    jsonl(tmp_path / "short.jsonl", ["Tea."])
    with pytest.raises(ConfigError, match=message) as error:
        heldout(run or trained.run_id, text if text == "c4" else str(tmp_path / text), documents, CPU)
    assert "\n" not in str(error.value)


def test_a_run_on_synthetic_tokens_reads_no_text(tmp_path: Path) -> None:
    config = pinned(run_config("tiny", "adamw", changes={"start.chinchilla_fraction": 0.0, "outer_steps": 1}))
    train(config, CPU, keep_weights=True)
    with pytest.raises(ConfigError, match="synthetic"):
        heldout(config.run_id, str(jsonl(tmp_path / "other.jsonl", OTHER)), device=CPU)


def test_the_command_prints_the_loss_and_writes_it(trained: RunConfig, tmp_path: Path) -> None:
    text, file = jsonl(tmp_path / "other.jsonl", OTHER), tmp_path / "found.json"
    command = [sys.executable, "-m", "gnlib", "evaluate", trained.run_id, str(text), "--documents", "2"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert f"{written['loss']:.4f} nats per token" in done.stdout and "2 documents" in done.stdout
    assert written["loss"] == pytest.approx(heldout(trained.run_id, str(text), device=CPU).loss)
