"""The methods by name: what solves the outer step, apart from the profile that it runs in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gnlib.config import ConfigError, RunConfig

Changes = dict[str, Any]  # dotted field of RunConfig -> value


@dataclass(frozen=True)
class Method:
    label: str
    """As in tables and figures."""
    changes: Changes
    is_gauss_newton: bool = False


# The paper's methods, which studies run by default
METHODS: dict[str, Method] = {
    "gauss_newton": Method(
        "GN", {"method.objective": "gauss_newton", "method.line_search": {}, "method.inner.optimizer": "muon"}, True
    ),
    "layerwise": Method(
        "Layerwise GN",
        {
            "method.objective": "gauss_newton",
            "method.blocks": "layerwise",
            "method.line_search": {},
            "method.inner.optimizer": "muon",
        },
        True,
    ),
    "prox_linear": Method(
        "GN-prox-linear",
        {"method.objective": "prox_linear", "method.line_search": {}, "method.inner.optimizer": "muon"},
        True,
    ),
    "muon": Method("Muon", {"method.inner.optimizer": "muon"}),
    "soap": Method("SOAP", {"method.inner.optimizer": "soap", "method.inner.betas": (0.9, 0.95)}),
    "adamw": Method("AdamW", {"method.inner.optimizer": "adamw"}),
}

# Further ones, which run when they are named
MORE_METHODS: dict[str, Method] = {
    "adam": Method("Adam", {"method.inner.optimizer": "adam"}),
    "sgd": Method("SGD", {"method.inner.optimizer": "sgd"}),
    "swan": Method("SWAN", {"method.inner.optimizer": "swan"}),
    "sinkgd": Method("SinkGD", {"method.inner.optimizer": "sinkgd"}),
    "sinkgd_stateless": Method("SinkGD, stateless", {"method.inner.optimizer": "sinkgd_stateless"}),
    "shampoo": Method("Shampoo", {"method.inner.optimizer": "shampoo"}),
    "schedule_free": Method(
        "Schedule-free AdamW", {"method.inner.optimizer": "schedule_free", "method.inner.schedule": "constant"}
    ),
    "kfac": Method("K-FAC", {"method.inner.optimizer": "kfac"}),
    "sophia_g": Method("Sophia-G", {"method.inner.optimizer": "sophia_g", "method.inner.betas": (0.965, 0.99)}),
}
ALL_METHODS = METHODS | MORE_METHODS


def find_method(name: str) -> Method:
    """By name; ConfigError with the near names for another."""
    check_name(name, ALL_METHODS)
    return ALL_METHODS[name]


def check_name(name: str, known: Iterable[str], field: str = "method") -> None:
    """ConfigError with the near names for a method's or variant's name that is not known."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known) or known
        raise ConfigError(f"{field}: no method {name!r}; near or allowed: {', '.join(near)}")


def method_of(config: RunConfig) -> str:
    """The method's name of a configuration: the one whose defining fields it has; else its objective and optimiser."""
    inner, objective = config.method.inner, config.method.objective
    if objective == "loss":
        return inner.optimizer
    if objective == "prox_linear":
        return "prox_linear" if config.method.blocks == "full" else f"{config.method.blocks}_prox_linear"
    return {"full": "gauss_newton", "layerwise": "layerwise", "matrix": "matrixwise"}[config.method.blocks]


def label(config: RunConfig) -> str:
    """The method's name in tables and figures."""
    name = method_of(config)
    return ALL_METHODS[name].label if name in ALL_METHODS else name
