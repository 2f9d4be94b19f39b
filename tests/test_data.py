"""Token files are made once, whole and the same for everyone; one counter fixes the order in which they are read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from gnlib import corpus
from gnlib import prepare as preparation
from gnlib.config import ConfigError, DataConfig
from gnlib.data import SPLITS, Split, TokenFiles, TokenStream, validation_batches
from gnlib.prepare import prepare

SENTENCE = "it was not that they have been in this place for long, but he and his dog are at the end of their day"


def texts(count: int, words: int = 120) -> list[str]:
    rng, vocabulary = np.random.default_rng(0), SENTENCE.split()
    return [f"{i}: " + " ".join(rng.choice(vocabulary, words)) for i in range(count)]


def jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refusal(config: DataConfig) -> str:
    """The message of the ConfigError that preparing raises."""
    with pytest.raises(ConfigError) as caught:
        prepare(config, progress=False)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    source = jsonl(tmp_path / "text.jsonl", texts(150))
    return DataConfig(source=str(source), vocabulary=300, sequence_length=16, validation_fraction=0.1)


@pytest.fixture
def files(tmp_path: Path) -> TokenFiles:
    """10 training sequences of 4 tokens and one token too few for the eleventh; 5 validation sequences."""
    train, validation = np.arange(44, dtype="<u2"), np.arange(100, 121, dtype="<u2")
    return TokenFiles(train, validation, 300, 4, "0" * 16, tmp_path)


# Preparation


def test_preparing_twice_gives_the_same_bytes(config: DataConfig, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    first = prepare(config, progress=False)
    again = prepare(config, progress=False)
    monkeypatch.setenv("GNLIB_DATA", str(home / "elsewhere"))
    second = prepare(config, progress=False)
    assert first.folder == again.folder != second.folder
    assert contents(first.folder) == contents(second.folder)
    assert set(contents(first.folder)) == {"meta.json", "tokenizer.json", "train.bin", "validation.bin"}
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 16


def test_pieces_of_a_group_are_held_out_together_and_without_one_each_by_itself(home: Path) -> None:
    """Pieces spell their book's number, so that the held-out tokens say which books they are from."""
    rows = [{"text": f"book{book} ", "id": f"{book}#{piece}"} for piece in range(20) for book in range(30)]
    (home / "books.jsonl").write_text("".join(json.dumps(row | {"text": row["text"] * 9}) + "\n" for row in rows))
    together = DataConfig(
        source=str(home / "books.jsonl"), vocabulary=300, sequence_length=8, validation_fraction=0.2, group="id"
    )

    def books(config: DataConfig, split: Split) -> set[str]:
        files = prepare(config, progress=False)
        tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
        return set(re.findall(r"book(\d+)", tokenizer.decode(files._tokens(split).tolist(), skip_special_tokens=False)))

    held_out, kept = books(together, "validation"), books(together, "train")
    assert held_out and not held_out & kept and len(held_out | kept) == 30
    apart = together.model_copy(update={"group": None})
    (home / "books.jsonl").write_text(  # equal texts would be held out together
        "".join(json.dumps(row | {"text": row["text"] * (i + 1)}) + "\n" for i, row in enumerate(rows))
    )
    assert books(apart, "validation") & books(apart, "train")
    for source in ("docstrings", "synthetic", f"c4:{home}"):
        assert "data.group" in refusal(DataConfig(source=source, group="id", max_tokens=1000))


def test_a_source_that_is_refused_leaves_nothing_behind(home: Path) -> None:
    source = jsonl(home / "text.jsonl", texts(20))
    message = refusal(DataConfig(source=str(source), vocabulary=300, sequence_length=16, group="id"))
    assert "line 1 has no id among text" in message
    assert [path for path in (home / "data" / "prepared").iterdir() if path.is_dir()] == []


def test_a_changed_file_is_prepared_in_another_folder(config: DataConfig) -> None:
    before = prepare(config, progress=False)
    jsonl(Path(config.source), texts(151))
    after = prepare(config, progress=False)
    assert before.folder != after.folder and before.fingerprint != after.fingerprint


def test_two_processes_at_once_make_one_whole_folder(config: DataConfig, home: Path) -> None:
    call = "prepare(DataConfig.model_validate_json(sys.argv[1]), False)"
    code = f"import sys; from gnlib.prepare import prepare, DataConfig; print({call}.folder)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, config.model_dump_json()]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = [process.communicate()[0].strip() for process in both]
    assert folders[0] == folders[1] and all(process.returncode == 0 for process in both)
    assert [path for path in (home / "data" / "prepared").iterdir() if path.is_dir()] == [Path(folders[0])]
    meta = json.loads((Path(folders[0]) / "meta.json").read_text())
    assert meta["sha256"] == {split: preparation._sha256(Path(folders[0]) / f"{split}.bin") for split in SPLITS}


def test_killed_and_resumed_c4_equals_uninterrupted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "c4").mkdir()
    for number, rows in enumerate(np.array_split(np.array(texts(200)), 3)):
        pq.write_table(pa.table({"text": rows.tolist()}), home / "c4" / f"{number}.parquet")
    config = DataConfig(source=f"c4:{home}/c4", vocabulary=300, sequence_length=16, max_tokens=25_000)
    whole = prepare(config, progress=False)

    monkeypatch.setenv("GNLIB_DATA", str(home / "killed"))
    monkeypatch.setattr(preparation, "_BATCH", 1_000)  # characters; and points to resume from every 8 kB
    monkeypatch.setattr(preparation, "_CHECKPOINT", 8_000)
    real, skips = corpus.grouped_documents, []

    def dying(source: str, skip: int, group: str | None) -> Iterator[corpus.Document]:
        skips.append(skip)
        dies = len(skips) == 2  # the first pass trains the tokenizer
        yield from islice(real(source, skip, group), 60 if dies else None)
        if dies:
            raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "grouped_documents", dying)
    folder = home / "killed" / "prepared" / whole.folder.name
    part = folder.with_name(f".{folder.name}.part")
    with pytest.raises(KeyboardInterrupt):
        prepare(config, progress=False)
    assert part.exists() and not folder.exists()
    (part / ".meta.json.1.tmp").write_text("half a fi")  # what a kill in the middle of writing leaves
    with open(part / "train.bin", "ab") as torn:
        torn.write(b"odd")
    resumed = prepare(config, progress=False)
    assert len(skips) == 3 and skips[2] > 20  # it did continue
    assert resumed.folder == folder and contents(folder) == contents(whole.folder)
    assert not part.exists()


def test_validation_and_training_documents_are_disjoint_and_none_is_lost(config: DataConfig) -> None:
    documents = texts(150)
    jsonl(Path(config.source), documents + documents[:40])  # copies go where the first went
    files = prepare(config, progress=False)
    tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
    tokens = {"train": files.train, "validation": files.validation}
    meta = json.loads((files.folder / "meta.json").read_text())
    end = meta["end_of_text"]
    found = {}
    for split, ids in tokens.items():
        assert ids[-1] == end and meta["tokens"][split] == len(ids)
        found[split] = [tokenizer.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]]
    assert not set(found["train"]) & set(found["validation"])
    assert set(found["train"]) | set(found["validation"]) == set(documents)
    assert len(found["train"]) + len(found["validation"]) == meta["documents"] == 190
    assert 3 <= len(set(found["validation"])) <= 30  # about a tenth of 150


def test_the_end_of_text_in_a_document_is_plain_text(config: DataConfig) -> None:
    jsonl(Path(config.source), ["<eos> " + text for text in texts(100)])
    files = prepare(config, progress=False)
    assert (files.train == 0).sum() + (files.validation == 0).sum() == 100


def test_pieces_of_a_long_document_give_the_tokens_of_the_whole(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    whole = prepare(config, progress=False)
    monkeypatch.setenv("GNLIB_DATA", str(home / "elsewhere"))
    monkeypatch.setattr(preparation, "_PIECE", 100)
    assert prepare(config, progress=False).fingerprint == whole.fingerprint


def test_a_run_without_spaces_that_is_longer_than_a_piece_is_cut_all_the_same(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the space that its first piece begins with, which may not be cut at again, for ever."""
    monkeypatch.setattr(preparation, "_PIECE", 10)
    text = f"words {'x' * 35} and words"
    config = DataConfig(source=str(jsonl(home / "long.jsonl", [text])), validation_fraction=0.1)
    pieces = [piece.text for piece in islice(preparation._pieces(config, 0), len(text) + 1)]
    assert "".join(pieces) == text and all(1 <= len(piece) <= 10 for piece in pieces)
    assert pieces[:2] == ["words", " xxxxxxxxx"]


def test_max_tokens_stops_at_the_end_of_a_document(config: DataConfig) -> None:
    files = prepare(config.model_copy(update={"max_tokens": 5_000}), progress=False)
    assert 5_000 <= len(files.train) < 5_500 and files.train[-1] == 0


def test_tokens_are_uint32_only_when_the_vocabulary_needs_it(config: DataConfig) -> None:
    assert prepare(config, progress=False).train.dtype == np.dtype("<u2")
    large = prepare(config.model_copy(update={"vocabulary": 70_000}), progress=False)
    assert large.train.dtype == np.dtype("<u4") and large.vocabulary == 70_000


def test_a_hugging_face_tokenizer_on_disk_gives_its_own_ids(config: DataConfig, home: Path) -> None:
    trained = prepare(config, progress=False)
    tokenizer = Tokenizer.from_file(str(trained.folder / "tokenizer.json"))
    tokenizer.enable_truncation(8)  # as saved with a model, and to be ignored
    tokenizer.enable_padding(length=8)
    (home / "tokenizer").mkdir()
    tokenizer.save(str(home / "tokenizer" / "tokenizer.json"))
    for name in ("tokenizer", "tokenizer/tokenizer.json"):
        loaded = prepare(config.model_copy(update={"tokenizer": str(home / name)}), progress=False)
        assert loaded.fingerprint == trained.fingerprint


def test_unusable_tokenizers_are_refused_in_one_line(config: DataConfig, home: Path) -> None:
    large = prepare(config.model_copy(update={"vocabulary": 320}), progress=False)
    saved = home / "tokenizer.json"
    saved.write_bytes((large.folder / "tokenizer.json").read_bytes())

    def with_tokenizer(name: str) -> str:
        return refusal(config.model_copy(update={"tokenizer": name}))

    assert "300 is too small for the tokenizer's 320 tokens" in with_tokenizer(str(saved))
    saved.write_text(saved.read_text().replace("<eos>", "<nil>"))
    config = config.model_copy(update={"vocabulary": 320})
    assert "has no end-of-text token; one of </s>, <eos>" in with_tokenizer(str(saved))
    saved.write_text("{}")
    assert "cannot load" in with_tokenizer(str(saved))
    assert "no such file; allowed: bpe" in with_tokenizer(str(home / "missing.json"))
    assert "needs Hugging Face and the network" in with_tokenizer("no/such/name")


def test_unusable_texts_are_refused_in_one_line(config: DataConfig) -> None:
    assert "one sequence needs 1000001" in refusal(config.model_copy(update={"sequence_length": 1_000_000}))
    assert "data.max_tokens" in refusal(DataConfig(source="c4"))
    message = refusal(config.model_copy(update={"source": "docstring"}))
    assert "docstring: no such source, nor a file here or in " in message  # as it was given
    jsonl(Path(config.source), ["one document only"])
    assert "one sequence needs" in refusal(config)
    files = prepare(DataConfig(source="synthetic"), progress=False)
    with open(files.folder / "train.bin", "ab") as file:
        file.write(b"x")
    assert "damaged" in refusal(DataConfig(source="synthetic"))


def test_synthetic_tokens_are_the_same_everywhere_and_can_be_learned() -> None:
    files = prepare(DataConfig(source="synthetic"), progress=False)
    assert (len(files.train), len(files.validation), files.train.max() < 1024) == (200_000, 20_000, True)
    assert files.fingerprint == "ca72a08dd0916509"
    pairs = np.unique(files.train[:-1].astype(int) * 1024 + files.train[1:], return_counts=True)[1]
    entropy = -(pairs / pairs.sum() * np.log(pairs / pairs.sum())).sum()  # nats of a pair, 13.9 if it were uniform
    assert entropy < 8.5


def test_the_default_corpus_has_half_a_million_training_tokens() -> None:
    """Whole documents are held out, some of them long: 457, 184 and 316 sequences on Python 3.11, 3.12 and 3.13."""
    files = prepare(DataConfig(), progress=False)
    assert len(files.train) > 500_000 and files.sequences("validation") > 150


# Reading


def test_a_sequence_predicts_each_token_after_the_first_once(files: TokenFiles) -> None:
    inputs, targets = files.gather("train", np.arange(10))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (10, 4)
    assert inputs.flatten().tolist() == list(range(40)) and targets.flatten().tolist() == list(range(1, 41))
    with pytest.raises(IndexError, match="train sequences are 0 to 9"):
        files.gather("train", np.array([10]))


def test_a_sequence_before_the_first_or_past_the_last_is_refused(files: TokenFiles) -> None:
    for index in (-1, files.sequences("train")):
        with pytest.raises(IndexError, match="train sequences are 0 to 9"):
            files.gather("train", np.array([0, index]))


def test_every_epoch_visits_each_sequence_once_in_a_fresh_order(files: TokenFiles) -> None:
    stream = TokenStream(files, seed=0)
    starts = torch.cat([stream.take(count)[0][:, 0] // 4 for count in (3, 9, 7, 11)])  # batches across both ends
    epochs = starts.view(3, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    others = [TokenStream(files, seed=seed).take(10)[0][:, 0] // 4 for seed in (1, 2)]
    assert not any(torch.equal(other, epoch) for other in others for epoch in epochs)  # nor one epoch of another seed
    assert TokenStream(files, seed=0).take(25)[0][:, 0].tolist() == (4 * starts[:25]).tolist()


def test_tokens_counted_are_tokens_read_search_included(files: TokenFiles) -> None:
    stream = TokenStream(files, seed=0)
    read = {"train": 0, "search": 0}
    for count, purpose in ((3, "train"), (2, "search"), (8, "train"), (5, "search")):
        read[purpose] += stream.take(count, purpose)[1].numel()  # type: ignore[arg-type]
    assert read == {"train": stream.tokens_train, "search": stream.tokens_search}
    assert stream.position * files.sequence_length == sum(read.values())
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"cannot take {count} sequences: at least 1"):
            stream.take(count)


def test_a_stream_restored_from_its_counter_continues_identically(files: TokenFiles) -> None:
    stream = TokenStream(files, seed=3)
    stream.take(7)
    stream.take(6, "search")
    state = json.loads(json.dumps(stream.state_dict()))
    restored = TokenStream(files, seed=3)
    restored.take(25)  # its cached epoch is another one
    restored.load_state_dict(state)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(stream.take(5), restored.take(5), strict=True))
    assert stream.state_dict() == restored.state_dict() == {"position": 28, "tokens_train": 88, "tokens_search": 24}
    with pytest.raises(ConfigError, match=r"data\.sequence_length"):
        restored.load_state_dict({**state, "position": 5})


def test_validation_batches_are_the_first_sequences_in_order(files: TokenFiles) -> None:
    batches = list(validation_batches(files, sequences=3, batch=2))
    assert [len(inputs) for inputs, _ in batches] == [2, 1]
    assert torch.cat([targets for _, targets in batches]).flatten().tolist() == list(range(101, 113))
    assert sum(len(inputs) for inputs, _ in validation_batches(files, sequences=512, batch=2)) == 5
    empty = TokenFiles(files.train, files.validation[:4], 300, 4, "", files.folder)
    with pytest.raises(ConfigError, match="no validation sequence"):
        validation_batches(empty, sequences=3, batch=2)


def test_a_fingerprint_opens_the_prepared_tokens_without_their_text(tmp_path: Path, monkeypatch) -> None:
    """So that a machine without the corpus can run from carried token files."""
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path / "data"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"document {i} " + "word " * 200 for i in range(200)))
    config = DataConfig(source=str(text), vocabulary=300)
    files = prepare(config)
    text.unlink()
    assert prepare(config.model_copy(update={"fingerprint": files.fingerprint})).folder == files.folder
    assert prepare(config).folder == files.folder  # the same source and settings
    assert "text.txt" in refusal(config.model_copy(update={"vocabulary": 400}))  # others need the text


def test_docstrings_prepared_by_another_python_are_read_on(tmp_path: Path, monkeypatch) -> None:
    """Their text differs between versions, and the records of one data folder are to be of one text."""
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path / "data"))
    config = DataConfig(vocabulary=300)
    text = [f"document {i} " + "word " * 99 for i in range(200)]
    monkeypatch.setattr(corpus, "documents", lambda source, skip: iter(text))
    monkeypatch.setattr(corpus, "identity", lambda source: ["3.11"])
    files = prepare(config)
    monkeypatch.setattr(corpus, "identity", lambda source: ["3.12"])
    assert prepare(config).folder == files.folder
    monkeypatch.setattr(preparation, "_FORMAT", 2)  # made by another gnlib: other tokens
    assert prepare(config).folder != files.folder


def test_a_corpus_that_changed_since_the_run_began_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"^data\.fingerprint: synthetic gives \w+ here, not 0123456789abcdef"):
        prepare(DataConfig(source="synthetic", fingerprint="0123456789abcdef"))
