"""The registry's optimisers against slow references, and its one-line errors."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import normal, tiny_decoder
from oracles import AdamWReference, assert_all_close, assert_close, clipped, flatten, muon, newton_schulz, soap
from torch import Tensor

from gnlib.blocks import hidden_matrices
from gnlib.config import ConfigError, InnerConfig
from gnlib.import_path import source_hash
from gnlib.optimizers import Solver, find, registry, try_out

SHAPES = {"tall": (6, 3), "wide": (3, 6), "vector": (5,), "square": (4, 4)}
MATRICES = {"tall", "wide", "square"}
FACTORS = (1.0, 0.5, 0.8, 0.1)  # of the learning rate, one a step


def _inner(**settings: object) -> InnerConfig:
    schedule = "constant" if settings.get("optimizer") == "schedule_free" else "global_cosine"
    return InnerConfig.model_validate({"clip": None, "schedule": schedule, **settings})


def _start(names: list[str] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    every = {name: normal(shape, generator) for name, shape in SHAPES.items()}
    return {name: every[name] for name in names or SHAPES}


def _gradients(like: dict[str, Tensor], steps: int = len(FACTORS)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: normal(t.shape, generator) for name, t in like.items()} for _ in range(steps)]


def _run(inner: InnerConfig, start: dict[str, Tensor], gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    parameters = {name: t.clone().requires_grad_() for name, t in start.items()}
    solver = Solver(parameters, MATRICES & set(start), inner)
    for index, gradient in enumerate(gradients):
        solver.step(gradient, FACTORS[index % len(FACTORS)])
    return {name: p.detach() for name, p in parameters.items()}


# ---------------------------------------------------------------- AdamW


@pytest.mark.parametrize("clip", [None, 1.0, 1e3])
def test_adamw_follows_its_equations_with_clipping_and_a_schedule(clip: float | None) -> None:
    start = _start()
    gradients = _gradients(start)
    inner = _inner(optimizer="adamw", lr=0.1, betas=(0.8, 0.95), weight_decay=0.3, clip=clip)
    reference, theta = AdamWReference((0.8, 0.95), 0.3), start
    for gradient, factor in zip(gradients, FACTORS, strict=True):
        theta = reference.step(theta, clipped(gradient, clip), 0.1 * factor)
    assert_all_close(_run(inner, start, gradients), theta)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_returns_the_gradient_norm_before_clipping(clip: float | None) -> None:
    start = _start()
    parameters = {name: t.requires_grad_() for name, t in start.items()}
    solver = Solver(parameters, MATRICES, _inner(optimizer="sgd", clip=clip))
    gradient = _gradients(start)[0]
    expected = flatten(gradient).norm()
    assert expected > 1
    assert_close(solver.step(gradient, 1.0), expected)


def test_without_clipping_a_gradient_whose_norm_overflows_is_left_as_it_is() -> None:
    parameters = {"w": torch.nn.Parameter(torch.zeros(4))}
    plain = InnerConfig(optimizer="sgd", lr=1e-20, momentum=0.0, weight_decay=0.0, clip=None)
    solver = Solver(parameters, set(), plain)
    norm = solver.step({"w": torch.full((4,), 3e19)}, 1.0)
    assert norm.isinf() and torch.allclose(parameters["w"], torch.full((4,), -0.3))


def test_sgd_follows_its_equations() -> None:
    """v <- mu v + g; theta <- theta - lr v."""
    start = _start()
    gradients = _gradients(start)
    found = _run(_inner(optimizer="sgd", lr=0.1, momentum=0.7, weight_decay=0.0), start, gradients)
    theta, velocity = start, {name: torch.zeros_like(t) for name, t in start.items()}
    for gradient, factor in zip(gradients, FACTORS, strict=True):
        velocity = {name: 0.7 * velocity[name] + gradient[name] for name in start}
        theta = {name: theta[name] - 0.1 * factor * velocity[name] for name in start}
    assert_all_close(found, theta)


# ---------------------------------------------------------------- Muon

# torch.optim.Muon iterates in bfloat16 (unit roundoff 2^-9 = 0.002); five quintic steps with slope 3.4 leave about 1 %.
# Momentum forgotten, no nesterov or another shape factor changes the total step by more than 10 % (asserted below).
BFLOAT16 = 0.03


@pytest.mark.parametrize("name", sorted(MATRICES))
def test_muon_follows_its_equations_up_to_bfloat16(name: str) -> None:
    start = _start([name])
    gradients = _gradients(start)
    inner = _inner(optimizer="muon", lr=0.1, momentum=0.9, weight_decay=0.2)
    found = _run(inner, start, gradients)[name]
    lrs = [0.1 * factor for factor in FACTORS]
    expected = muon(start[name], [g[name] for g in gradients], lrs, 0.9, 0.2)
    assert_close(found - start[name], expected - start[name], BFLOAT16)
    others = {
        "momentum": muon(start[name], [g[name] for g in gradients], lrs, 0.0, 0.2),
        "weight decay": muon(start[name], [g[name] for g in gradients], lrs, 0.9, 0.0),
    }
    for what, other in others.items():
        assert (other - expected).norm() > 2 * BFLOAT16 * (expected - start[name]).norm(), f"blind to {what}"


def test_the_first_muon_step_is_orthogonalised_and_scaled_by_the_root_of_the_aspect_ratio() -> None:
    for name in sorted(MATRICES):
        start = _start([name])
        gradient = _gradients(start)[:1]
        step = start[name] - _run(_inner(optimizer="muon", lr=1.0, weight_decay=0.0), start, gradient)[name]
        rows, columns = SHAPES[name]
        assert_close(step / math.sqrt(max(1, rows / columns)), newton_schulz(gradient[0][name]), BFLOAT16)
        singular = torch.linalg.svdvals(step) / math.sqrt(max(1, rows / columns))
        assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_leaves_vectors_and_other_parameters_to_adamw_with_its_own_rate() -> None:
    """With adam_lr, and with lr where there is none; exactly AdamW's equations."""
    start = _start()
    gradients = _gradients(start)
    for adam_lr in (0.03, None):
        inner = _inner(optimizer="muon", lr=0.1, adam_lr=adam_lr, betas=(0.8, 0.95), weight_decay=0.3)
        found = _run(inner, start, gradients)["vector"]
        reference, theta = AdamWReference((0.8, 0.95), 0.3), {"vector": start["vector"]}
        for gradient, factor in zip(gradients, FACTORS, strict=True):
            theta = reference.step(theta, {"vector": gradient["vector"]}, (adam_lr or 0.1) * factor)
        assert_close(found, theta["vector"])


def test_muon_takes_the_decoders_hidden_matrices_and_adamw_the_rest() -> None:
    model = tiny_decoder()
    parameters = dict(model.named_parameters())
    solver = Solver(parameters, hidden_matrices(model), _inner(optimizer="muon"))
    names = {id(p): name for name, p in parameters.items()}
    split = {
        type(o).__name__: {names[id(p)] for group in o.param_groups for p in group["params"]} for o in solver.optimizers
    }
    assert split["Muon"] == {n for n, p in parameters.items() if n.startswith("blocks.") and p.ndim == 2}
    assert split["AdamW"] == set(parameters) - split["Muon"]


@pytest.mark.parametrize(("name", "kinds"), [("tall", ["Muon"]), ("vector", ["AdamW"])])
def test_a_block_of_one_kind_has_one_optimiser(name: str, kinds: list[str]) -> None:
    solver = Solver({n: t.requires_grad_() for n, t in _start([name]).items()}, MATRICES, _inner(optimizer="muon"))
    assert [type(o).__name__ for o in solver.optimizers] == kinds


def test_muon_options_reach_muon_alone() -> None:
    start = _start(["tall", "vector"])
    inner = _inner(optimizer="muon", options={"nesterov": False, "ns_steps": 6})
    muon_optimizer, adamw = Solver({n: t.requires_grad_() for n, t in start.items()}, MATRICES, inner).optimizers
    assert muon_optimizer.param_groups[0]["nesterov"] is False and muon_optimizer.param_groups[0]["ns_steps"] == 6
    assert "ns_steps" not in adamw.param_groups[0]


# ---------------------------------------------------------------- SOAP


def _soap_inner(frequency: int) -> InnerConfig:
    options = {"precondition_frequency": frequency}
    return _inner(optimizer="soap", lr=0.1, betas=(0.9, 0.95), weight_decay=0.3, options=options)


@pytest.mark.parametrize(
    # pytorch_optimizer takes its QR in float32 (roundoff 6e-8): exact until the first change of basis, then to 1e-5
    ("frequency", "steps", "tolerance"), [(10, 5, 1e-10), (2, 9, 1e-5), (1, 6, 1e-5)]
)
@pytest.mark.parametrize("name", ["square", "small"])
def test_soap_follows_its_algorithm(name: str, frequency: int, steps: int, tolerance: float) -> None:
    shape = {"square": (4, 4), "small": (4, 3)}[name]
    start = {"matrix": normal(shape, torch.Generator().manual_seed(2))}
    gradients = _gradients(start, steps)
    solver = Solver({"matrix": start["matrix"].clone().requires_grad_()}, {"matrix"}, _soap_inner(frequency))
    for gradient in gradients:
        solver.step(gradient, 1.0)
    expected = soap(start["matrix"], [g["matrix"] for g in gradients], 0.1, (0.9, 0.95), 0.3, frequency)
    assert_close(solver.parameters["matrix"] - start["matrix"], expected - start["matrix"], tolerance)


def test_the_first_soap_step_only_initialises_its_preconditioner() -> None:
    start = _start(["square", "vector"])
    found = _run(_inner(optimizer="soap", lr=0.1), start, _gradients(start)[:1])
    assert all(torch.equal(found[name], start[name]) for name in start)


def test_soap_preconditions_every_ten_steps_by_default() -> None:
    solver = Solver({"tall": _start(["tall"])["tall"].requires_grad_()}, MATRICES, _inner(optimizer="soap"))
    assert solver.optimizers[0].param_groups[0]["precondition_frequency"] == 10


# ---------------------------------------------------------------- every entry


@pytest.mark.parametrize("optimizer", registry)
def test_every_optimiser_moves_every_parameter_downhill(optimizer: str) -> None:
    """On 1/2 |theta|^2 from the same start: the value falls in 20 steps."""
    parameters = {name: t.clone().requires_grad_() for name, t in _start().items()}
    solver = Solver(parameters, MATRICES, _inner(optimizer=optimizer, lr=0.02, weight_decay=0.0))
    before = {name: p.detach().norm() for name, p in parameters.items()}
    for _ in range(20):
        solver.step({name: p.detach().clone() for name, p in parameters.items()}, 1.0)
    for name, p in parameters.items():
        assert p.detach().norm() < before[name], name


@pytest.mark.parametrize("optimizer", registry)
def test_a_rate_factor_of_zero_moves_nothing(optimizer: str) -> None:
    start = _start()
    parameters = {name: t.clone().requires_grad_() for name, t in start.items()}
    solver = Solver(parameters, MATRICES, _inner(optimizer=optimizer, weight_decay=0.1))
    for gradient in _gradients(start):
        solver.step(gradient, 0.0)
    assert all(torch.equal(p, start[name]) for name, p in parameters.items())


def test_an_import_path_names_an_optimiser_of_the_users_own() -> None:
    start = _start()
    gradients = _gradients(start)
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.3}
    found = _run(_inner(optimizer="torch.optim.AdamW", **settings), start, gradients)
    assert_all_close(found, _run(_inner(optimizer="adamw", **settings), start, gradients), 1e-15)


@pytest.mark.parametrize("path", ["torch.optim.Adagrad", "torch.optim.Rprop", "pytorch_optimizer.Lion"])
def test_an_imported_optimiser_gets_the_learning_rate(path: str) -> None:
    solver = Solver({n: t.requires_grad_() for n, t in _start().items()}, MATRICES, _inner(optimizer=path, lr=0.123))
    assert [group["lr"] for o in solver.optimizers for group in o.param_groups] == [0.123]


class Forwards(torch.optim.Adam):
    """Its signature does not name what it passes on."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)


class Deaf(torch.optim.Adam):
    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, lr=0.001)


class OtherName(torch.optim.Adam):
    def __init__(self, params: Any, step_size: float = 0.001) -> None:
        super().__init__(params, lr=step_size)


def test_a_rate_that_the_signature_does_not_name_is_passed_on_or_missed_in_one_line() -> None:
    asked = {"lr": 0.5, "weight_decay": 0.3, "betas": (0.5, 0.6)}
    inner = _inner(optimizer=f"{__name__}.Forwards", **asked)
    solver = Solver({n: t.requires_grad_() for n, t in _start().items()}, set(), inner)
    assert [{name: group[name] for name in asked} for o in solver.optimizers for group in o.param_groups] == [asked]
    for name in ("Deaf", "OtherName"):
        message = _refused(optimizer=f"{__name__}.{name}", lr=0.5)
        assert message == f"method.inner.optimizer: {name} takes no learning rate by the name lr"


# ---------------------------------------------------------------- errors


def _refused(**settings: object) -> str:
    with pytest.raises(ConfigError) as error:
        Solver({n: t.requires_grad_() for n, t in _start().items()}, MATRICES, _inner(**settings))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("method.inner.")
    return message


@pytest.mark.parametrize(("name", "near"), [("moun", "muon"), ("adm", "adam"), ("saop", "soap")])
def test_an_unknown_name_lists_the_near_ones(name: str, near: str) -> None:
    message = _refused(optimizer=name)
    assert message.startswith("method.inner.optimizer: ")
    assert repr(name) in message and near in message.split(":")[-1]


def test_a_name_near_to_nothing_lists_them_all() -> None:
    message = _refused(optimizer="xyzzy")
    assert all(name in message for name in registry)


@pytest.mark.parametrize(
    "path",
    ["no_such_package.AdamW", "torch.optim.AdamWW", "torch.no_such.AdamW", ".AdamW", "..AdamW", "torch.optim.", "."],
)
def test_a_path_that_does_not_import_is_a_one_line_error(path: str) -> None:
    message = _refused(optimizer=path)
    assert message.startswith("method.inner.optimizer: ") and repr(path) in message


def test_a_module_with_an_error_of_its_own_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, source in (("broken_syntax", "class A(:"), ("broken_import", "raise RuntimeError('boom')")):
        (tmp_path / f"{name}.py").write_text(source)
        with pytest.raises(ConfigError, match=rf"^method\.inner\.optimizer: cannot import '{name}\.A' \((Synt|Runt)"):
            find(f"{name}.A")


class Still(torch.optim.SGD):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass


class Fixed(torch.optim.SGD):
    """Keeps the rate that it was made with, which is then no one's to tune or to schedule."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= 0.01 * p.grad


class Rateless(torch.optim.Optimizer):
    """Its groups have their rate under another name, where no schedule would find it."""

    def __init__(self, params: list[Tensor], lr: float = 0.01) -> None:
        super().__init__(params, {"rate": lr})


def test_an_optimiser_whose_groups_have_no_rate_is_refused() -> None:
    name = f"{__name__}.Rateless"
    assert _refused(optimizer=name) == f"method.inner.optimizer: {name} has no learning rate lr"


def test_an_optimiser_whose_steps_do_not_depend_on_its_groups_rate_is_refused() -> None:
    inner = InnerConfig(optimizer=f"{__name__}.Fixed", lr=0.02)
    with pytest.raises(ConfigError, match=r"Fixed: its steps do not follow the lr of its parameter groups"):
        try_out(inner)
    try_out(InnerConfig(optimizer="torch.optim.Rprop", lr=0.02))  # takes it for its first step


@pytest.mark.parametrize("lr", [1e-3, 0.02])
def test_an_optimiser_whose_first_steps_are_tiny_is_not_refused(lr: float) -> None:
    """Prodigy's first steps are a 1e-6th of its rate: beside ones, rounding would take them away or make all alike."""
    before = torch.random.get_rng_state()
    try_out(InnerConfig(optimizer="pytorch_optimizer.Prodigy", lr=lr))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_optimiser_whose_steps_move_nothing_is_refused() -> None:
    inner = InnerConfig(optimizer=f"{__name__}.Still", lr=0.01)
    with pytest.raises(ConfigError, match=r"Still: two trial steps at the rate 0\.01 moved nothing$"):
        try_out(inner)
    for name in ("torch.optim.Adagrad", "torch.optim.SGD", "torch.optim.Rprop", "torch.optim.NAdam"):
        try_out(InnerConfig(optimizer=name, lr=1e-4))


@pytest.mark.parametrize("path", ["./mine.A", "mine..A", ".A", "my module.A"])
def test_what_is_no_import_path_says_what_one_is(path: str) -> None:
    with pytest.raises(ConfigError, match=r"is no import path such as my_module\.MyOptimizer$"):
        find(path)


@pytest.mark.parametrize("path", ["torch.nn.Linear", "torch.optim.lr_scheduler", "torch.tensor", "math.pi"])
def test_something_that_is_no_optimiser_class_is_a_one_line_error(path: str) -> None:
    assert path in _refused(optimizer=path)


@pytest.mark.parametrize("optimizer", [*registry, "torch.optim.Adagrad", "pytorch_optimizer.SOAP"])
def test_an_unknown_option_is_a_one_line_error_that_names_it_and_the_allowed_ones(optimizer: str) -> None:
    message = _refused(optimizer=optimizer, options={"warp_factor": 9})
    assert message.startswith("method.inner.options: ")
    assert "'warp_factor'" in message and message.split("allowed: ")[1]


@pytest.mark.parametrize("field", ["lr", "weight_decay", "betas"])
def test_an_option_cannot_stand_in_for_a_field(field: str) -> None:
    """The record would show the field's value and the run would have used the option's."""
    assert f"AdamW takes no '{field}'" in _refused(optimizer="adamw", options={field: 1})


@pytest.mark.parametrize(
    ("optimizer", "option"),
    [("muon", {"adjust_lr_fn": "mine"}), ("adamw", {"eps": -1.0}), ("adamw", {"eps": "small"}), ("soap", {"eps": -1.0}),
     ("sgd", {"nesterov": True, "dampening": 0.5})],
)
def test_an_impossible_option_is_a_one_line_error(optimizer: str, option: dict[str, object]) -> None:
    assert _refused(optimizer=optimizer, options=option).startswith("method.inner.options: ")


def test_a_solver_continues_from_its_saved_state() -> None:
    start = _start()
    for optimizer in registry:
        gradients = _gradients(start, 6)
        inner = _inner(optimizer=optimizer, lr=0.1)
        whole = _run(inner, start, _gradients(start, 6))
        first = {name: t.clone().requires_grad_() for name, t in start.items()}
        solver = Solver(first, MATRICES, inner)
        for index in range(3):
            solver.step(gradients[index], FACTORS[index % len(FACTORS)])
        second = {name: p.detach().clone().requires_grad_() for name, p in first.items()}
        resumed = Solver(second, MATRICES, inner)
        resumed.load_state_dict(solver.state_dict())
        for index in range(3, 6):
            resumed.step(gradients[index], FACTORS[index % len(FACTORS)])
        assert all(torch.equal(second[name], whole[name]) for name in start), optimizer


def test_every_entry_has_a_label_and_a_source() -> None:
    for name, entry in registry.items():
        assert find(name) is entry
        assert entry.label and entry.source


def test_the_hash_of_an_optimiser_of_ones_own_follows_the_files_that_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, from a package, and what those import in turn; not what only lies beside them."""
    (tmp_path / "hashed").mkdir()
    texts = {
        "hashed/__init__.py": "", "hashed/own.py": "import torch\nfrom . import near\nfrom .near import SCALE\n"
        "class Own(torch.optim.SGD):\n    pass\n", "hashed/near.py": "import hashed.far\nSCALE = 1.0\n",
        "hashed/far.py": "FAR = 1\n", "hashed/beside.py": "UNUSED = 1\n",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = source_hash("hashed.own.Own")
    changed = {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text + "# edited\n")
        changed[name] = source_hash("hashed.own.Own") != before
        (tmp_path / name).write_text(text)
    assert source_hash("hashed.own.Own") == before
    assert {name for name in changed if not changed[name]} == {"hashed/beside.py"}


def test_the_hash_of_a_file_that_imports_nothing_beside_it_is_that_of_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"import torch\nclass Alone(torch.optim.SGD):\n    pass\n"
    (tmp_path / "hashed_alone.py").write_bytes(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert source_hash("hashed_alone.Alone") == hashlib.sha256(text).hexdigest()[:12]


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_the_hash_of_an_installed_packages_class_is_that_of_its_file_alone(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version of the package speaks for what else it holds, which may be many files."""
    package = f"hashed_{folder[:4]}"
    own = tmp_path / folder / package / "own.py"
    own.parent.mkdir(parents=True)
    own.with_name("__init__.py").touch()
    own.with_name("near.py").write_text("SCALE = 1.0\n")
    own.write_text("import torch\nfrom .near import SCALE\nclass Own(torch.optim.SGD):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path / folder)
    assert source_hash(f"{package}.own.Own") == hashlib.sha256(own.read_bytes()).hexdigest()[:12]
