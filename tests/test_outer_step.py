"""One outer step against training written by hand: baselines, warm start and reset, line search, resuming, cost."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    KINDS,
    VOCABULARY,
    Case,
    ListStream,
    classifier_case,
    decoder_case,
    linear_case,
    normal,
    regression_case,
    run_config,
    tiny_decoder,
    tokens,
)
from oracles import AdamWReference, Subproblem, assert_all_close, assert_close, flatten, inner_solution, unflatten
from torch import Tensor, nn
from torch.nn import functional as F

from gnlib import outer_step as outer_step_module
from gnlib.config import RunConfig
from gnlib.losses import CrossEntropy
from gnlib.objective import Evaluation, Objective
from gnlib.optimizers import registry
from gnlib.outer_step import OuterStep, StepInfo

GAUSS_NEWTON = {"method.objective": "gauss_newton"}
SEARCH = {"method.line_search.candidates": 5}


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _many_tokens() -> ListStream:
    return ListStream(tokens(40, 5, seed=11), tokens(40, 5, seed=12))


def _many_vectors() -> ListStream:
    generator = torch.Generator().manual_seed(13)
    return ListStream(normal((40, 4), generator), normal((40, 3), generator))


class Recorder:
    """An objective that remembers where it was evaluated."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.points = objective, []  # type: ignore[var-annotated]

    def evaluate(self, model: nn.Module, points: Sequence[Any], inputs: Tensor, targets: Tensor) -> list[Evaluation]:
        merged = {name: t.clone() for point in points for name, t in point.items()}
        self.points.append({name: merged[name] for name, _ in model.named_parameters()})
        return self.objective.evaluate(model, points, inputs, targets)


# ---------------------------------------------------------------- baselines


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_a_baseline_step_is_a_plain_training_step_with_gradient_accumulation(micro_batch: int) -> None:
    """AdamW, clipped, cosine with warm-up, T = 5: the same parameters and losses as a loop over torch.optim.AdamW."""
    settings = {
        "method.inner.lr": 0.02, "method.inner.weight_decay": 0.1, "method.inner.clip": 0.3,
        "method.inner.betas": (0.9, 0.95), "method.inner.schedule": "global_cosine", "method.inner.warmup": 2,
        "outer_batch": 8, "outer_steps": 5, "compute.micro_batch": micro_batch,
    }
    model, plain, stream, data = tiny_decoder(), tiny_decoder(), _many_tokens(), _many_tokens()
    outer = OuterStep(model, CrossEntropy(), run_config(**settings))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    for t in range(5):
        info = outer.step(stream)
        losses = []
        for _ in range(4):  # always four micro-batches of two
            inputs, targets = data.take(2)
            loss = F.cross_entropy(plain(inputs).reshape(-1, VOCABULARY), targets.reshape(-1))
            (loss / 4).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        warming, cooling = min(1, (t + 1) / 3), 0.5 * (1 + math.cos(math.pi * max(0, t - 2) / 3))
        optimizer.param_groups[0]["lr"] = 0.02 * warming * cooling
        optimizer.step()
        optimizer.zero_grad()
        assert info.train_loss == pytest.approx(sum(losses) / 4, rel=1e-10)
        assert (info.step_size, info.search_gain) == (1.0, None)
        assert_all_close(_parameters(model), _parameters(plain))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["loss", "gauss_newton", "prox_linear"])
def test_micro_batching_does_not_change_the_gradient(objective: str, kind: str) -> None:
    """One SGD step with rate 1 moves by the gradient."""
    moves, losses = [], []
    for micro_batch in (1, 2, 8):
        config = run_config(**{
            "method.objective": objective, "method.blocks": kind, "method.inner.optimizer": "sgd",
            "method.inner.lr": 1.0, "method.inner.momentum": 0.0, "outer_batch": 8, "compute.micro_batch": micro_batch,
        })
        model = tiny_decoder()
        before = _parameters(model)
        losses.append(OuterStep(model, CrossEntropy(), config).step(_many_tokens()).train_loss)
        after = _parameters(model)
        moves.append({name: after[name] - before[name] for name in after})
    for moved, loss in zip(moves[:-1], losses[:-1], strict=True):
        assert_all_close(moved, moves[-1])
        assert loss == pytest.approx(losses[-1], rel=1e-12)


def test_blocks_of_the_true_loss_from_one_point_take_the_same_sgd_step_as_the_whole() -> None:
    ends = []
    for kind in KINDS:
        settings = {"method.blocks": kind, "method.inner.optimizer": "sgd", "method.inner.momentum": 0.0}
        model = tiny_decoder()
        OuterStep(model, CrossEntropy(), run_config(**settings)).step(_many_tokens())
        ends.append(_parameters(model))
    assert_all_close(ends[1], ends[0])
    assert_all_close(ends[2], ends[0])


@pytest.mark.parametrize("warm_start", [True, False])
def test_a_baseline_keeps_its_optimisers_state_and_starts_at_the_current_parameters(warm_start: bool) -> None:
    """Whatever `warm_start` says, and also after a line search that did not take the whole step."""
    case = regression_case()
    config = run_config(**SEARCH, **{"method.inner.lr": 1.0, "method.inner.warm_start": warm_start})
    outer = OuterStep(case.model, case.loss, config)
    outer.objective = recorder = Recorder(outer.objective)
    stream = ListStream(case.inputs[:4], case.targets[:4])
    for t in range(3):
        before = _parameters(case.model)
        info = outer.step(stream)
        assert info.step_size < 1, "the line search must shorten the step, or nothing is tested"
        assert_all_close(recorder.points[t], before, 1e-15)
        assert all(state["step"] == t + 1 for state in outer.solvers[0].optimizers[0].state.values())


# ---------------------------------------------------------------- Gauss-Newton


@pytest.mark.parametrize("objective", ["gauss_newton", "prox_linear"])
def test_gauss_newton_of_a_linear_model_reaches_least_squares_in_one_outer_step(objective: str) -> None:
    """With an exact inner solve: 400 gradient steps on the same batch of a well-conditioned problem."""
    case, steps = linear_case(), 400
    gram = case.inputs.T @ case.inputs / len(case.inputs)
    eigenvalues = torch.linalg.eigvalsh(gram)
    rate = (2 / (eigenvalues[0] + eigenvalues[-1])).item()
    assert ((eigenvalues[-1] - eigenvalues[0]) / (eigenvalues[-1] + eigenvalues[0])) ** steps < 1e-12
    config = run_config(**{
        "method.objective": objective, "method.inner.optimizer": "sgd", "method.inner.lr": rate,
        "method.inner.momentum": 0.0, "method.inner.steps": steps, "outer_batch": 12 * steps,
        "method.line_search.candidates": 5,
    })
    info = OuterStep(case.model, case.loss, config).step(ListStream(case.inputs, case.targets))
    solution = torch.linalg.lstsq(case.inputs, case.targets).solution.T
    assert info.step_size == 1.0
    assert_close(case.model.weight, solution)  # type: ignore[arg-type]


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_gauss_newton_with_an_exact_inner_solve_moves_by_minus_the_inverse_curvature_times_the_gradient(
    ridge: float,
) -> None:
    """theta_t - (G + 2 lambda / numel)^-1 grad, for the readout of a nonlinear classifier, by gradient descent."""
    case, steps = classifier_case(), 400
    names = ["2.bias"]
    for name, p in case.model.named_parameters():
        p.requires_grad_(name in names)
    dense = Subproblem(case.model, case.dense_loss, case.inputs, case.targets, names, ridge + 0.05)
    hessian = dense.curvature + torch.diag(dense.ridge_diagonal)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    rate = (2 / (eigenvalues[0] + eigenvalues[-1])).item()
    config = run_config(**{
        **GAUSS_NEWTON, "method.ridge": ridge + 0.05, "method.inner.optimizer": "sgd", "method.inner.lr": rate,
        "method.inner.momentum": 0.0, "method.inner.steps": steps, "outer_batch": 9 * steps,
    })
    before = _parameters(case.model)
    OuterStep(case.model, case.loss, config).step(ListStream(case.inputs, case.targets))
    assert_close(case.model.get_parameter("2.bias") - before["2.bias"], dense.minimiser())
    assert torch.equal(case.model.get_parameter("0.weight"), before["0.weight"]), "a frozen parameter stays"


def _one_layer(model: nn.Module, kind: str) -> list[list[str]]:
    assert kind == "layerwise"
    return [[name for name, _ in model.named_parameters()]]


@pytest.mark.parametrize("objective", ["gauss_newton", "prox_linear"])
def test_layerwise_with_one_block_is_full_gauss_newton(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layerwise method over a partition into one layer takes the very steps of the full method."""
    ends = []
    for kind in ("full", "layerwise"):
        if kind == "layerwise":
            monkeypatch.setattr(outer_step_module, "partition", _one_layer)
        config = run_config(**{
            "method.objective": objective, "method.blocks": kind, "method.inner.optimizer": "muon",
            "method.inner.steps": 2, "method.ridge": 0.1, "method.inner.clip": 0.5, **SEARCH,
        })
        model, stream = tiny_decoder(), _many_tokens()
        outer = OuterStep(model, CrossEntropy(), config)
        outer.step(stream)
        outer.step(stream)
        ends.append(_parameters(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_layerwise_of_a_model_of_one_layer_is_full_gauss_newton() -> None:
    ends = []
    for kind in KINDS:
        case = linear_case()
        config = run_config(**GAUSS_NEWTON, **{"method.blocks": kind, "method.inner.steps": 2})
        OuterStep(case.model, case.loss, config).step(ListStream(case.inputs, case.targets))
        ends.append(_parameters(case.model))
    assert torch.equal(ends[0]["weight"], ends[1]["weight"]) and torch.equal(ends[0]["weight"], ends[2]["weight"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["gauss_newton", "prox_linear"])
def test_an_outer_step_is_inner_adamw_steps_on_each_dense_subproblem(case: Case, objective: str, kind: str) -> None:
    """Blocks by themselves, all on the same batch; the merged solution is the model's new parameters."""
    steps, ridge, lr = 3, 0.2, 0.03
    batch = len(case.inputs)
    config = run_config(**{
        "method.objective": objective, "method.blocks": kind, "method.ridge": ridge, "method.inner.lr": lr,
        "method.inner.steps": steps, "outer_batch": batch * steps,
    })
    outer = OuterStep(case.model, case.loss, config)
    expected: dict[str, Tensor] = {}
    for block in outer.blocks:
        dense = Subproblem(case.model, case.dense_loss, case.inputs, case.targets, block, ridge)
        expected |= inner_solution(dense.anchor, _dense_gradient(dense, objective), _adamw(config), [lr] * steps)
    outer.step(ListStream(case.inputs, case.targets))
    assert_all_close(_parameters(case.model), {name: expected[name] for name in _parameters(case.model)})


def _adamw(config: RunConfig) -> AdamWReference:
    return AdamWReference(config.method.inner.betas, config.method.inner.weight_decay)


def _dense_gradient(dense: Subproblem, objective: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def gradient(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        delta = flatten({name: theta[name] - dense.anchor[name] for name in theta})
        return unflatten(dense.gradient(objective, delta), theta)

    return gradient


def test_the_inner_steps_are_linearised_at_the_anchor_on_fresh_batches() -> None:
    """N = 4 inner steps read 4 different batches; the model stays at theta_t until the outer step ends."""
    case = regression_case()
    outer = OuterStep(case.model, case.loss, run_config(**GAUSS_NEWTON, **{"method.inner.steps": 4, "outer_batch": 8}))
    seen, anchor = [], _parameters(case.model)
    evaluate = outer.objective.evaluate

    def spy(model: nn.Module, points: Sequence[Any], inputs: Tensor, targets: Tensor) -> list[Evaluation]:
        seen.append(inputs)
        assert all(torch.equal(p, anchor[name]) for name, p in model.named_parameters())
        return evaluate(model, points, inputs, targets)

    outer.objective.evaluate = spy  # type: ignore[method-assign]
    outer.step(_many_vectors())
    assert torch.equal(torch.cat(seen), _many_vectors().inputs[:8])


# ---------------------------------------------------------------- warm start and reset


def _two_outer_steps(
    case: Case, lr: float, warm_start: bool
) -> tuple[OuterStep, Recorder, list[dict[str, Tensor]], list[StepInfo]]:
    """On one repeated batch; a large rate, so that the line search shortens the first step."""
    config = run_config(**GAUSS_NEWTON, **SEARCH, **{
        "method.inner.lr": lr, "method.inner.steps": 3, "method.inner.warm_start": warm_start,
        "outer_batch": 3 * len(case.inputs),
    })
    outer = OuterStep(case.model, case.loss, config)
    outer.objective = recorder = Recorder(outer.objective)
    stream = ListStream(case.inputs, case.targets)
    anchors: list[dict[str, Tensor]] = []
    infos: list[StepInfo] = []
    for _ in range(2):
        anchors.append(_parameters(case.model))
        infos.append(outer.step(stream))
    return outer, recorder, anchors, infos


@pytest.mark.parametrize("warm_start", [True, False])
def test_warm_start_continues_the_solution_before_line_search_and_reset_starts_at_the_parameters(
    case: Case, warm_start: bool
) -> None:
    """The second outer step's AdamW goes on from theta_hat with its moments, or anew from theta_t without."""
    lr = 1.0
    outer, recorder, anchors, infos = _two_outer_steps(case, lr, warm_start)
    assert infos[0].step_size < 1, "the line search must have shortened the first step, or nothing is tested"
    reference = AdamWReference(outer.config.method.inner.betas, 0.0)
    theta = anchors[0]
    for t in range(2):
        fresh = CASES[case.name]()
        fresh.model.load_state_dict(anchors[t])
        dense = Subproblem(fresh.model, fresh.dense_loss, fresh.inputs, fresh.targets, list(anchors[t]), 0.0)
        if t == 1 and not warm_start:
            theta, reference = anchors[1], AdamWReference(outer.config.method.inner.betas, 0.0)
        assert_all_close(recorder.points[3 * t], theta)
        theta = inner_solution(theta, _dense_gradient(dense, "gauss_newton"), reference, [lr] * 3)
        if t == 0:
            moved = {n: anchors[0][n] + infos[0].step_size * (theta[n] - anchors[0][n]) for n in theta}
            assert_all_close(anchors[1], moved)
    assert_all_close({name: t.detach() for name, t in outer.solution.items()}, theta)
    steps_in_state = {int(state["step"]) for state in outer.solvers[0].optimizers[0].state.values()}
    assert steps_in_state == {6 if warm_start else 3}


# ---------------------------------------------------------------- line search


@pytest.mark.parametrize("lr", [0.01, 1.0, 100.0])
def test_an_outer_step_with_zero_in_its_search_never_raises_the_search_loss(lr: float) -> None:
    case = decoder_case()
    stream = ListStream(case.inputs, case.targets)
    config = run_config(**GAUSS_NEWTON, **SEARCH, **{"method.inner.lr": lr, "outer_batch": 2})
    outer = OuterStep(case.model, case.loss, config)
    for _ in range(3):
        before = case.dense_loss.value(case.model(case.inputs), case.targets).item()
        info = outer.step(stream)
        after = case.dense_loss.value(case.model(case.inputs), case.targets).item()
        assert after <= before * (1 + 1e-12)
        assert info.search_gain == pytest.approx(before - after, abs=1e-12 * before)
        assert info.step_size in [2 ** (-i / 2) for i in range(5)] + [0.0]


@pytest.mark.parametrize("lr", [1e3, 1e200], ids=["worse", "not finite"])
def test_a_useless_direction_leaves_the_model_exactly_where_it_was(lr: float) -> None:
    """Every step size is worse than 0, or its loss overflows."""
    case = regression_case()
    before = _parameters(case.model)
    config = run_config(**GAUSS_NEWTON, **SEARCH, **{"method.inner.lr": lr, "outer_batch": 8})
    info = OuterStep(case.model, case.loss, config).step(ListStream(case.inputs, case.targets))
    assert (info.step_size, info.search_gain) == (0.0, 0.0)
    assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())


def test_the_search_reads_fresh_sequences_after_the_training_ones() -> None:
    case, stream = regression_case(), _many_vectors()
    config = run_config(**GAUSS_NEWTON, **SEARCH, **{
        "outer_batch": 8, "method.inner.steps": 2, "compute.micro_batch": 2, "method.line_search.fraction": 0.5,
    })
    OuterStep(case.model, case.loss, config).step(stream)
    assert stream.taken == [(2, "train")] * 4 + [(2, "search")] * 2


@pytest.mark.parametrize("fraction", [1.0, 0.75, 0.35, 0.3, 0.01])
def test_a_search_reads_at_least_its_fraction_and_counts_what_it_reads(fraction: float) -> None:
    """Also when the fraction does not split into micro-batches; a batch is never larger than a micro-batch."""
    case, stream = decoder_case(), _many_tokens()
    config = run_config(**SEARCH, **{
        "outer_batch": 8, "compute.micro_batch": 4, "method.line_search.fraction": fraction,
    })
    info = OuterStep(case.model, case.loss, config).step(stream)
    wanted = {1.0: 8, 0.75: 6, 0.35: 3, 0.3: 2, 0.01: 1}[fraction]  # of 8, the nearest whole number
    assert wanted <= stream.total("search") < wanted + 4
    assert max(count for count, _ in stream.taken) <= 4
    assert info.forward_passes == pytest.approx(3 * 8 + 6 * stream.total("search"))


# ---------------------------------------------------------------- the books


@pytest.mark.parametrize(
    ("settings", "units"),
    [({}, 3.0), (GAUSS_NEWTON, 5.0), ({"method.objective": "prox_linear"}, 5.0), (GAUSS_NEWTON | SEARCH, 5.0 + 6.0)],
    ids=["loss", "gauss_newton", "prox_linear", "search"],
)
def test_a_step_of_the_decoder_costs_three_forwards_plain_and_five_linearised(settings: dict, units: float) -> None:
    config = run_config(**{"outer_batch": 8, "method.inner.steps": 2, "compute.micro_batch": 2, **settings})
    info = OuterStep(tiny_decoder(), CrossEntropy(), config).step(_many_tokens())
    assert info.forward_passes == pytest.approx(units * 8)


def test_layerwise_costs_less_than_as_many_full_steps_as_there_are_layers() -> None:
    config = run_config(**GAUSS_NEWTON, **{"method.blocks": "layerwise"})
    outer = OuterStep(tiny_decoder(), CrossEntropy(), config)
    info = outer.step(_many_tokens())
    assert 5.0 * 4 < info.forward_passes < 5.0 * 4 * len(outer.blocks)


def test_the_train_loss_is_the_mean_at_the_anchor_over_the_inner_batches() -> None:
    case, stream = decoder_case(), _many_tokens()
    config = run_config(**GAUSS_NEWTON, **{
        "method.inner.steps": 2, "outer_batch": 8, "method.inner.lr": 0.5, "compute.micro_batch": 2,
    })
    expected = case.dense_loss.value(case.model(stream.inputs[:8]), stream.targets[:8]).item()
    assert OuterStep(case.model, case.loss, config).step(stream).train_loss == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("schedule", ["constant", "global_cosine", "global_inner_cosine", "constant_inner_cosine"])
def test_the_inner_steps_follow_the_schedule(schedule: str) -> None:
    """The rates that reached the optimiser, T = 2 and N = 2, against the knots written out."""
    half = 0.5 + 0.5 * math.cos(math.pi / 4)
    expected = {
        "constant": [1, 1, 1, 1], "global_cosine": [1, half, 0.5, 1 - half],
        "global_inner_cosine": [1, 0.5, 0.5, 0.25], "constant_inner_cosine": [1, 0.5, 1, 0.5],
    }
    case, rates = regression_case(), []
    settings = {"method.inner.schedule": schedule, "method.inner.steps": 2, "outer_steps": 2, "method.inner.lr": 0.2}
    outer = OuterStep(case.model, case.loss, run_config(**GAUSS_NEWTON, **settings))
    (optimizer,) = outer.solvers[0].optimizers
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    stream = _many_vectors()
    outer.step(stream)
    outer.step(stream)
    assert rates == pytest.approx([0.2 * factor for factor in expected[schedule]], rel=1e-12)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("objective", ["loss", "gauss_newton"])
@pytest.mark.parametrize("optimizer", registry)
def test_a_saved_and_loaded_state_continues_bit_identically(optimizer: str, objective: str, warm_start: bool) -> None:
    """Through a file that holds tensors and plain values alone (weights_only), for every optimiser."""
    config = run_config(**SEARCH, **{
        "method.objective": objective, "method.inner.optimizer": optimizer, "method.blocks": "layerwise",
        "method.inner.steps": 2, "method.inner.warm_start": warm_start,
        "method.inner.schedule": "constant" if optimizer == "schedule_free" else "global_cosine",
        "method.inner.lr": 0.003, "outer_batch": 4, "outer_steps": 4,
    })
    model, stream = tiny_decoder(), _many_tokens()
    outer = OuterStep(model, CrossEntropy(), config)
    for _ in range(2):
        outer.step(stream)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "outer": outer.state_dict(), "position": stream.position}, file)
    expected = [outer.step(stream) for _ in range(2)]

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_model, resumed_stream = tiny_decoder(seed=9), _many_tokens()
    resumed_model.load_state_dict(saved["model"])
    resumed = OuterStep(resumed_model, CrossEntropy(), config)
    resumed.load_state_dict(saved["outer"])
    resumed_stream.position = saved["position"]
    assert [resumed.step(resumed_stream) for _ in range(2)] == expected
    ends = _parameters(model), _parameters(resumed_model)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(not torch.equal(p, ends[0][name]) for name, p in saved["model"].items()), "something moved meanwhile"


def test_two_runs_of_one_configuration_are_bit_identical() -> None:
    ends = []
    for _ in range(2):
        model, stream = tiny_decoder(), _many_tokens()
        config = run_config(**GAUSS_NEWTON, **SEARCH, **{"method.inner.optimizer": "muon", "method.inner.steps": 2})
        outer = OuterStep(model, CrossEntropy(), config)
        outer.step(stream)
        outer.step(stream)
        ends.append(_parameters(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
