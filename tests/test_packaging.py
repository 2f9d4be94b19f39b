"""The package is what it says: its versions agree, importing it is cheap, `make help` is complete, no path leaks."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from gnlib.studies import STUDIES

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
DEPENDENCIES = [line for lines in [PROJECT["dependencies"], *EXTRAS.values()] for line in lines]
THIRD_PARTY = [Requirement(line) for line in DEPENDENCIES if not line.startswith("gnlib[")]
MINORS = ("3.11", "3.12", "3.13")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert len({canonicalize_name(name) for name, _ in pairs}) == len(pairs), "a package is pinned twice"
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("dependency", THIRD_PARTY, ids=lambda dependency: dependency.name)
def test_each_dependency_has_a_pin_within_its_range(dependency: Requirement) -> None:
    assert pins()[canonicalize_name(dependency.name)] in dependency.specifier


def test_pins_are_plain_releases_that_every_platform_can_install() -> None:
    assert [pin for pin in pins().values() if not re.fullmatch(r"\d+(\.\d+)*", pin)] == []


def test_releases_of_datasets_that_lose_rows_or_resume_wrongly_are_refused() -> None:
    [datasets] = [dependency for dependency in THIRD_PARTY if dependency.name == "datasets"]
    assert not {"4.8.4", "5.0.0"} & set(datasets.specifier.filter(["4.8.4", "5.0.0", "5.0.1"]))


def test_each_dependency_is_justified_on_its_line() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for dependency in DEPENDENCIES:
        [line] = [line for line in lines if line.strip().startswith(f'"{dependency}",')]
        assert len(line.partition(" # ")[2]) > 5, f"pyproject.toml: why is {dependency} needed?"


def test_the_extra_all_brings_every_extra() -> None:
    reached, todo = set(), ["all"]
    while todo:
        reached.add(extra := todo.pop())
        todo += [e for line in EXTRAS[extra] if line.startswith("gnlib[") for e in Requirement(line).extras]
    assert reached == set(EXTRAS)


def test_conda_installs_the_same_versions_as_pip() -> None:
    *conda, pip = ENVIRONMENT["dependencies"]
    assert {re.split("[=<>]", line)[0] for line in conda} == {"python", "pip"}, "the rest is in constraints.txt"
    assert pip == {"pip": ["-c constraints.txt", "-e .[all]"]}


def test_python_versions_agree() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in (f"3.{n}" for n in range(8, 20)) if f"{minor}.5" in supported] == list(MINORS)
    classifiers = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert classifiers == list(MINORS)
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + MINORS[0].replace(".", "")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == MINORS[0]
    [conda] = [line for line in ENVIRONMENT["dependencies"] if str(line).startswith("python=")]
    assert conda.removeprefix("python=") in MINORS


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"]
    assert f"\n## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_of_the_package_exists() -> None:
    module, _, function = PROJECT["scripts"]["gnlib"].partition(":")
    assert importlib.util.find_spec(module), f"{module} is missing"
    subprocess.run([sys.executable, "-c", f"from {module} import {function}"], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", ["gnlib", "gnlib.cli"])
def test_import_is_cheap(module: str) -> None:
    pytest.importorskip("resource", reason="CPU time of a process")
    code = f"""
import resource, sys
import {module}
heavy = {{"datasets", "jupyter_core", "IPython", "matplotlib", "pandas", "torch._dynamo"}} & set(sys.modules)
print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, *sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()
    assert heavy == []
    assert float(seconds) < 3  # user time: 0.9 s with torch on an idle laptop


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_make_help_lists_every_target() -> None:
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make (\S+) +\S", shown, re.MULTILINE) == phony.split()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_make_help_and_the_readme_name_the_studies_that_reproduce_all_leaves_out() -> None:
    """Notebook 14 would train baseline_settings as well, if it were left out."""
    print_studies = "shown: ; @echo $(STUDIES)"
    shown = subprocess.run(
        ["make", "-s", "--eval", print_studies, "shown"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    left_out = set(STUDIES) - set(shown.stdout.split())
    assert set(shown.stdout.split()) <= set(STUDIES)
    helped = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    [line] = re.findall(r"^make reproduce-all.*$", helped, re.MULTILINE)
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    [sentence] = re.findall(r"`make reproduce-all` trains .*?\.(?= )", said)
    for text in (line, sentence):
        assert {name for name in STUDIES if re.search(rf"\b{name}\b", text)} == left_out


def test_no_tracked_file_names_a_path_of_somebodys_machine() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    personal = re.compile(r"(?<![\w.:/~-])/(?:root|work|home/\w+|Users/\w+)/|\b[A-Z]:\\+Users\\")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):  # deleted but not yet committed; binary
            continue
        found += [f"{name}: {match[0]}" for match in personal.finditer(text)]
    assert found == []
