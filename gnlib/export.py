"""Shipping records: the ended runs of a profile's studies, of its tuning and of notebook 10's example, as
data/records/<profile>/<run>.jsonl.

A manifest of SHA-256 sums (the format of sha256sum) lets anyone check that a record is the one that was measured.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from gnlib import record as records
from gnlib.compare import example_runs
from gnlib.config import ConfigError
from gnlib.files import home, replacing
from gnlib.profiles import find_profile, records_folder
from gnlib.studies import STUDIES, study_configs
from gnlib.study import load, run_files

MANIFEST = "SHA256SUMS"


def export(profile: str) -> tuple[int, list[str]]:
    """Copy what is in data/runs and belongs to the profile, and remove records that do not (any more).

    Returns how many records are shipped then, and the names of those removed.
    """
    find_profile(profile)
    folder = records_folder(profile)
    wanted = {config.recipe_id for name in STUDIES for config in study_configs(name, profile)}
    wanted |= _tuning_runs(folder) | example_runs(profile)
    for record in load(run_files(), wanted):
        path = folder / f"{record.config.recipe_id}.jsonl"
        if record.ended and records.read(path) != record:
            records.write(path, record)  # one that says the same stays as it is: fields are added over time
    return _write_manifest(folder, wanted)


def _tuning_runs(folder: Path) -> set[str]:
    path = folder / "tuned.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    return {trial["run"] for entry in table.values() for trial in entry["trials"]}


def _write_manifest(folder: Path, wanted: set[str]) -> tuple[int, list[str]]:
    shipped = sorted(folder.glob("*.jsonl"))
    kept = [path for path in shipped if path.stem in wanted]
    removed = [path for path in shipped if path.stem not in wanted]  # of an older tuning or study
    for path in removed:
        path.unlink()
    if shipped:
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in kept))
    return len(kept), [path.stem for path in removed]


def verify(profile: str | None = None) -> int:
    """Check every manifest under data/records, or a profile's; returns how many records are intact, else raises
    ConfigError."""
    folder = home() / "data" / "records" if profile is None else records_folder(find_profile(profile).name)
    intact = 0
    for manifest in sorted(folder.glob(f"{'*/' if profile is None else ''}{MANIFEST}")):
        listed: dict[str, str] = {}
        for line in manifest.read_text().splitlines():
            digest, _, name = line.partition("  ")
            if not name:
                raise ConfigError(f"{manifest}: not a manifest ({line!r}); `gnlib export` writes one")
            listed[name] = digest
        present = {path.name: _sha256(path) for path in manifest.parent.glob("*.jsonl")}
        for name in sorted(listed.keys() | present.keys()):
            if listed.get(name) != present.get(name):
                raise ConfigError(f"{manifest.parent / name}: {_fault(name, listed, present)}")
        intact += len(listed)
    if not intact:
        raise ConfigError(f"no records under {folder}; GNLIB_HOME names the checkout")
    return intact


def _fault(name: str, listed: dict[str, str], present: dict[str, str]) -> str:
    if name not in present:
        return "missing"
    return "changed since it was shipped" if name in listed else "not in the manifest"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
