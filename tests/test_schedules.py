"""Learning-rate factors at their knots."""

from __future__ import annotations

import itertools
import math

import pytest

from gnlib.config import InnerConfig
from gnlib.schedules import WITHOUT_LENGTH, learning_rate_factor

OUTER, INNER = 4, 6
SCHEDULES = ("constant", "global_cosine", "global_inner_cosine", "constant_inner_cosine")


def _inner(schedule: str, **changes: object) -> InnerConfig:
    return InnerConfig.model_validate({"schedule": schedule, "steps": INNER, **changes})


def _factors(inner: InnerConfig) -> list[list[float]]:
    """[outer step][inner step]."""
    return [[learning_rate_factor(inner, t, i, OUTER) for i in range(inner.steps)] for t in range(OUTER)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedules_without_length_are_those_that_a_longer_run_leaves_as_they_are(schedule: str) -> None:
    steps = list(itertools.product(range(OUTER), range(INNER)))
    short, long = ([learning_rate_factor(_inner(schedule), *at, total) for at in steps] for total in (OUTER, 2 * OUTER))
    assert (short == long) == (schedule in WITHOUT_LENGTH)


# schedule -> factor at (outer step, inner step); steps 4 x 6, final 0
KNOTS = {
    "constant": {(0, 0): 1.0, (1, 3): 1.0, (2, 0): 1.0, (3, 5): 1.0},
    "global_cosine": {(0, 0): 1.0, (1, 0): 0.5 + 0.5 * math.cos(math.pi / 4), (2, 0): 0.5, (4, 0): 0.0},
    "global_inner_cosine": {(0, 0): 1.0, (0, 3): 0.5, (2, 0): 0.5, (2, 3): 0.25, (0, 6): 0.0, (4, 0): 0.0},
    "constant_inner_cosine": {(0, 0): 1.0, (0, 3): 0.5, (2, 0): 1.0, (2, 3): 0.5, (3, 2): 0.75, (0, 6): 0.0},
}
KNOTS_WITH_FLOOR = {  # the same with final 0.1
    "constant": {(0, 0): 1.0, (3, 5): 1.0},
    "global_cosine": {(0, 0): 1.0, (2, 0): 0.55, (4, 0): 0.1},
    "global_inner_cosine": {(0, 0): 1.0, (0, 3): 0.55, (2, 0): 0.55, (2, 3): 0.55**2, (0, 6): 0.1, (4, 0): 0.1},
    "constant_inner_cosine": {(0, 0): 1.0, (0, 3): 0.55, (2, 0): 1.0, (2, 6): 0.1},
}


@pytest.mark.parametrize(("final", "table"), [(0.0, KNOTS), (0.1, KNOTS_WITH_FLOOR)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_has_its_values_at_its_knots(schedule: str, final: float, table: dict) -> None:
    """Start, middle and end; the step after the last (outer step T, or inner step N) is at `final`."""
    inner = _inner(schedule, final=final)
    for (outer_step, inner_step), expected in table[schedule].items():
        assert learning_rate_factor(inner, outer_step, inner_step, OUTER) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_linearly_over_inner_steps_across_outer_steps(schedule: str) -> None:
    """8 warm-up steps with N = 6: factors 1/9, 2/9, ... times the schedule's own; the ninth step is not warmed."""
    warm, plain = _factors(_inner(schedule, warmup=8)), _factors(_inner(schedule))
    for done in range(OUTER * INNER):
        t, i = divmod(done, INNER)
        share = min(1.0, (done + 1) / 9)
        if schedule == "global_cosine":  # its cosine starts only after warm-up
            cooling = 0.5 + 0.5 * math.cos(math.pi * max(0, done - 8) / (OUTER * INNER - 8))
            assert warm[t][i] == pytest.approx(share * cooling, abs=1e-15)
        else:
            assert warm[t][i] == pytest.approx(share * plain[t][i], abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "global_cosine"])
def test_the_first_step_after_warm_up_is_at_the_peak(schedule: str) -> None:
    inner = _inner(schedule, warmup=5)
    factors = [factor for outer in _factors(inner) for factor in outer]
    assert factors[5] == 1.0
    assert max(factors[:5]) < 1.0


def test_global_cosine_never_rises_and_does_not_see_the_outer_steps() -> None:
    factors = [factor for outer in _factors(_inner("global_cosine")) for factor in outer]
    assert all(later < earlier for earlier, later in itertools.pairwise(factors))
    one_long = _inner("global_cosine", steps=1)
    assert factors == [learning_rate_factor(one_long, t, 0, OUTER * INNER) for t in range(OUTER * INNER)]


def test_inner_cosine_is_the_same_in_every_outer_step_up_to_its_peak() -> None:
    constant, cosine = _factors(_inner("constant_inner_cosine")), _factors(_inner("global_inner_cosine"))
    for t in range(OUTER):
        assert constant[t] == constant[0]
        peak = 0.5 + 0.5 * math.cos(math.pi * t / OUTER)
        assert cosine[t] == pytest.approx([peak * factor for factor in constant[0]], abs=1e-15)


def test_for_a_baseline_global_cosine_is_the_usual_cosine_over_steps() -> None:
    inner = _inner("global_cosine", steps=1, final=0.1)
    factors = [learning_rate_factor(inner, t, 0, 10) for t in range(10)]
    assert factors == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * t / 10)) for t in range(10)], abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_longer_than_the_run_only_rises(schedule: str) -> None:
    factors = [learning_rate_factor(_inner(schedule, steps=1, warmup=50, final=1.0), t, 0, 10) for t in range(10)]
    assert factors == pytest.approx([(t + 1) / 51 for t in range(10)], abs=1e-15)


def test_a_warm_up_as_long_as_the_run_has_a_last_step_at_the_peak() -> None:
    inner = _inner("global_cosine", steps=1, warmup=8)
    assert [learning_rate_factor(inner, t, 0, 8) for t in range(9)] == [*((t + 1) / 9 for t in range(8)), 1.0]
