"""Shipped records are those of the profile's studies and tuning, and verify notices any change of one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from test_results import made

from gnlib import record as records
from gnlib.config import ConfigError, RunConfig
from gnlib.export import MANIFEST, export, verify
from gnlib.profiles import run_config
from gnlib.studies import study_configs


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GNLIB_HOME", str(tmp_path))
    monkeypatch.setenv("GNLIB_DATA", str(tmp_path / "elsewhere"))
    return tmp_path


@pytest.fixture
def shipped(home: Path) -> Path:
    return home / "data" / "records" / "tiny"


def run(home: Path, config: RunConfig, status: str = "finished") -> str:
    """A run's folder as training leaves it, the data's fingerprint filled in; returns the shipped name."""
    record = made("adamw", [5.0, 4.0], status=status)
    record.config = config.replace({"data.fingerprint": "0123456789abcdef"})
    records.write(home / "elsewhere" / "runs" / record.config.run_id / "record.jsonl", record)
    return f"{config.recipe_id}.jsonl"


def wanted() -> list[RunConfig]:
    return study_configs("iteration_complexity", "tiny")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_ended_records_of_the_studies_are_shipped_with_their_sums(home: Path, shipped: Path) -> None:
    kept = {run(home, wanted()[0]), run(home, wanted()[1], "diverged")}
    run(home, wanted()[2], "unfinished")
    run(home, wanted()[3].replace(outer_steps=77))  # of no study
    assert export("tiny")[0] == 2
    assert names(shipped) == kept | {MANIFEST}
    lines = [f"{hashlib.sha256((shipped / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(kept)]
    assert (shipped / MANIFEST).read_text() == "".join(lines)
    read = records.read(shipped / f"{wanted()[0].recipe_id}.jsonl")
    assert read is not None and read.config.data.fingerprint == "0123456789abcdef" and len(read.rows) == 2
    assert verify() == 2


def test_one_profile_may_be_verified_alone(home: Path, shipped: Path) -> None:
    run(home, wanted()[0])
    export("tiny")
    other = home / "data" / "records" / "laptop"
    other.mkdir()
    (other / MANIFEST).write_text(f"{'0' * 64}  0123456789ab.jsonl\n")
    assert verify("tiny") == 1
    unknown, changed = "no profile 'lapto'; allowed: tiny, laptop", "0123456789ab.jsonl: missing"
    for profile, message in (("laptop", changed), (None, changed), ("h200", "records/h200; "), ("lapto", unknown)):
        with pytest.raises(ConfigError, match=message):
            verify(profile)


def test_what_is_removed_is_named(home: Path, shipped: Path) -> None:
    run(home, wanted()[0])
    export("tiny")
    stale = shipped / "0123456789ab.jsonl"
    stale.write_bytes((shipped / f"{wanted()[0].recipe_id}.jsonl").read_bytes())
    assert export("tiny") == (1, ["0123456789ab"]) and not stale.exists()


def test_with_nothing_to_ship_no_folder_is_made(home: Path, shipped: Path) -> None:
    assert export("tiny") == (0, []) and not shipped.exists()


def test_a_line_of_a_manifest_that_is_none_is_named(home: Path, shipped: Path) -> None:
    run(home, wanted()[0])
    export("tiny")
    (shipped / MANIFEST).write_text("nonsense\n")
    with pytest.raises(ConfigError, match=r"SHA256SUMS: not a manifest \('nonsense'\)"):
        verify()


def test_trials_of_the_tuning_are_shipped(home: Path, shipped: Path) -> None:
    trial = run_config("tiny", "adamw", seed=0, changes={"method.inner.lr": 0.5})
    name = run(home, trial)
    shipped.mkdir(parents=True)
    entry = {"settings": {}, "interior": True, "trials": [{"run": trial.recipe_id}]}
    (shipped / "tuned.json").write_text(json.dumps({"adamw": entry}))
    assert export("tiny")[0] == 1
    assert names(shipped) == {name, MANIFEST, "tuned.json"}


def test_a_stale_record_is_removed_and_one_that_is_still_wanted_stays(home: Path, shipped: Path) -> None:
    """Also when data/runs no longer has it, as on another machine."""
    kept = run(home, wanted()[0])
    export("tiny")
    (home / "elsewhere" / "runs").rename(home / "gone")
    (shipped / "0123456789ab.jsonl").write_text((shipped / kept).read_text())
    assert export("tiny")[0] == 1
    assert names(shipped) == {kept, MANIFEST} and verify() == 1


def test_exporting_twice_changes_nothing(home: Path, shipped: Path) -> None:
    run(home, wanted()[0])
    export("tiny")
    before = {path.name: path.read_bytes() for path in shipped.iterdir()}
    export("tiny")
    assert {path.name: path.read_bytes() for path in shipped.iterdir()} == before


def test_a_shipped_record_from_before_a_field_was_added_is_not_written_again(home: Path, shipped: Path) -> None:
    path = shipped / run(home, wanted()[0])
    export("tiny")
    first, rest = path.read_text().split("\n", 1)
    line = json.loads(first)
    del line["config"]["data"]["group"]
    path.write_text(json.dumps(line) + "\n" + rest)
    before = path.read_bytes()
    export("tiny")
    assert path.read_bytes() == before


def test_a_run_that_was_made_again_takes_the_place_of_the_shipped_one(home: Path, shipped: Path) -> None:
    name = run(home, wanted()[0])
    export("tiny")
    run(home, wanted()[0], "diverged")
    assert export("tiny")[0] == 1
    record = records.read(shipped / name)
    assert record is not None and record.status == "diverged"


def test_an_unknown_profile_is_refused_and_nothing_written(home: Path) -> None:
    with pytest.raises(ConfigError, match="no profile 'huge'"):
        export("huge")
    assert not list(home.iterdir())


def refusal() -> str:
    with pytest.raises(ConfigError) as caught:
        verify()
    return str(caught.value)


def test_verify_names_the_record_that_was_changed_removed_or_added(home: Path, shipped: Path) -> None:
    first, second = run(home, wanted()[0]), run(home, wanted()[1])
    export("tiny")
    path = shipped / first
    whole = path.read_bytes()
    assert verify() == 2

    place = whole.index(b'"val_loss":4.0') + len(b'"val_loss":')
    path.write_bytes(whole[:place] + b"3" + whole[place + 1 :])
    assert refusal() == f"{path}: changed since it was shipped"
    path.unlink()
    assert refusal() == f"{path}: missing"
    path.write_bytes(whole)
    assert verify() == 2

    added = shipped / "0123456789ab.jsonl"
    added.write_bytes((shipped / second).read_bytes())
    assert refusal() == f"{added}: not in the manifest"


def test_verify_checks_every_profile(home: Path, shipped: Path) -> None:
    run(home, wanted()[0])
    export("tiny")
    other = shipped.with_name("laptop")
    other.mkdir()
    (other / MANIFEST).write_text(f"{'0' * 64}  0123456789ab.jsonl\n")
    assert refusal() == f"{other / '0123456789ab.jsonl'}: missing"
    (other / MANIFEST).write_text("")
    assert verify() == 1  # of tiny, whichever comes last
    (other / "0123456789ab.jsonl").write_text("x")
    (other / MANIFEST).write_text(f"{hashlib.sha256(b'x').hexdigest()}  0123456789ab.jsonl\n")
    assert verify() == 2
