"""Sources: the same documents from every kind of file, the same docstrings everywhere, and errors of one line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gnlib import corpus
from gnlib.config import ConfigError

TEXTS = ["A first document.\nIts second line, with an é.", "A second one.\n\nIts second paragraph.", "A third one."]


def write(path: Path, texts: list[str]) -> Path:
    """A file of the kind and compression that its name says; documents of .txt are two blank lines apart."""
    kind, _, packing = path.name.partition(".")[2].partition(".")
    plain = path.with_name("plain")
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), plain)
    elif kind == "jsonl":
        plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    else:
        plain.write_text("\n\n\n".join(texts) + "\n", encoding="utf-8")
    content = plain.read_bytes()
    plain.unlink()
    if packing == "zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(gzip.compress(content) if packing == "gz" else content)
    return path


def refusal(source: str, group: str | None = None) -> str:
    """The message of the ConfigError that reading `source` raises."""
    with pytest.raises(ConfigError) as caught:
        list(corpus.grouped_documents(source, group=group))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("extension", corpus.EXTENSIONS)
def test_every_file_type_and_compression_yields_the_same_documents(extension: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"text{extension}", TEXTS)
    assert list(corpus.documents(str(path))) == TEXTS
    assert list(corpus.documents(str(path), skip=2)) == TEXTS[2:]


@pytest.mark.parametrize("name", ["text.jsonl", "text.parquet"])
def test_a_field_up_to_its_first_hash_names_the_group_of_a_document(name: str, tmp_path: Path) -> None:
    rows = [{"text": text, "id": key} for text, key in zip(TEXTS, ("book/1#0", "book/1#1", "article/7"), strict=True)]
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(corpus.grouped_documents(str(path), group="id"))
    assert found == list(zip(TEXTS, ("book/1", "book/1", "article/7"), strict=True))
    assert [document.group for document in corpus.grouped_documents(str(path))] == [None] * 3
    assert "data.group" in refusal(str(path), group="book")


def test_the_first_documents_are_skipped_after_empty_ones_are_dropped_and_in_every_source(tmp_path: Path) -> None:
    path = write(tmp_path / "text.jsonl", ["", " \n", *TEXTS])
    assert list(corpus.documents(str(path), skip=1)) == TEXTS[1:]
    first, second = islice(corpus.documents("docstrings"), 2)
    assert first != second == next(iter(corpus.documents("docstrings", skip=1)))


def test_a_row_without_text_is_an_empty_document_and_without_its_group_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [None, "Words."]}), tmp_path / "null.parquet")
    assert list(corpus.documents(str(tmp_path / "null.parquet"))) == ["Words."]
    (tmp_path / "null.jsonl").write_text('{"text": "Words.", "id": null}\n')
    assert "line 1 has no id among text, id" in refusal(str(tmp_path / "null.jsonl"), group="id")


def test_a_byte_order_mark_and_hidden_files_are_not_text_and_leading_blank_lines_separate_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_text("\n\n\n\nOne.\n\nStill one.\n", encoding="utf-8-sig")
    (tmp_path / ".hidden.txt").write_text("Not this.")
    assert list(corpus.documents(str(tmp_path))) == ["One.\n\nStill one."]
    assert list(corpus.documents(str(tmp_path / "a.txt"))) == ["One.\n\nStill one."]


def test_files_in_hidden_folders_below_a_source_are_not_text_and_change_nothing(tmp_path: Path) -> None:
    source = tmp_path / ".kept" / "books"  # what the folder itself lies in may be hidden
    (source / "deep").mkdir(parents=True)
    write(source / "a.txt", ["One."])
    write(source / "deep" / "b.jsonl", ["Two."])
    before = corpus.identity(str(source))
    for folder in (".ipynb_checkpoints", "deep/.git/objects"):
        (source / folder).mkdir(parents=True)
        write(source / folder / "a-checkpoint.txt", ["Not this."])
    assert list(corpus.documents(str(source))) == ["One.", "Two."]
    assert corpus.identity(str(source)) == before and len(before) == 2


def test_a_group_of_a_txt_file_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "allowed for .jsonl and .parquet files" in refusal(str(write(tmp_path / "a.txt", TEXTS)), group="id")


def test_a_folder_is_read_in_sorted_order_and_a_txt_file_in_it_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "z.jsonl.gz", ["last"])
    write(tmp_path / "b.txt", ["one", "document"])
    write(tmp_path / "a.parquet", ["first", " \n", "second"])
    (tmp_path / "notes.md").write_text("not read")
    expected = ["first", "second", "one\n\n\ndocument", "last"]
    assert list(corpus.documents(str(tmp_path))) == expected


def test_a_txt_file_without_two_blank_lines_is_grouped_to_8_kb(tmp_path: Path) -> None:
    paragraph = "word " * 200  # 1 kB
    (tmp_path / "a.txt").write_text("\n\n".join([paragraph] * 40) + "\n\n\n\n")
    found = list(corpus.documents(str(tmp_path / "a.txt")))
    assert len(found) == 5
    assert all(8_000 < len(text) < 10_000 for text in found[:-1])
    (tmp_path / "b.txt").write_text("no blank line at all\n" * 2_000)
    assert len(list(corpus.documents(str(tmp_path / "b.txt")))) == 3


def test_c4_streams_a_local_folder_and_continues_after_a_skip(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.parquet", [f"{number} {text}" for text in TEXTS])
    expected = [f"{number} {text}" for number in range(2) for text in TEXTS]
    assert list(corpus.documents(f"c4:{tmp_path}")) == expected
    assert list(corpus.documents(f"c4:{tmp_path}", skip=4)) == expected[4:]


def test_docstrings_do_not_depend_on_hash_seed_locale_folder_or_what_is_imported(tmp_path: Path) -> None:
    (tmp_path / "turtle.py").write_text('"""A module of someone else by a name of the library."""')
    code = "from gnlib.corpus import documents; print(ascii(list(documents('docstrings'))))"
    root = Path(__file__).parents[1]

    def start(folder: Path, **changes: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(root), **changes}
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )

    one = start(root, PYTHONHASHSEED="1", LC_ALL="C")
    two = start(tmp_path, PYTHONHASHSEED="2", LC_ALL="C.UTF-8")
    here = ascii(list(corpus.documents("docstrings")))
    assert [process.communicate()[0].strip() == here for process in (one, two)] == [True, True]


def test_docstrings_are_english_prose_without_duplicates() -> None:
    found = list(corpus.documents("docstrings"))
    paragraphs = [paragraph for text in found for paragraph in text.split("\n\n")]
    assert 1_200_000 < sum(len(text.encode()) for text in found) < 2_500_000
    assert len(found) > 300
    assert len(set(paragraphs)) == len(paragraphs)
    assert not any(">>>" in paragraph for paragraph in paragraphs)
    words = [word for paragraph in paragraphs for word in paragraph.lower().split()]
    assert sum(word in {"the", "a", "of", "to", "is", "and", "in", "if"} for word in words) > 0.2 * len(words)


def test_identity_changes_with_the_content_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXTS)
    before = corpus.identity(str(path))
    assert corpus.identity(str(path)) == before
    path.write_text(path.read_text(encoding="utf-8").replace("third", "3rd 3"), encoding="utf-8")  # of the same size
    assert corpus.identity(str(path)) != before


def test_unreadable_sources_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "field.jsonl").write_text('{"text": "fine"}\n{"content": "wrong"}\n')
    (tmp_path / "torn.jsonl").write_text('{"text": "fine"}\n{"text": "fi')
    pq.write_table(pa.table({"content": ["wrong"]}), tmp_path / "column.parquet")
    for name in ("bad.txt.gz", "bad.txt.zst", "bad.parquet", "bad.parquet.gz"):
        (tmp_path / name).write_bytes(b"not what the name says")
    (tmp_path / "empty").mkdir()
    assert "allowed: docstrings, c4" in refusal(str(tmp_path / "missing.txt"))
    assert "unknown extension; allowed: .txt, .txt.gz" in refusal(str(tmp_path / "a.pdf"))
    assert "no .txt" in refusal(str(tmp_path / "empty"))
    assert "line 2" in refusal(str(tmp_path / "field.jsonl"))
    assert "no column text among content" in refusal(str(tmp_path / "column.parquet"))
    assert "torn.jsonl: line 2 is not JSON" in refusal(str(tmp_path / "torn.jsonl"))
    for name in ("latin.txt", "bad.txt.gz", "bad.txt.zst", "bad.parquet", "bad.parquet.gz"):
        message = refusal(str(tmp_path / name))
        assert "unreadable" in message and name in message


@pytest.mark.parametrize(
    ("values", "kind"),
    [([b"caf\xc3\xa9"], "bytes"), ([0, 1], "int"), ([[], ["words"]], "list"), ([{"en": "words"}], "dict")],
)
def test_a_parquet_column_that_holds_no_strings_is_refused_in_one_line(
    values: list[object], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "words.parquet"
    pq.write_table(pa.table({"text": values}), path)
    expected = f"the column text holds {kind}, not strings"
    assert refusal(str(path)) == f"data.source: {path}: {expected}"
    assert refusal(f"c4:{tmp_path}") == f"data.source: {tmp_path}: {expected}"


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_strings_of_every_width_and_of_dictionaries_are_read_from_parquet(kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind)}), tmp_path / "text.parquet")
    assert list(corpus.documents(str(tmp_path / "text.parquet"))) == TEXTS


def test_c4_without_the_package_or_the_network_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("cannot reach the hub\nwith a long story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert "cannot stream allenai/c4: cannot reach the hub" in refusal("c4")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install gnlib[data]" in refusal("c4")
