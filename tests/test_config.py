"""Configurations: round trips, stable names, and one-line errors that name the field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gnlib.config import ConfigError, InnerConfig, LineSearchConfig, RunConfig

GAUSS_NEWTON: dict[str, Any] = {
    "model": {"width": 32, "heads": 2},
    "data": {"source": "synthetic", "fingerprint": "abc"},
    "method": {
        "objective": "gauss_newton", "blocks": "layerwise", "ridge": 0.01,
        "inner": {"lr": 0.01, "steps": 4, "betas": [0.9, 0.95], "options": {"nesterov": True, "ns_steps": 6}},
        "line_search": {"candidates": 10},
    },
    "outer_batch": 64,
    "evaluation": {"average": 0.5},
}

# every field, with a valid value that is not its default
OTHER_VALUES: dict[str, Any] = {
    "model.width": 128, "model.mlp_width": 128, "model.blocks": 3, "model.heads": 2, "model.seed": 1,
    "data.source": "synthetic", "data.tokenizer": "t5-base", "data.vocabulary": 2048, "data.sequence_length": 32,
    "data.validation_fraction": 0.1, "data.max_tokens": 1000, "data.fingerprint": "abc", "data.group": "id",
    "start.chinchilla_fraction": 0.0, "start.batch": 8, "start.lr": 1e-3, "start.warmup": 10, "start.seed": 1,
    "method.objective": "prox_linear", "method.blocks": "matrix",
    "method.inner.optimizer": "adamw", "method.inner.source": "abc",
    "method.inner.lr": 0.5, "method.inner.adam_lr": 0.5,
    "method.inner.weight_decay": 0.0, "method.inner.betas": (0.9, 0.95), "method.inner.momentum": 0.9,
    "method.inner.clip": None, "method.inner.options": {"eps": 1e-7}, "method.inner.steps": 2,
    "method.inner.schedule": "constant", "method.inner.warmup": 3, "method.inner.final": 0.1,
    "method.inner.warm_start": False,
    "method.line_search": LineSearchConfig(), "method.line_search.candidates": 4, "method.line_search.zero": False,
    "method.line_search.fraction": 0.5,
    "outer_steps": 3, "outer_batch": 512, "evaluation.every": 2, "evaluation.sequences": 16,
    "evaluation.average": 0.9, "evaluation.stop_below": 3.0,
    "compute.precision": "fp64", "compute.compile": True, "compute.micro_batch": 8,
    "compute.threads": 2, "seed": 1,
    "compute.deterministic": True,
}
OTHER_VALUES_OF_LINEARISED = {"method.ridge": 0.5}  # refused for the plain loss


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and name != "options":
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("tree", [{}, GAUSS_NEWTON], ids=["default", "gauss_newton"])
def test_configuration_survives_json(tree: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.parse(tree)
    text = json.dumps(config.model_dump(mode="json"))
    assert RunConfig.parse(json.loads(text)) == config
    path = tmp_path / "config.json"
    path.write_text(text)
    assert RunConfig.load(path) == config
    assert RunConfig.load(path).run_id == config.run_id


def test_run_id_is_the_digest_of_what_differs_from_the_defaults() -> None:
    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    assert RunConfig().run_id == digest("{}")
    tree = {"seed": 3, "method": {"inner": {"lr": 0.25, "steps": 1}}}  # steps 1 is the default
    assert RunConfig.parse(tree).run_id == digest('{"method":{"inner":{"lr":0.25}},"seed":3}')


def test_run_id_of_a_given_configuration_never_changes() -> None:
    """Golden: records on disk carry these names. A change of a default changes a run; do not edit these to pass."""
    assert RunConfig.parse({}).run_id == "44136fa355b3"
    assert RunConfig.parse(GAUSS_NEWTON).run_id == "f50b2e3295ad"
    assert RunConfig.parse(GAUSS_NEWTON).recipe_id == "00dd2b06bb4d"


def test_run_id_does_not_depend_on_the_order_or_spelling_of_numbers() -> None:
    first = RunConfig.parse({"seed": 1, "start": {"lr": 1}})
    assert first.run_id == RunConfig.parse({"start": {"lr": 1.0}, "seed": 1}).run_id


def test_every_field_changes_the_run_id() -> None:
    names = {"default": RunConfig().run_id}
    for field, value in OTHER_VALUES.items():
        names[field] = RunConfig().replace(**{field: value}).run_id
    linearised = RunConfig().replace(**{"method.objective": "gauss_newton"})
    names["gauss_newton"] = linearised.run_id
    for field, value in OTHER_VALUES_OF_LINEARISED.items():
        names[field] = linearised.replace(**{field: value}).run_id
    assert len(set(names.values())) == len(names), "two of these runs have one name"


def test_the_table_of_other_values_has_every_field() -> None:
    """So that a new field cannot miss the test above."""
    config = RunConfig().replace(**{"method.line_search.candidates": 5})
    assert set(_leaves(config.model_dump())) == {*OTHER_VALUES, *OTHER_VALUES_OF_LINEARISED} - {"method.line_search"}


def test_recipe_id_ignores_what_differs_between_machines_and_nothing_else() -> None:
    """The corpus' fingerprint, and how the arithmetic is cut up."""
    ignored = {"data.fingerprint", "compute.compile", "compute.micro_batch", "compute.deterministic", "compute.threads"}
    config = RunConfig()
    for field, value in OTHER_VALUES.items():
        other = config.replace(**{field: value})
        assert (other.recipe_id == config.recipe_id) == (field in ignored), field
        assert other.run_id != config.run_id


def test_a_preset_given_to_replace_is_not_changed_by_the_next_one() -> None:
    """Profiles share sections; a change inside one must not leak into the next configuration."""
    preset = {"compute": {"micro_batch": 8}}
    RunConfig().replace(preset, {"compute.micro_batch": 4})
    assert preset == {"compute": {"micro_batch": 8}}


def test_replace_changes_the_named_field_alone() -> None:
    config = RunConfig().replace(**{"method.inner.lr": 0.5})
    assert config.method.inner.lr == 0.5
    assert config.replace(**{"method.inner.lr": RunConfig().method.inner.lr}) == RunConfig()
    config = RunConfig().replace(**{"method.line_search.candidates": 7})
    assert config.method.line_search == LineSearchConfig(candidates=7)


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.method.inner.lr = 1.0  # type: ignore[misc]


def test_outer_batch_tokens_are_sequences_times_length() -> None:
    config = RunConfig().replace(**{"data.sequence_length": 33, "outer_batch": 48})
    assert config.outer_batch_tokens == 33 * 48


# ---------------------------------------------------------------- errors


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a truth value for a number": ({"outer_steps": True}, "outer_steps"),
    "typo in the root": ({"outer_stepz": 3}, "outer_stepz"),
    "typo in a section": ({"model": {"widht": 64}}, "model.widht"),
    "typo deep down": ({"method": {"inner": {"learning_rate": 0.1}}}, "method.inner.learning_rate"),
    "typo in the line search": ({"method": {"line_search": {"zeros": True}}}, "method.line_search.zeros"),
    "word for a number": ({"model": {"width": "wide"}}, "model.width"),
    "fraction for a count": ({"outer_steps": 1.5}, "outer_steps"),
    "number for a section": ({"data": 3}, "data"),
    "null for a number": ({"method": {"inner": {"lr": None}}}, "method.inner.lr"),
    "list for a word": ({"data": {"source": ["c4"]}}, "data.source"),
    "one beta": ({"method": {"inner": {"betas": [0.9]}}}, "method.inner.betas.1"),
    "text over lines": ({"compute": {"precision": "fp\n32"}}, "compute.precision"),
    "unknown objective": ({"method": {"objective": "newton"}}, "method.objective"),
    "unknown blocks": ({"method": {"blocks": "layers"}}, "method.blocks"),
    "unknown schedule": ({"method": {"inner": {"schedule": "linear"}}}, "method.inner.schedule"),
    "unknown precision": ({"compute": {"precision": "fp16"}}, "compute.precision"),
    "zero width": ({"model": {"width": 0}}, "model.width"),
    "negative seed": ({"seed": -1}, "seed"),
    "zero learning rate": ({"method": {"inner": {"lr": 0}}}, "method.inner.lr"),
    "infinite learning rate": ({"method": {"inner": {"lr": float("inf")}}}, "method.inner.lr"),
    "learning rate that is no number": ({"method": {"inner": {"lr": float("nan")}}}, "method.inner.lr"),
    "beta of one": ({"method": {"inner": {"betas": [0.9, 1.0]}}}, "method.inner.betas"),
    "negative ridge": ({"method": {"objective": "gauss_newton", "ridge": -1}}, "method.ridge"),
    "ridge without a subproblem": ({"method": {"ridge": 0.1}}, "method.ridge"),
    "vocabulary of bytes": ({"data": {"vocabulary": 256}}, "data.vocabulary"),
    "all held out": ({"data": {"validation_fraction": 1.0}}, "data.validation_fraction"),
    "average of one": ({"evaluation": {"average": 1.0}}, "evaluation.average"),
    "no candidate": ({"method": {"line_search": {"candidates": 0}}}, "method.line_search.candidates"),
    "heads that do not divide": ({"model": {"width": 64, "heads": 5}}, "model.heads"),
    "heads of odd width": ({"model": {"width": 12, "heads": 4}}, "model.heads"),
    "inner steps that do not divide": ({"outer_batch": 10, "method": {"inner": {"steps": 3}}}, "outer_batch"),
    "micro-batches that do not divide": ({"outer_batch": 24, "compute": {"micro_batch": 16}}, "compute.micro_batch"),
    "micro-batches that do not divide what conjugate gradients take at once": (
        {
            "outer_batch": 99, "compute": {"micro_batch": 64},
            "method": {"objective": "gauss_newton", "inner": {"optimizer": "conjugate_gradient", "steps": 3}},
        },
        "compute.micro_batch",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_configuration_is_a_one_line_error_that_names_the_field(wrong: str) -> None:
    tree, field = WRONG[wrong]
    with pytest.raises(ConfigError) as error:
        RunConfig.parse(tree)
    message = str(error.value)
    assert message.startswith(f"{field}: "), message
    assert "\n" not in message and len(message) > len(field) + 5


@pytest.mark.parametrize("tree", [None, [], 3, "{}"])
def test_something_that_is_no_configuration_is_a_one_line_error_with_a_subject(tree: Any) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig.parse(tree)
    assert "\n" not in str(error.value)
    assert not str(error.value).startswith(":"), "a message must say what is wrong, not begin with an empty field"


@pytest.mark.parametrize(
    ("field", "value"),
    [("method.inner.lrr", 0.1), ("methods.inner.lr", 0.1), ("seed.a", 1), ("method.inner.lr", "fast"), ("heads", 2)],
)
def test_replacing_a_wrong_field_is_a_one_line_error_that_names_it(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig().replace(**{field: value})
    assert str(error.value).startswith(f"{field}: ") and "\n" not in str(error.value)


def test_a_missing_file_and_a_file_that_is_no_json_are_one_line_errors_that_name_it(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{outer_steps: 3}\n")
    for path in (tmp_path / "missing.json", broken):
        with pytest.raises(ConfigError) as error:
            RunConfig.load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (InnerConfig, {"steps": 0}, "steps: Input should be greater than 0 (got 0)"),
        (InnerConfig, {"lrr": 1}, "lrr: no such field; "),
        (LineSearchConfig, {"candidates": True}, "candidates: a number is needed (got True)"),
    ],
)
def test_a_section_by_itself_refuses_in_one_line_as_a_whole_configuration_does(
    section: type, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        section(**fields)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
