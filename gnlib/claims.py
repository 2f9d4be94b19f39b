"""The paper's claims beside what our records say, row by row. A claim without records says so and has no number.

`gnlib.paper` has the claims; whether one holds is decided by a bound stated in its text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from gnlib.config import ConfigError
from gnlib.paper import QUESTIONS, SUBJECTS
from gnlib.profiles import find_profile
from gnlib.questions import NOT_INTERIOR, NOT_RUN, OUTDONE, Claim
from gnlib.results import Estimate

FOOTNOTES = {
    NOT_INTERIOR: "a setting in the row is at the edge of what was tried or not tuned by itself, or a run is of "
    "tuning's data order",
    OUTDONE: "a better setting of one of its methods was found since, on the tuning data order; its runs are missing, "
    "so nothing is decided",
}


def claims(
    profile: str, fresh: bool = False, seeds: Sequence[int] | None = None, study: str | None = None
) -> list[Claim]:
    """Every claim (of one study), answered from the profile's records; trains nothing.

    `fresh` reads data/runs alone. `study` is one of `paper.SUBJECTS`. ConfigError for an unknown profile, or a study
    without claims.
    """
    find_profile(profile)
    if study not in (None, *SUBJECTS):
        raise ConfigError(f"study: no claims on {study!r}; allowed: {', '.join(SUBJECTS)}")
    chosen = [question for question in QUESTIONS if study in (None, question.study, question.also_in)]
    return [question.answer(profile, seeds, fresh) for question in chosen]


def as_json(rows: Sequence[Claim]) -> list[dict[str, Any]]:
    """An object a claim: the table's columns, then the figure with the half width of its interval (None where there is
    none), whether it is a lower bound, the bounds that decide, and the marks."""
    return [_object(row) for row in rows]


def _object(row: Claim) -> dict[str, Any]:
    found = row.found or Estimate(math.nan, None, 0)
    return {
        **{name: getattr(row, name) for name in ("claim", "paper", "ours", "n", "unit", "holds")},
        "mean": found.mean if math.isfinite(found.mean) else None,
        "half_width": found.half_width,
        "is_lower_bound": bool(found.censored),
        **{name: getattr(row, name) for name in ("at_least", "at_most", "marks")},
    }


def as_markdown(profiles: Sequence[str]) -> str:
    """The table of the README: claim, the paper's figure, then ours in each profile with its verdict."""
    answers = [claims(profile) for profile in profiles]
    lines = [
        f"| claim | unit | paper | {' | '.join(profiles)} |",
        "| --- " * (3 + len(profiles)) + "|",
    ]
    for rows in zip(*answers, strict=True):
        cells = [f"{row.ours}, n = {row.n}: {row.verdict}" if row.ours else NOT_RUN for row in rows]
        lines.append(f"| {rows[0].claim} | {rows[0].unit} | {rows[0].paper} | {' | '.join(cells)} |")
    return _with_footnotes("\n".join(lines))


def _with_footnotes(table: str) -> str:
    """The table with what its marks mean, a paragraph each."""
    return "\n\n".join([table, *(f"{mark} {text}" for mark, text in FOOTNOTES.items() if mark in table)])


def as_text(rows: Sequence[Claim]) -> str:
    """An aligned table; columns claim, paper, ours, n, holds; long texts go on in the next line."""
    cells = [("claim", "paper", "ours", "n", "holds")]
    cells += [(row.claim, row.paper, row.ours or "-", str(row.n or "-"), row.verdict) for row in rows]
    wrapped = [[wrap(text, width) for text, width in zip(row, (54, 22, 18, 3, 10), strict=True)] for row in cells]
    widths = [max(len(line) for row in wrapped for line in row[column]) for column in range(5)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(parts, widths, strict=True)).rstrip()
        for row in wrapped
        for parts in zip_longest(*row, fillvalue="")
    ]
    return _with_footnotes("\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]))
