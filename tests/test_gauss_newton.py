"""Gauss-Newton in a person's own loop: the library's outer step on any model, and a line for what cannot work."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, ListStream, classifier_case, linear_case, mlp, normal, regression_case, run_config, tokens
from oracles import DenseCrossEntropy, Subproblem, assert_all_close, assert_close, flatten, unflatten
from torch import Tensor, nn

from gnlib import ConfigError, CrossEntropy, GaussNewton, InnerConfig, LineSearchConfig, MeanSquaredError, OuterStep
from gnlib.blocks import hidden_matrices, partition
from gnlib.objective import GaussNewtonObjective

VOCABULARY = 7
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}


# ---------------------------------------------------------------- models of Hugging Face, tiny and random


def llama(attention: str = "eager", **changes: Any) -> nn.Module:
    """Grouped queries; its RMSNorm and RoPE compute in fp32 whatever the parameters are."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **SMALL, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8, attn_implementation=attention, **changes,
    )  # fmt: skip
    return randomised(transformers.LlamaForCausalLM(config))


def gpt2(attention: str = "eager", **changes: Any) -> nn.Module:
    """Its output head is its embedding; dropout 0.1, off in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        **SMALL, n_embd=8, n_layer=2, n_head=2, n_positions=8, attn_implementation=attention, **changes
    )
    return randomised(transformers.GPT2LMHeadModel(config))


def randomised(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with weights large enough for every curvature to be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_((p.ndim == 1) + 0.5 * normal(p.shape, generator))
    return model.eval()


HUGGING_FACE: dict[str, tuple[Callable[..., nn.Module], float]] = {"llama": (llama, 1e-5), "gpt2": (gpt2, 1e-10)}
hugging_face = pytest.mark.parametrize("name", HUGGING_FACE)


def with_plain_logits(model: nn.Module) -> nn.Module:
    """The model as the oracles want it: it returns a tensor, and its parameters keep their names."""
    kind = type(model)
    model.__class__ = type("Plain", (kind,), {"forward": lambda self, ids: kind.forward(self, ids).logits})
    return model


def batch() -> tuple[Tensor, Tensor]:
    return tokens(2, 5, seed=3), tokens(2, 5, seed=4)


@pytest.mark.parametrize("kind", ["full", "layerwise"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@hugging_face
def test_the_gradient_on_a_hugging_face_model_is_the_dense_one(name: str, attention: str, kind: str) -> None:
    """J^T (g + H J delta) with J row by row; tied weights are one row of J's columns."""
    make, tolerance = HUGGING_FACE[name]
    model, (inputs, targets) = make(attention), batch()
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    deltas = {n: 0.1 * normal(p.shape, generator) for n, p in anchor.items()}
    blocks = partition(model, kind)  # type: ignore[arg-type]
    points = [{n: anchor[n] + deltas[n] for n in block} for block in blocks]
    found = GaussNewtonObjective(CrossEntropy()).evaluate(model, points, inputs, targets)
    for block, evaluation in zip(blocks, found, strict=True):
        dense = Subproblem(with_plain_logits(make(attention)), DenseCrossEntropy(), inputs, targets, block, 0.0)
        delta = {n: deltas[n] for n in block}
        expected = dense.gauss_newton_gradient(flatten(delta))
        assert_all_close(evaluation.gradient, unflatten(expected, delta), tolerance)
        assert evaluation.value.item() == pytest.approx(dense.gauss_newton_value(flatten(delta)).item(), rel=tolerance)


def test_a_tied_weight_counts_once_with_the_gradients_of_both_its_uses() -> None:
    """Against the same model with embedding and head apart, both moved alike."""
    tied, untied, (inputs, targets) = gpt2(), gpt2(tie_word_embeddings=False), batch()
    untied.load_state_dict(tied.state_dict())
    names = [n for n, _ in tied.named_parameters()]
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    move = {n: p.detach() + 0.1 for n, p in untied.named_parameters()}
    objective = GaussNewtonObjective(CrossEntropy())
    [apart] = objective.evaluate(untied, [move], inputs, targets)
    [together] = objective.evaluate(tied, [{n: move[n] for n in names}], inputs, targets)
    embedding, head = apart.gradient["transformer.wte.weight"], apart.gradient["lm_head.weight"]
    assert head.norm() > 0
    assert_close(together.gradient["transformer.wte.weight"], embedding + head)
    assert together.value.item() == pytest.approx(apart.value.item(), rel=1e-12)


def test_layers_of_hugging_face_models_are_embeddings_blocks_norm_and_head() -> None:
    def layers(model: nn.Module) -> list[str]:
        return [layer[0].rpartition(".")[0] for layer in partition(model, "layerwise")]

    assert layers(llama()) == [
        "model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
        "model.norm", "lm_head",
    ]  # fmt: skip
    assert layers(gpt2()) == [  # the head is the embedding's weight, in the embedding's layer
        "transformer.wte", "transformer.wpe", "transformer.h.0.ln_1", "transformer.h.1.ln_1", "transformer.ln_f",
    ]  # fmt: skip


@hugging_face
def test_hidden_matrices_of_hugging_face_models_are_those_of_their_blocks(name: str) -> None:
    model = HUGGING_FACE[name][0]()
    in_blocks = {n for n, p in model.named_parameters() if p.ndim == 2 and (".layers." in n or ".h." in n)}
    assert hidden_matrices(model) == in_blocks and in_blocks


@hugging_face
def test_the_cache_of_keys_and_values_changes_nothing(name: str) -> None:
    ends = []
    for use_cache in (True, False):
        model = HUGGING_FACE[name][0]()
        model.config.use_cache = use_cache
        newton(model).step([batch()] * 3)
        ends.append({n: p.detach() for n, p in model.named_parameters()})
    assert_all_close(ends[0], ends[1], 1e-12)


# ---------------------------------------------------------------- the step


def newton(model: nn.Module, loss: Any = "cross_entropy", **settings: Any) -> GaussNewton:
    """Two AdamW steps and one batch of line search."""
    plain = {"inner": InnerConfig(optimizer="adamw", lr=0.01, steps=2), "line_search": LineSearchConfig(fraction=0.5)}
    return GaussNewton(model, loss, **(plain | settings))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def batches(inputs: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end, in order."""
    stream = ListStream(inputs, targets)
    return (stream.take(size) for _ in itertools.count())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("blocks", ["full", "layerwise"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_training_loops_outer_step_on_the_same_batches(name: str, blocks: str, accumulate: int) -> None:
    """Bit for bit, over three steps, with what it reports."""
    ours, theirs, size, steps = CASES[name](), CASES[name](), 2, 3
    inner = InnerConfig(optimizer="muon", lr=0.05, steps=4, schedule="global_cosine")
    search = LineSearchConfig(candidates=3, fraction=0.5)
    optimizer = GaussNewton(
        ours.model, ours.loss, inner=inner, blocks=blocks, line_search=search, ridge=0.1, accumulate=accumulate,
        outer_steps=steps,
    )  # fmt: skip
    config = run_config(**{
        "method.objective": "gauss_newton", "method.inner": inner, "method.blocks": blocks, "method.ridge": 0.1,
        "method.line_search": search, "outer_steps": steps, "outer_batch": 4 * size * accumulate,
        "compute.micro_batch": size,
    })
    outer, stream = OuterStep(theirs.model, theirs.loss, config), ListStream(theirs.inputs, theirs.targets)
    endless = batches(ours.inputs, ours.targets, size)
    for _ in range(steps):
        assert optimizer.step(endless) == outer.step(stream)
    found, expected = parameters(ours.model), parameters(theirs.model)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert optimizer.batches_per_step == (4 * accumulate, 2 * accumulate)


def test_one_step_of_a_linear_regression_solves_the_least_squares_problem() -> None:
    """400 gradient steps on the subproblem, which is the problem itself."""
    case, steps = linear_case(), 400
    eigenvalues = torch.linalg.eigvalsh(case.inputs.T @ case.inputs / len(case.inputs))
    rate = (2 / (eigenvalues[0] + eigenvalues[-1])).item()
    inner = InnerConfig(
        optimizer="sgd", lr=rate, momentum=0, weight_decay=0, clip=None, steps=steps, schedule="constant"
    )
    optimizer = GaussNewton(case.model, "mse", inner=inner, line_search=LineSearchConfig(fraction=1 / steps))
    whole = (case.inputs, case.targets)
    assert optimizer.step([whole] * steps, search=[whole]).step_size == 1.0
    solution = torch.linalg.lstsq(case.inputs, case.targets).solution.T
    assert_close(case.model.weight, solution)  # type: ignore[arg-type]


def test_conjugate_gradients_solve_a_linear_regression_in_one_step_on_any_batches() -> None:
    """On all batches of the step together; what the damping leaves is small."""
    case = linear_case()
    options = {"damping": 1e-9, "tolerance": 0.0, "fraction": 1.0}
    inner = InnerConfig(optimizer="conjugate_gradient", steps=6, options=options)
    optimizer = GaussNewton(case.model, "mse", inner=inner, line_search=False)
    optimizer.step(batches(case.inputs, case.targets, 2))  # six of two
    solution = torch.linalg.lstsq(case.inputs, case.targets).solution.T
    assert_close(case.model.weight, solution, 1e-6)  # type: ignore[arg-type]


def learnable(name: str) -> tuple[nn.Module, str, Tensor, Tensor]:
    """In fp32: the next token is the last one plus one; a teacher's outputs; the largest of the first four inputs."""
    if name in HUGGING_FACE:
        ids = (tokens(64, 1, seed=5) + torch.arange(6)) % VOCABULARY
        return HUGGING_FACE[name][0]().float(), "cross_entropy", ids[:, :-1], ids[:, 1:]
    inputs = normal((64, 4), torch.Generator().manual_seed(6)).float()
    if name == "regression":
        teacher = mlp((4, 5, 2), nn.Tanh, seed=9).float()
        return mlp((4, 6, 2), nn.Tanh, seed=8).float(), "mse", inputs, teacher(inputs).detach()
    return mlp((4, 8, 4), nn.GELU, seed=8).float(), "cross_entropy", inputs, inputs.argmax(-1)


@pytest.mark.parametrize("name", ["classifier", "regression", *HUGGING_FACE])
def test_four_steps_with_the_default_settings_lower_the_loss_by_a_third(name: str) -> None:
    model, loss, inputs, targets = learnable(name)
    optimizer = GaussNewton(model, loss)
    assert optimizer.batches_per_step == (32, 32)
    endless = batches(inputs, targets, 16)
    losses = [optimizer.step(endless).train_loss for _ in range(5)]  # each at the parameters before its step
    assert losses[-1] < losses[0] * 2 / 3


def test_search_batches_may_be_given_apart_and_else_follow_the_others() -> None:
    case, ends = regression_case(), []
    pairs = [(case.inputs[i : i + 2], case.targets[i : i + 2]) for i in (0, 2, 4)]
    for given in ((pairs,), (pairs[:2], pairs[2:])):
        fresh = regression_case()
        newton(fresh.model, "mse").step(*given)
        ends.append(parameters(fresh.model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    assert not torch.equal(ends[0]["0.weight"], parameters(case.model)["0.weight"])


def test_without_a_line_search_a_step_takes_the_whole_way_and_no_batch_for_it() -> None:
    case = classifier_case()
    optimizer = newton(case.model, line_search=False)
    info = optimizer.step([(case.inputs, case.targets)] * 2)
    assert (info.step_size, info.search_gain, optimizer.batches_per_step) == (1.0, None, (2, 0))
    found = parameters(case.model)
    assert all(torch.equal(found[n], theta) for n, theta in optimizer.outer.solution.items())


def test_the_cost_counts_the_samples_of_the_batches() -> None:
    """Two inner steps on 3 samples at 5 + 1 forward passes, then 6 step sizes on 3."""
    case = classifier_case()
    info = newton(case.model).step([(case.inputs[:3], case.targets[:3])] * 3)
    assert info.forward_passes == pytest.approx(2 * 3 * 6 + 3 * 6)


def test_without_a_number_of_steps_the_rate_falls_in_each_step_and_with_it_over_all() -> None:
    case = classifier_case()
    assert newton(case.model).outer.config.method.inner.schedule == "constant_inner_cosine"
    assert newton(case.model, outer_steps=5).outer.config.method.inner.schedule == "global_cosine"
    constant = InnerConfig(steps=2, schedule="constant")
    assert newton(case.model, inner=constant, outer_steps=5).outer.config.method.inner.schedule == "constant"


@pytest.mark.parametrize("inner", ["adamw", "torch.optim.RMSprop"])
def test_the_inner_optimiser_may_be_a_name_or_an_import_path(inner: str) -> None:
    case = classifier_case()
    optimizer = GaussNewton(case.model, case.loss, inner=inner)
    assert type(optimizer.outer.solvers[0].optimizers[0]).__name__.lower() == inner.rpartition(".")[2].lower()
    assert optimizer.outer.config.method.inner.steps == 32


def test_conjugate_gradients_are_an_inner_solver_by_name() -> None:
    model, loss, inputs, targets = learnable("classifier")
    optimizer = GaussNewton(model, loss, inner="conjugate_gradient")
    endless = batches(inputs, targets, 8)
    losses = [optimizer.step(endless).train_loss for _ in range(3)]
    assert losses[-1] < losses[0] * 2 / 3


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision_of_products_keeps_the_parameters_in_their_own(precision: str) -> None:
    model, loss, inputs, targets = learnable("classifier")
    ends = []
    for chosen in ("fp32", precision):
        fresh = learnable("classifier")[0]
        newton(fresh, loss, precision=chosen).step(batches(inputs, targets, 16))
        ends.append(parameters(fresh))
    torch.set_float32_matmul_precision("highest")
    assert all(p.dtype == torch.float32 for p in ends[1].values())
    assert_all_close(ends[1], ends[0], 0.05)
    assert not torch.equal(ends[1]["0.weight"], parameters(model)["0.weight"])


def test_the_first_step_starts_at_the_weights_that_the_model_then_has() -> None:
    """Pretrained ones may be loaded after the optimiser was made, as with any of torch's."""
    case, ends = classifier_case(), []
    pretrained = mlp((5, 6, 4), nn.GELU, seed=3).state_dict()
    for loaded_first in (True, False):
        model = mlp((5, 6, 4), nn.GELU, seed=0)
        if loaded_first:
            model.load_state_dict(pretrained)
        optimizer = newton(model, line_search=False)
        model.load_state_dict(pretrained)
        optimizer.step([(case.inputs, case.targets)] * 2)
        ends.append(parameters(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_a_frozen_parameter_stays_as_its_owner_sets_it() -> None:
    case = classifier_case()
    name, frozen = next(iter(case.model.named_parameters()))
    frozen.requires_grad_(False)
    optimizer = newton(case.model)
    endless = batches(case.inputs, case.targets, 3)
    for value in (0.5, 0.25):
        with torch.no_grad():
            frozen.fill_(value)
        optimizer.step(endless)
        assert (frozen == value).all()
    assert name not in optimizer.state_dict()["solution"]


# ---------------------------------------------------------------- resuming


def test_a_loaded_state_continues_bit_for_bit() -> None:
    """Through a file of tensors and plain values; the model's parameters are saved beside it, as with any optimiser."""
    def made(seed: int) -> tuple[nn.Module, GaussNewton]:
        model = mlp((5, 6, 4), nn.GELU, seed)
        return model, newton(model, inner=InnerConfig(steps=2, lr=0.3), blocks="layerwise", outer_steps=4)

    case = classifier_case()
    model, optimizer = made(0)
    endless = batches(case.inputs, case.targets, 3)
    optimizer.step(endless)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    rest = [next(endless) for _ in range(6)]
    expected = [optimizer.step(iter(rest[:3])), optimizer.step(iter(rest[3:]))]

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_model, resumed = made(1)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert [resumed.step(iter(rest[:3])), resumed.step(iter(rest[3:]))] == expected
    ends = parameters(model), parameters(resumed_model)
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_the_state_of_another_model_is_refused() -> None:
    state = newton(classifier_case().model).state_dict()
    with pytest.raises(ConfigError, match="a model with other parameters"):
        newton(linear_case().model, "mse").load_state_dict(state)


@pytest.mark.parametrize("other", [{"blocks": "layerwise"}, {"inner": "muon"}, {"inner": "conjugate_gradient"}])
def test_the_state_of_another_setting_is_refused_and_nothing_is_loaded(other: dict[str, Any]) -> None:
    case = classifier_case()
    first = newton(case.model)
    first.step(batches(case.inputs, case.targets, 3))
    optimizer = newton(classifier_case().model, **other)
    words = "another inner optimiser, other options of it or other blocks"
    assert words in refused(lambda: optimizer.load_state_dict(first.state_dict()))
    assert optimizer.outer.done == 0


def test_the_state_of_other_options_of_the_same_optimiser_is_refused_and_nothing_is_loaded() -> None:
    """As options lie in the groups of parameters, those of the state would take the place of one's own unsaid."""

    def made(**options: bool) -> GaussNewton:
        return newton(classifier_case().model, inner=InnerConfig(optimizer="muon", steps=2, options=options))

    first, other, same = made(nesterov=True), made(nesterov=False), made(nesterov=True)
    first.step(batches(classifier_case().inputs, classifier_case().targets, 3))
    assert "other options of it" in refused(lambda: other.load_state_dict(first.state_dict()))
    assert other.outer.done == 0
    same.load_state_dict(first.state_dict())
    assert same.outer.done == 1


@pytest.mark.parametrize("name", ["soap", "shampoo", "schedule_free", "sinkgd", "adam", "conjugate_gradient"])
def test_a_state_fits_what_made_it_whatever_its_optimiser_adds_and_no_sibling(name: str) -> None:
    """Some put a count of steps into their groups; the states of others look like those of a sibling."""
    def made(optimizer: str) -> GaussNewton:
        own = {"soap": {"options": {"precondition_frequency": 1}}, "schedule_free": {"schedule": "constant"}}
        inner = InnerConfig(optimizer=optimizer, steps=2, **own.get(optimizer, {}))  # type: ignore[arg-type]
        return newton(mlp((5, 6, 4), nn.GELU, 0), inner=inner)

    case = classifier_case()
    first, again = made(name), made(name)
    endless = batches(case.inputs, case.targets, 3)
    first.step(endless)
    state = copy.deepcopy(first.state_dict())
    again.model.load_state_dict(first.model.state_dict())
    again.load_state_dict(state)
    rest = [next(endless) for _ in range(3)]
    assert first.step(iter(rest)) == again.step(iter(rest))
    sibling = {"sinkgd": "swan", "adam": "adamw"}.get(name)
    assert not sibling or "another inner optimiser" in refused(lambda: made(sibling).load_state_dict(state))


def test_a_state_of_other_shapes_or_of_something_else_is_refused_and_nothing_is_loaded() -> None:
    case = classifier_case()
    optimizer = newton(case.model)
    before = optimizer.state_dict()
    wider = newton(mlp((5, 12, 4), nn.GELU, seed=0)).state_dict() | {"done": 3}
    for state, why in ((wider, "belongs to a model with other parameters"),
                       ({"done": 3}, "is none of a GaussNewton's state_dict()"),
                       (None, "is none of a GaussNewton's state_dict()")):  # fmt: skip
        assert refused(partial(optimizer.load_state_dict, state)) == f"state: it {why}"  # type: ignore[arg-type]
    assert optimizer.state_dict()["done"] == before["done"] == 0


def test_a_misspelt_field_of_a_section_names_those_of_the_section() -> None:
    line = refused(lambda: InnerConfig(learning_rate=1))  # type: ignore[call-arg]
    assert line.startswith("learning_rate: no such field; allowed: optimizer, ")
    line = refused(lambda: LineSearchConfig(candidate=1))  # type: ignore[call-arg]
    assert line == "candidate: no such field; near: candidates"


def test_after_a_batch_that_is_not_finite_the_next_step_starts_afresh() -> None:
    """As one with the same batches by a new object: neither the inner solution nor the optimiser's state is kept."""
    case = classifier_case()
    lost, new = (newton(classifier_case().model) for _ in range(2))
    info = lost.step([(case.inputs * float("nan"), case.targets)] * 3)
    assert info.step_size == 0.0 and info.train_loss != info.train_loss
    for optimizer in (lost, new):
        optimizer.outer.done = 1
        optimizer.step(batches(case.inputs, case.targets, 3))
    assert all(torch.equal(p, parameters(new.model)[name]) for name, p in parameters(lost.model).items())


# ---------------------------------------------------------------- what cannot work, in one line


def test_what_pytorchs_own_optimisers_would_be_given_is_refused_by_name() -> None:
    model = classifier_case().model
    assert "loss: cross_entropy" in refused(lambda: GaussNewton(model, nn.CrossEntropyLoss()))  # type: ignore[arg-type]
    assert "model: a torch.nn.Module" in refused(lambda: GaussNewton(model.parameters()))  # type: ignore[arg-type]
    assert "inner: " in refused(lambda: GaussNewton(model, inner={"steps": 3}))  # type: ignore[arg-type]
    assert "state: " in refused(lambda: newton(model).load_state_dict({}))


def refused(run: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        run()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "crossentropy"}, "loss: no loss 'crossentropy'; near or allowed: cross_entropy, or a ConvexLoss"),
        ({"inner": "moun"}, "no optimiser 'moun'; near or allowed: muon"),
        ({"inner": "torch.nn.Linear"}, "'torch.nn.Linear' is no torch.optim.Optimizer class"),
        ({"inner": "torch.optim.LBFGS"}, "a trial step failed with TypeError"),
        ({"blocks": "rows"}, "method.blocks: "),
        ({"objective": "newton"}, "method.objective: "),
        ({"precision": "fp8"}, "compute.precision: "),
        ({"ridge": -1}, "method.ridge: "),
        ({"accumulate": 0}, "accumulate: 0; a whole number of batches, at least 1"),
        ({"accumulate": 1.5}, "accumulate: 1.5; a whole number of batches, at least 1"),
        ({"outer_steps": 0}, "outer_steps: 0; a whole number, at least 1, or None"),
        ({"outer_steps": "5"}, "outer_steps: '5'; a whole number, at least 1, or None"),
        ({"loss": CrossEntropy}, "or a ConvexLoss object, got the class CrossEntropy"),
        ({"outer_steps": -1}, "outer_steps: "),
        ({"inner": InnerConfig(schedule="global_cosine")}, "the schedule global_cosine needs their number"),
        ({"inner": InnerConfig(options={"warp": 9})}, "takes no 'warp'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_does_not_exist_or_fit_is_refused_at_once(settings: dict, message: str) -> None:
    assert message in refused(lambda: newton(classifier_case().model, **settings))


def test_a_model_without_trainable_parameters_is_refused() -> None:
    assert "no trainable parameter" in refused(lambda: newton(classifier_case().model.requires_grad_(False)))


@pytest.mark.parametrize("frozen_first", [False, True])
def test_parameters_frozen_or_unfrozen_later_are_refused_by_name(frozen_first: bool) -> None:
    case = classifier_case()
    name, parameter = next(iter(case.model.named_parameters()))
    parameter.requires_grad_(not frozen_first)
    optimizer = newton(case.model)
    optimizer.step(batches(case.inputs, case.targets, 3))
    parameter.requires_grad_(frozen_first)
    line = refused(lambda: optimizer.step(batches(case.inputs, case.targets, 3)))
    assert line == f"model: {name} was frozen or unfrozen since GaussNewton was made; make another"


def test_steps_beyond_the_schedule_are_refused() -> None:
    case = classifier_case()
    optimizer = newton(case.model, outer_steps=1)
    endless = batches(case.inputs, case.targets, 3)
    optimizer.step(endless)
    assert "all 1 steps of the schedule have been taken" in refused(lambda: optimizer.step(endless))


PAIR = (classifier_case().inputs, classifier_case().targets)
CLASSES = classifier_case().model(PAIR[0]).shape[-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[PAIR] * 2], "a step takes 3 (2 to solve, 1 for the line search), got 2"),
        ([[PAIR] * 4], "a step takes 3 (2 to solve, 1 for the line search), got 4; an iterator may have more"),
        ([iter([PAIR] * 2)], "a step takes 3 (2 to solve, 1 for the line search), the iterator ended after 2"),
        ([[PAIR] * 2, []], "a step takes 1 (for the line search), got 0"),
        ([[PAIR[0]] * 3], "each must be a pair of tensors (inputs, targets), got Tensor"),
        ([[{"input_ids": PAIR[0]}] * 3], "each must be a pair of tensors (inputs, targets), got dict"),
        ([[(PAIR[0], PAIR[1] - 100)] * 3], "negative class indices (padding)"),
        ([[(PAIR[0], PAIR[1] + 100)] * 3], "of outputs for"),
        ([[(PAIR[0], torch.full_like(PAIR[1], CLASSES))] * 3], f"class {CLASSES} of outputs for {CLASSES} classes"),
        ([[(PAIR[0], torch.full_like(PAIR[1], -1))] * 3], "negative class indices (padding)"),
        ([[(PAIR[0], PAIR[1].int())] * 3], "targets are class indices, torch.int64; got torch.int32"),
        ([[(PAIR[0], PAIR[1][:-1])] * 3], "need targets"),
        ([[(PAIR[0][..., :-1], PAIR[1])] * 3], "its forward pass fails on these inputs ("),
        ([[(PAIR[0][:0], PAIR[1][:0])] * 3], "one is empty"),
    ],
)
def test_batches_that_do_not_fit_are_refused_and_nothing_moves(given: list, message: str) -> None:
    case = classifier_case()
    before = parameters(case.model)
    optimizer = newton(case.model)
    assert message in refused(lambda: optimizer.step(*given))
    assert all(torch.equal(p, before[n]) for n, p in parameters(case.model).items()) and optimizer.outer.done == 0


def test_a_step_that_is_interrupted_leaves_the_model_as_it_was() -> None:
    class StoppingError(MeanSquaredError):
        calls = 0

        def value(self, z: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 5:  # in the line search
                raise KeyboardInterrupt
            return super().value(z, y)

    case, loss = regression_case(), StoppingError()
    before = parameters(case.model)
    optimizer = newton(case.model, loss)
    loss.calls = -1  # of the check of the model
    with pytest.raises(KeyboardInterrupt):
        optimizer.step([(case.inputs, case.targets)] * 3)
    assert all(torch.equal(p, before[name]) for name, p in parameters(case.model).items())
    assert all(torch.equal(theta, before[name]) for name, theta in optimizer.outer.solution.items())


def test_a_number_of_steps_may_be_numpys_and_float_classes_are_named_as_such() -> None:
    assert newton(classifier_case().model, outer_steps=np.int64(5)).outer_steps == 5
    pair = (PAIR[0], torch.full(PAIR[1].shape, -1.0))
    assert "targets are class indices, torch.int64" in refused(lambda: newton(classifier_case().model).step([pair] * 3))


@pytest.mark.parametrize("place", [1, 2], ids=["to solve", "for the line search"])
def test_after_a_later_batch_that_does_not_fit_the_model_is_as_it_was_and_the_next_step_starts_afresh(
    place: int,
) -> None:
    case, other = classifier_case(), classifier_case()
    optimizer = newton(case.model)
    optimizer.step([PAIR] * 3)
    before = parameters(case.model)
    pairs = [PAIR] * 3
    pairs[place] = (PAIR[0][..., :-1], PAIR[1])
    with pytest.raises(RuntimeError):
        optimizer.step(pairs)
    assert all(torch.equal(p, before[name]) for name, p in parameters(case.model).items())
    optimizer.step([PAIR] * 3)
    other.model.load_state_dict(before)
    fresh = newton(other.model, inner=InnerConfig(optimizer="adamw", lr=0.01, steps=2, warm_start=False))
    fresh.outer.done = 1
    fresh.step([PAIR] * 3)
    assert all(torch.equal(p, parameters(other.model)[name]) for name, p in parameters(case.model).items())


def test_negative_targets_are_refused_for_class_indices_alone() -> None:
    case = regression_case()
    whole = (case.inputs, torch.full_like(case.targets, -1.0).long())
    newton(case.model, "mse").step([whole] * 3)
    search = [(PAIR[0], torch.full_like(PAIR[1], -1))]
    assert "negative class" in refused(lambda: newton(classifier_case().model).step([PAIR] * 2, search))


def test_a_step_is_the_same_without_gradients_around_it() -> None:
    ends = []
    for around in (torch.enable_grad(), torch.no_grad()):
        case = classifier_case()
        with around:
            newton(case.model).step([(case.inputs, case.targets)] * 3)
        ends.append(parameters(case.model))
    assert all(torch.equal(one, ends[1][name]) for name, one in ends[0].items())


def test_schedule_free_by_name_has_the_schedule_that_it_needs() -> None:
    optimizer = GaussNewton(classifier_case().model, inner="schedule_free")
    assert optimizer.outer.config.method.inner.schedule == "constant"


def test_a_parameter_that_the_outputs_do_not_depend_on_stays() -> None:
    """Its gradient is zero; a weight decay would shrink it."""
    case = classifier_case()
    case.model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    for objective in ("gauss_newton", "prox_linear"):
        inner = InnerConfig(optimizer="sgd", lr=0.1, steps=2, weight_decay=0.0)
        newton(case.model, objective=objective, inner=inner).step([(case.inputs, case.targets)] * 3)
    assert torch.equal(case.model.unused, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("inner", ["conjugate_gradient", "sophia_g"])
def test_solvers_that_look_at_the_model_themselves_take_a_hugging_face_model(inner: str) -> None:
    model = gpt2()
    before = parameters(model)
    newton(model, inner=InnerConfig(optimizer=inner, lr=0.01, steps=2)).step([batch()] * 3)
    assert any(not torch.equal(p, before[name]) for name, p in parameters(model).items())


def test_tokens_without_an_embedding_are_refused() -> None:
    optimizer = newton(nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4)).double())
    pair = (torch.tensor([[1, 4]]), torch.tensor([[0, 0]]))
    assert "its forward pass fails on these inputs (index out of range" in refused(lambda: optimizer.step([pair] * 3))


def test_targets_of_another_shape_are_refused_for_the_squared_error() -> None:
    """z [n, 1] - y [n] would be a matrix."""
    case = regression_case()
    pair = (case.inputs, case.targets[:, 0])
    line = refused(lambda: newton(case.model, "mse").step([pair] * 3))
    assert line == "mse: outputs [8, 3] and targets [8] must have the same shape"


class FlashLike(torch.autograd.Function):
    """Has a backward, no forward-mode derivative: what fused attention kernels are."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


CANNOT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: nn.Dropout(0.5), "two forward passes differ (dropout?); use model.eval() or set"),
    "batch norm": (lambda: nn.BatchNorm1d(4), "a forward pass changes 1.num_batches_tracked (BatchNorm"),
    "flash": (lambda: Applied(FlashLike.apply), "no forward-mode derivative, for attention use eager or sdpa"),
    "tuple": (lambda: Applied(lambda x: (x, x)), "its output is neither a tensor nor has `logits`"),
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT)
def test_a_model_that_cannot_be_linearised_is_refused_with_the_way_out(name: str) -> None:
    make, message = CANNOT[name]
    model = nn.Sequential(nn.Linear(5, 4), make()).double()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert message in refused(lambda: newton(model).step([PAIR] * 3))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_torchs_transformer_layers_are_refused_with_the_switch_with_which_they_then_work() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).double().eval()
    model = nn.Sequential(layer, nn.Linear(4, 3).double())
    x, y = normal((2, 3, 4), torch.Generator().manual_seed(0)), torch.randint(3, (2, 3))
    optimizer = newton(model)
    assert "torch.backends.mha.set_fastpath_enabled(False) gives" in refused(lambda: optimizer.step([(x, y)] * 3))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert optimizer.step([(x, y)] * 3).search_gain >= 0  # type: ignore[operator]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", ["dropout", "batch norm"])
def test_the_same_model_works_in_evaluation_mode_and_is_refused_again_in_training_mode(name: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), CANNOT[name][0]()).double().eval()
    optimizer = newton(model)
    optimizer.step([PAIR] * 3)
    model.train()
    assert "model.eval()" in refused(lambda: optimizer.step([PAIR] * 3))


def test_dropout_of_probability_zero_is_no_obstacle_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.0)).double().train()
    assert newton(model).step([PAIR] * 3).step_size >= 0


def test_the_dropout_of_a_hugging_face_model_in_training_mode_is_refused() -> None:
    """Of GPT2's modules, and of Llama's attention, where it is a function."""
    for model in (gpt2(), llama(attention_dropout=0.5)):
        optimizer = newton(model.train())
        assert "two forward passes differ" in refused(partial(optimizer.step, [batch()] * 3))
