"""Partitions cover every trainable parameter once, and matrices for Muon are the hidden ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import BLOCKS, KINDS, mlp, tiny_decoder
from torch import Tensor, nn

from gnlib.blocks import hidden_matrices, partition


class Foreign(nn.Module):
    """Not ours: an embedding, a ModuleList of pairs, a Sequential, a bare parameter, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}) for _ in range(11))
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        self.norm = nn.LayerNorm(4)
        self.readout = nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError


MODELS: dict[str, Callable[[], nn.Module]] = {
    "decoder": tiny_decoder,
    "foreign": Foreign,
    "mlp": lambda: mlp((3, 4, 2), nn.Tanh),
    "linear": lambda: nn.Linear(2, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_blocks_cover_every_parameter_exactly_once(model: str, kind: str) -> None:
    built = MODELS[model]()
    blocks = partition(built, kind)  # type: ignore[arg-type]
    assert sorted(name for block in blocks for name in block) == sorted(name for name, _ in built.named_parameters())
    assert all(blocks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_frozen_parameters_are_in_no_block(model: str, kind: str) -> None:
    built = MODELS[model]()
    frozen = next(name for name, _ in built.named_parameters())
    built.get_parameter(frozen).requires_grad_(False)
    blocks = partition(built, kind)  # type: ignore[arg-type]
    expected = sorted(name for name, _ in built.named_parameters() if name != frozen)
    assert sorted(name for block in blocks for name in block) == expected
    assert all(blocks)


def test_full_is_one_block() -> None:
    model = tiny_decoder()
    assert partition(model, "full") == [[name for name, _ in model.named_parameters()]]


@pytest.mark.parametrize("model", MODELS)
def test_matrix_refines_layerwise_to_one_matrix_a_block(model: str) -> None:
    built = MODELS[model]()
    layers, blocks = partition(built, "layerwise"), partition(built, "matrix")
    assert all(any(set(block) <= set(layer) for layer in layers) for block in blocks)
    dimensions = {name: p.ndim for name, p in built.named_parameters()}
    counts = [sum(dimensions[name] > 1 for name in block) for block in blocks]
    assert sum(counts) == sum(d > 1 for d in dimensions.values()) and max(counts) == 1
    assert all(block in layers for block, count in zip(blocks, counts, strict=True) if not count)  # of vectors alone


def test_biases_and_scales_are_in_the_block_of_the_matrix_before_them() -> None:
    assert partition(mlp((3, 4, 2), nn.Tanh), "matrix") == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    names = [[name.removesuffix(".weight") for name in block] for block in partition(tiny_decoder(), "matrix")]
    assert names[1:7] == [
        ["blocks.0.norm1", "blocks.0.query"], ["blocks.0.key"],
        ["blocks.0.value", "blocks.0.query_norm", "blocks.0.key_norm"],
        ["blocks.0.out", "blocks.0.norm2"], ["blocks.0.up"], ["blocks.0.down"],
    ]  # fmt: skip
    assert names[-2:] == [[f"blocks.{BLOCKS - 1}.down", "final_norm"], ["head"]]


def test_the_decoders_layers_are_embedding_blocks_and_head() -> None:
    first, *blocks, last = partition(tiny_decoder(), "layerwise")
    assert first == ["embedding.weight"] and last == ["head.weight"]
    assert len(blocks) == BLOCKS
    for index, block in enumerate(blocks):
        assert f"blocks.{index}.query.weight" in block
        assert all(name.startswith(f"blocks.{index}.") or name == "final_norm.weight" for name in block)


def test_the_decoders_last_block_holds_the_final_norm() -> None:
    blocks = partition(tiny_decoder(), "layerwise")
    assert [index for index, block in enumerate(blocks) if "final_norm.weight" in block] == [BLOCKS]


def test_the_layers_of_a_foreign_module_are_its_children_and_the_members_of_its_lists() -> None:
    layers = partition(Foreign(), "layerwise")
    assert [sorted({name.rpartition(".")[0] for name in layer}) for layer in layers] == [
        [""], ["table"], *[[f"layers.{i}.down", f"layers.{i}.up"] for i in range(11)],
        ["tail.0"], ["tail.2.0"], ["tail.2.1"], ["norm"], ["readout"],
    ]


def test_a_child_with_a_list_of_blocks_is_a_trunk_whose_parts_are_layers_and_a_block_stays_whole() -> None:
    """Also where a block has lists and sequences of its own."""
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)]), "mlp": nn.Sequential(nn.Linear(4, 4))})
    trunk = nn.ModuleDict({"embed": nn.Embedding(5, 4), "h": nn.ModuleList([block]), "norm": nn.LayerNorm(4)})
    layers = partition(nn.ModuleDict({"trunk": trunk, "head": nn.Linear(4, 5)}), "layerwise")
    assert [layer[0] for layer in layers] == [
        "trunk.embed.weight", "trunk.h.0.experts.0.weight", "trunk.norm.weight", "head.weight",
    ]  # fmt: skip
    assert [len(layer) for layer in layers] == [1, 4, 2, 2]


def test_a_tied_weight_belongs_to_the_layer_that_comes_first() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["embed"].weight  # type: ignore[assignment]
    assert partition(model, "layerwise") == [["embed.weight"], ["head.bias"]]


def test_the_layers_of_a_sequential_model_are_its_members() -> None:
    assert partition(mlp((3, 4, 2), nn.Tanh), "layerwise") == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]


def test_a_parametrised_head_or_embedding_is_no_hidden_matrix() -> None:
    for layer in ("head", "embedding"):
        model = tiny_decoder()
        plain = hidden_matrices(model)
        nn.utils.parametrize.register_parametrization(model.get_submodule(layer), "weight", nn.Identity())
        assert hidden_matrices(model) == plain


def test_the_decoders_hidden_matrices_are_those_of_its_blocks() -> None:
    matrices = ("query", "key", "value", "out", "up", "down")
    expected = {f"blocks.{index}.{name}.weight" for index in range(BLOCKS) for name in matrices}
    assert hidden_matrices(tiny_decoder()) == expected


def test_embedding_head_and_vectors_of_a_foreign_module_are_not_hidden_matrices() -> None:
    expected = {f"layers.{i}.{name}.weight" for i in range(11) for name in ("up", "down")}
    expected |= {"tail.0.weight", "tail.2.0.weight", "tail.2.1.weight"}
    assert hidden_matrices(Foreign()) == expected
