"""The decoder against a loop-by-loop reference, and the properties that its parts promise."""

from __future__ import annotations

import pytest
import torch
from cases import BLOCKS, HEADS, LENGTH, VOCABULARY, normal, tiny_decoder, tokens
from oracles import assert_close, decoder_logits
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gnlib.config import RunConfig
from gnlib.model import Decoder, parameter_count, rope_table, rotate

CONFIG = RunConfig().replace(
    **{"model.width": 36, "model.mlp_width": 50, "model.blocks": 3, "model.heads": 3, "data.vocabulary": 300,
       "data.sequence_length": 10}
)


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 1, 1])
def test_logits_equal_the_decoder_written_position_by_position(length: int) -> None:
    """The tolerance is that of the rotation table, which is rounded to float32; its angles are compared apart."""
    model, inputs = tiny_decoder(), tokens(2, length, seed=3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = torch.stack([decoder_logits(weights, sequence, BLOCKS, HEADS) for sequence in inputs])
    assert_close(model(inputs), expected, 1e-6)


def test_logits_equal_the_reference_to_1e_10_with_an_unrounded_rotation_table() -> None:
    model, inputs = tiny_decoder(), tokens(2, LENGTH, seed=3)
    angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * 10000.0 ** -torch.zeros(1, dtype=torch.float64)
    model.rotation = torch.stack([angles.cos(), angles.sin()])  # width 6 in 3 heads: one pair, frequency 1
    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = torch.stack([decoder_logits(weights, sequence, BLOCKS, HEADS) for sequence in inputs])
    assert_close(model(inputs), expected)


def test_rope_turns_pair_i_by_position_times_theta_to_the_minus_2i_over_k() -> None:
    cosine, sine = rope_table(9, 6).double()
    for position in range(9):
        for i in range(3):
            angle = torch.tensor(position * 10000.0 ** (-2 * i / 6), dtype=torch.float64)
            assert abs(cosine[position, i] - angle.cos()) < 1e-7
            assert abs(sine[position, i] - angle.sin()) < 1e-7


def test_rope_preserves_norms() -> None:
    x = normal((2, 3, 9, 8), torch.Generator().manual_seed(0))
    turned = rotate(x, rope_table(9, 8).double())
    assert_close(turned.norm(dim=-1), x.norm(dim=-1), 1e-6)
    assert (turned - x)[:, :, 1:].norm() > 1


def test_rope_scores_depend_on_relative_positions_alone() -> None:
    """<R_s q, R_t k> is a function of s - t, and a different one for different s - t."""
    generator = torch.Generator().manual_seed(0)
    q, k = normal((8,), generator), normal((8,), generator)
    table = rope_table(9, 8).double()
    scores = rotate(q.expand(1, 1, 9, 8), table)[0, 0] @ rotate(k.expand(1, 1, 9, 8), table)[0, 0].T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-5
    firsts = torch.stack([scores.diagonal(distance)[0] for distance in range(-8, 9)])
    assert (firsts.unsqueeze(0) - firsts.unsqueeze(1)).abs().fill_diagonal_(1).min() > 1e-3


@pytest.mark.parametrize("changed", range(LENGTH))
def test_a_later_token_does_not_change_earlier_logits(changed: int) -> None:
    model, inputs = tiny_decoder(), tokens(2, LENGTH, seed=3)
    other = inputs.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCABULARY
    difference = (model(other) - model(inputs)).abs().amax((0, 2))
    assert difference[:changed].sum() < 1e-12
    assert (difference[changed:] > 1e-6).all(), "and it does change its own and all later ones"


def test_logits_of_a_sequence_do_not_depend_on_the_others_in_the_batch() -> None:
    model, inputs = tiny_decoder(), tokens(3, LENGTH, seed=3)
    assert_close(model(inputs)[1:2], model(inputs[1:2]))


def test_initial_weights_have_variance_one_over_fan_in_and_norm_scales_are_one() -> None:
    """z-scores of mean and variance of n normal entries, each below 5; every matrix is drawn on its own."""
    model = Decoder.from_config(CONFIG)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
            continue
        fan_in = model.embedding.embedding_dim if name == "embedding.weight" else p.shape[1]
        standard, n = p.detach().double() * fan_in**0.5, p.numel()
        assert abs(standard.mean()) * n**0.5 < 5, name
        assert abs(standard.var() - 1) * (n / 2) ** 0.5 < 5, name
    first, second = model.get_parameter("blocks.0.query.weight"), model.get_parameter("blocks.1.query.weight")
    assert not torch.equal(first, second)


def test_the_seed_determines_the_initial_weights() -> None:
    same, again = Decoder.from_config(CONFIG), Decoder.from_config(CONFIG)
    other = Decoder.from_config(CONFIG.replace(**{"model.seed": 1}))
    assert torch.equal(same.head.weight, again.head.weight)
    assert not torch.equal(same.head.weight, other.head.weight)


def test_double_precision_has_the_same_initial_weights() -> None:
    single, double = Decoder.from_config(CONFIG), Decoder.from_config(CONFIG.replace(**{"compute.precision": "fp64"}))
    assert double.head.weight.dtype == torch.float64
    assert torch.equal(single.head.weight.double(), double.head.weight)


def test_the_model_has_the_configured_sizes() -> None:
    model = Decoder.from_config(CONFIG)
    assert model(tokens(2, 10)).shape == (2, 10, 300)
    assert len(model.blocks) == 3 and model.blocks[0].head_count == 3
    assert model.get_parameter("blocks.2.up.weight").shape == (50, 36)


@pytest.mark.parametrize("config", [CONFIG, RunConfig()], ids=["odd", "default"])
def test_parameter_count_equals_the_built_model(config: RunConfig) -> None:
    assert parameter_count(config) == sum(p.numel() for p in Decoder.from_config(config).parameters())


def test_parameter_count_is_the_sum_over_its_parts() -> None:
    """Embedding and head V D each; a block 4 D^2 + 2 D M and four norms; the final norm."""
    width, mlp_width, blocks, vocabulary = 36, 50, 3, 300
    block = 4 * width**2 + 2 * width * mlp_width + 4 * width
    assert parameter_count(CONFIG) == 2 * vocabulary * width + blocks * block + width


def test_layer_flops_are_those_that_torch_counts_with_attention_at_its_causal_half() -> None:
    """Matrices exactly; torch counts both attention products (bmm) in full, we count half of each."""
    model = Decoder.from_config(CONFIG)
    batch = 2
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tokens(batch, 10))
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counts.items() if "bmm" in op)
    matrices = sum(flops for op, flops in counts.items() if "bmm" not in op)
    assert attention > 0 and matrices > 0
    assert sum(model.layer_flops()) * batch == matrices + attention / 2


def test_layer_flops_are_in_the_order_of_the_layers() -> None:
    model = Decoder.from_config(CONFIG)
    flops = model.layer_flops()
    assert len(flops) == len(model.layers())
    assert flops[0] == 0
    assert flops[-1] == 2 * 10 * 300 * 36
    assert flops[1] == flops[2] == flops[3] == 2 * 10 * (4 * 36**2 + 2 * 36 * 50) + 2 * (2 * 10 * 10 * 36) / 2
