"""Shipped records trained again and compared: whether this machine computes the published losses.

Nothing that a machine has already is used: text, start and runs are made in an empty folder, which is removed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from tempfile import TemporaryDirectory

from gnlib import corpus
from gnlib.config import ConfigError
from gnlib.executors import Jobs, StudyError, describe
from gnlib.profiles import find_profile, records_folder
from gnlib.record import Record
from gnlib.study import load, run_study

TOLERANCE = 0.01
"""Nats. Other processors and versions of torch round otherwise; what differs by more is another result."""


@dataclass(frozen=True)
class Repeat:
    run: str
    """As `executors.describe` has it."""
    difference: float
    """Largest difference of the validation losses at a step that both runs evaluated, nats; inf where one has none."""

    def __str__(self) -> str:
        found = "equal, bit for bit" if not self.difference else f"up to {self.difference:.1g} nats apart"
        return f"{found}: {self.run}"


def drawn(profile: str, count: int, seed: int = 0) -> list[Record]:
    """So many of the profile's shipped records of finished runs, at random. ConfigError if there are not as many, or
    where the text of one is not here."""
    find_profile(profile)
    paths = sorted(records_folder(profile).glob("*.jsonl"))
    there = [record for record in load(paths) if record.status == "finished"]
    if not there:
        raise ConfigError(f"profile: no records of {profile!r} are shipped")
    if seed < 0:
        raise ConfigError(f"seed: {seed}; at least 0")  # Python's generator takes its absolute value
    if not 1 <= count <= len(there):
        raise ConfigError(f"again: {count}; allowed: 1 to {len(there)}, the finished records of profile {profile!r}")
    chosen = Random(seed).sample(there, count)
    for source in {record.config.data.source for record in chosen}:
        try:
            corpus.check(source)
        except ConfigError as error:
            raise ConfigError(f"profile: the text of {profile!r} is not here; {error}") from None
    return chosen


def repeat(profile: str, shipped: Sequence[Record], jobs: Jobs = None) -> list[Repeat]:
    """Train them again, and compare the validation losses, those that differ most first.

    ConfigError if the text is not here or another; StudyError, with all of them, if one is TOLERANCE or more apart.
    """
    configs = [record.config for record in shipped]
    with _empty_data_folder():
        trained = run_study(configs, profile, fresh=True, allow_run=True, jobs=jobs)
    pairs = zip(shipped, trained, strict=True)
    found = sorted((Repeat(describe(a.config), difference(a, b)) for a, b in pairs), key=lambda one: -one.difference)
    if found and found[0].difference >= TOLERANCE:
        raise StudyError("\n".join([f"allowed is less than {TOLERANCE} nats", *map(str, found)]))
    return found


def difference(a: Record, b: Record) -> float:
    """Of two runs (`Repeat.difference`); one that ends at the target may do so a step before the other."""
    losses = {row["outer_step"]: row["val_loss"] for row in b.rows}
    pairs = [(row["val_loss"], losses[row["outer_step"]]) for row in a.rows if row["outer_step"] in losses]
    return max(0.0 if x == y else math.inf if x is None or y is None else abs(x - y) for x, y in pairs)


@contextmanager
def _empty_data_folder() -> Iterator[None]:
    """For this process and those that it starts."""
    before = os.environ.get("GNLIB_DATA")
    with TemporaryDirectory(prefix="gnlib-") as folder:
        os.environ["GNLIB_DATA"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["GNLIB_DATA"]
            else:
                os.environ["GNLIB_DATA"] = before
