"""The studies by name: which runs each figure is made of, in each profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gnlib.config import ConfigError, RunConfig
from gnlib.profiles import METHODS, find_method, find_profile, run_config

Study = Callable[[str, Sequence[int], Sequence[str]], list[RunConfig]]  # profile, seeds, methods -> runs


def iteration_complexity(profile: str, seeds: Sequence[int], methods: Sequence[str]) -> list[RunConfig]:
    """Figure 1: the methods at the profile's outer batch, with their tuned settings, all seeds."""
    return [run_config(profile, method, seed) for seed in seeds for method in methods]


STUDIES: dict[str, Study] = {"iteration_complexity": iteration_complexity}


def study_configs(
    name: str, profile: str, seeds: Sequence[int] | None = None, methods: Sequence[str] | None = None
) -> list[RunConfig]:
    """The runs of a study; the profile's own seeds and all methods by default. ConfigError for an unknown name."""
    if name not in STUDIES:
        raise ConfigError(f"study: no study {name!r}; allowed: {', '.join(STUDIES)}")
    chosen = list(dict.fromkeys(methods or METHODS))  # each once
    for method in chosen:
        find_method(method)
    return STUDIES[name](profile, list(dict.fromkeys(seeds or find_profile(profile).seeds)), chosen)
