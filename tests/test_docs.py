"""The documentation's example runs, and the page of public names is that of the code."""

from __future__ import annotations

import inspect
import re

import pytest

import gnlib
from gnlib import readme
from gnlib.files import home


def test_the_readmes_example_of_a_model_of_your_own_runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    section = (home() / "README.md").read_text(encoding="utf-8").split("## Your own model")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) <= 15
    exec(code, {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) >= 3 and losses[-1] < losses[0] / 2


def test_the_page_of_public_names_is_up_to_date() -> None:
    assert readme.api_page() == (home() / "docs" / "api.md").read_text(encoding="utf-8"), "run: gnlib readme"


@pytest.mark.parametrize("name", gnlib.__all__)
def test_every_public_name_is_explained(name: str) -> None:
    found = getattr(gnlib, name)
    assert len(inspect.getdoc(found) or "") > 20 and f"| `{name}` | " in readme.api_page()


def test_public_names_are_sorted_and_each_is_there_once() -> None:
    assert gnlib.__all__ == sorted(set(gnlib.__all__))


def test_the_readmes_table_of_the_package_has_every_module_once() -> None:
    table = (home() / "README.md").read_text(encoding="utf-8").split("## The package")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    modules = [path.stem for path in (home() / "gnlib").glob("*.py") if not path.stem.startswith("_")]
    assert sorted(named) == sorted(modules)
