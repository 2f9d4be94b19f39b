"""Shipped records that are trained again: their losses come out as they are, and what does not is named."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from test_results import made

from gnlib import record as records
from gnlib.config import ConfigError
from gnlib.executors import StudyError
from gnlib.profiles import records_folder, run_config
from gnlib.record import Record
from gnlib.repeat import difference, drawn, repeat
from gnlib.train import run_folder, train

METHODS = ("gauss_newton", "soap", "muon")


@pytest.fixture
def shipped(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """Three short runs of this machine, as they are shipped; what data/runs has of them is spoilt."""
    monkeypatch.setenv("GNLIB_EXECUTOR", "inline")
    for method in METHODS:
        record = train(run_config("tiny", method, seed=1, changes={"outer_steps": 2}, use_tuned=False))
        records.write(records_folder("tiny") / f"{record.config.recipe_id}.jsonl", record)
        (run_folder(record.config) / "record.jsonl").write_text("spoilt\n")
    return drawn("tiny", 3)


def moved(record: Record, nats: float) -> Record:
    """With another last loss."""
    last = record.rows[-1]
    return Record(record.config, {}, [*record.rows[:-1], {**last, "val_loss": last["val_loss"] + nats}], "finished")


def test_the_same_machine_repeats_a_record_bit_for_bit_without_what_it_has_of_it(
    home: Path, shipped: list[Record]
) -> None:
    before = sorted(home.rglob("*"))
    found = repeat("tiny", shipped, jobs=1)
    assert [one.difference for one in found] == [0.0] * 3
    assert str(found[0]).startswith("equal, bit for bit: ")
    assert sorted(home.rglob("*")) == before and os.environ["GNLIB_DATA"] == str(home / "data")


def test_a_small_difference_is_told_and_a_large_one_refused_by_the_run_s_name(shipped: list[Record]) -> None:
    first, second, third = shipped
    told = repeat("tiny", [first, moved(second, 1e-3)], jobs=2)
    assert [round(one.difference, 6) for one in told] == [1e-3, 0.0]
    assert str(told[0]).startswith("up to 0.001 nats apart: ") and second.config.run_id in str(told[0])
    with pytest.raises(StudyError) as refused:
        repeat("tiny", [first, moved(third, 0.02)], jobs=2)
    said = str(refused.value).splitlines()
    assert said[0] == "allowed is less than 0.01 nats"
    assert said[1].startswith("up to 0.02 nats apart: ") and third.config.run_id in said[1]
    assert said[2].startswith("equal, bit for bit: ") and first.config.run_id in said[2]


def test_a_record_of_another_text_is_refused_before_anything_trains(shipped: list[Record]) -> None:
    other = moved(shipped[0], 0.0)
    other.config = other.config.replace({"data.fingerprint": "0123456789abcdef"})
    with pytest.raises(ConfigError, match=r"data.fingerprint: synthetic gives \w+ here, not 0123456789abcdef"):
        repeat("tiny", [other])


def test_a_draw_is_of_finished_records_and_its_seed_s_and_no_larger_than_there_are(shipped: list[Record]) -> None:
    diverged = made("adamw", [5.0, 6.0], status="diverged")
    records.write(records_folder("tiny") / f"{diverged.config.recipe_id}.jsonl", diverged)
    draws = [[record.config.recipe_id for record in drawn("tiny", 3, seed)] for seed in range(20)]
    assert draws[0] == [record.config.recipe_id for record in shipped]
    assert {len(set(draw)) for draw in draws} == {3} and len({tuple(draw) for draw in draws}) > 1
    for count in (4, 0, -1):
        with pytest.raises(ConfigError, match=f"again: {count}; allowed: 1 to 3, the finished records of profile 'ti"):
            drawn("tiny", count)
    with pytest.raises(ConfigError, match="seed: -1; at least 0"):
        drawn("tiny", 1, seed=-1)
    with pytest.raises(ConfigError, match="no records of 'paper-45m' are shipped"):
        drawn("paper-45m", 1)


def test_the_difference_is_the_largest_of_a_step_that_both_have_and_infinite_where_one_has_no_loss() -> None:
    record = made("adamw", [5.0, 4.0, 3.0])
    assert difference(record, made("adamw", [5.0, 4.5, 3.25])) == 0.5
    assert difference(record, made("adamw", [5.0, 4.25])) == difference(made("adamw", [5.0, 4.25]), record) == 0.25
    assert difference(record, made("adamw", [5.0, 4.0, None])) == difference(made("adamw", [None]), record) == math.inf
    assert difference(made("adamw", [5.0, None]), made("adamw", [5.0, None])) == 0.0
