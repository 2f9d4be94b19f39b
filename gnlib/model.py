"""The paper's decoder language model: tokens -> features -> logits (arXiv 2510.09378, section 4).

RMSNorm before attention and MLP, RoPE, LayerNorm on the whole query and key vectors before the heads are split, a
two-matrix GELU MLP, an untied head, no biases, weights ~ N(0, 1/fan_in). Shapes: B sequences, S positions, D width,
H heads, K = D/H, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnlib.config import RunConfig
from gnlib.precision import triton_takes

ROPE_THETA = 1e4
NORM_EPS = 1e-6

Rotation = Tensor | tuple[Tensor, Tensor]  # cosines and sines, each [S, K/2]


class BlockTape(NamedTuple):
    """What a block computed on the way, for its tangent and pullback."""

    x: Tensor  # [B, S, D] the block's input
    attention_in: Tensor  # [B, S, D] normed
    query: Tensor  # [B, S, D] before its LayerNorm
    key: Tensor  # [B, S, D] before its LayerNorm
    q: Tensor  # [B, H, S, K] normed and rotated
    k: Tensor  # [B, H, S, K] normed and rotated
    v: Tensor  # [B, H, S, K]
    y: Tensor  # [B, H, S, K] the heads' outputs
    middle: Tensor  # [B, S, D] after attention
    mlp_in: Tensor  # [B, S, D] normed
    hidden: Tensor  # [B, S, M] before GELU
    activated: Tensor  # [B, S, M] after it


class Block(nn.Module):
    """x -> x + Attention(RMSNorm(x)) =: m -> m + MLP(RMSNorm(m))."""

    def __init__(self, width: int, mlp_width: int, heads: int) -> None:
        super().__init__()
        self.head_count = heads
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.query_norm = nn.LayerNorm(width, eps=NORM_EPS, bias=False)
        self.key_norm = nn.LayerNorm(width, eps=NORM_EPS, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.up = nn.Linear(width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, H, S, K]."""
        return x.unflatten(-1, (self.head_count, -1)).transpose(1, 2)

    def before(
        self, x: Tensor, rotation: Tensor, *, fused: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What comes before attention: its input, query, key [B, S, D] and the heads' q, k, v [B, H, S, K].

        `fused` is for passes without a graph: on a GPU through Triton, where autograd would end without a word.
        """
        attention_in = self.norm1(x)
        query, key = self.query(attention_in), self.key(attention_in)
        q = self._normed_and_rotated(self.query_norm, query, rotation, fused)
        k = self._normed_and_rotated(self.key_norm, key, rotation, fused)
        v = self.split(self.value(attention_in))
        # under autocast the norms return fp32, where attention wants one dtype and products have cast already
        return attention_in.to(v.dtype), query, key, q.to(v.dtype), k.to(v.dtype), v

    def _normed_and_rotated(self, norm: nn.LayerNorm, x: Tensor, rotation: Tensor, fused: bool) -> Tensor:
        """RoPE(norm(x)): [B, S, D] -> [B, H, S, K]."""
        if fused and triton_takes(x):
            from gnlib import query_key_kernels  # needs Triton

            return query_key_kernels.normed_and_rotated(x, norm.weight, rotation, self.head_count)
        return rotate(self.split(norm(x)), rotation)

    def after(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What comes after it: middle and the MLP's input [B, S, D], hidden before and after GELU [B, S, M], and the
        block's output [B, S, D]."""
        middle = x + self.out(merge(y))
        mlp_in = self.norm2(middle)
        hidden = self.up(mlp_in)
        activated = F.gelu(hidden)
        return middle, mlp_in.to(hidden.dtype), hidden, activated, middle + self.down(activated)

    def forward(self, x: Tensor, rotation: Tensor, *, fused: bool = False) -> Tensor:
        _, _, _, *heads = self.before(x, rotation, fused=fused)
        return self.after(x, attention(*heads))[-1]


class Decoder(nn.Module):
    """The paper's decoder, tokens [B, S] -> logits [B, S, V] (arXiv 2510.09378, section 4).

    RMSNorm before attention and MLP (eps 1e-6), RoPE (base 1e4), LayerNorm of the whole query and key vectors, a
    two-matrix GELU MLP, an untied head, no biases. Sequences are at most `sequence_length` tokens long.
    """

    def __init__(
        self, vocabulary: int, width: int, mlp_width: int, blocks: int, heads: int, sequence_length: int
    ) -> None:
        super().__init__()
        self.sequence_length = sequence_length
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, mlp_width, heads) for _ in range(blocks))
        self.rotation: Tensor
        self.final_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("rotation", rope_table(sequence_length, width // heads).float(), persistent=False)

    @staticmethod
    def from_config(config: RunConfig) -> Decoder:
        """The model of a run, at its random initialisation (in fp64 for precision fp64, else fp32)."""
        size = config.model
        model = Decoder(
            config.data.vocabulary, size.width, size.mlp_width, size.blocks, size.heads, config.data.sequence_length
        )
        model.initialise(size.seed)
        if config.compute.precision == "fp64":
            model = model.double()
            model.rotation = rope_table(config.data.sequence_length, size.width // size.heads)
        return model

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Matrices ~ N(0, 1/fan_in), the embedding ~ N(0, 1/D), norm scales 1; the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0)

    def features(self, tokens: Tensor, *, fused: bool = False) -> Tensor:
        """[B, S] -> normed features [B, S, D]; `fused` as in `Block.before`."""
        x = self.embedding(tokens)
        rotation = self.rotation[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, rotation, fused=fused)
        return self.final_norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))

    def layers(self) -> list[list[str]]:
        """Parameter names by layer: embedding, each block (the last with the final norm), head (section 3.2)."""
        groups = [["embedding.weight"]]
        for index, block in enumerate(self.blocks):
            groups.append([f"blocks.{index}.{name}" for name, _ in block.named_parameters()])
        groups[-1].append("final_norm.weight")
        return [*groups, ["head.weight"]]

    def hidden_matrices(self) -> list[str]:
        """Names of the blocks' matrices: what Muon and the multi-normalised optimisers treat as matrices."""
        return [name for name, p in self.named_parameters() if name.startswith("blocks.") and p.ndim == 2]

    def layer_flops(self) -> list[float]:
        """Matmul FLOPs of one sequence's forward pass, in the order of `layers`; the embedding is a look-up."""
        block = self.blocks[0]
        matrices = sum(self.product_flops(child) for child in block.children() if isinstance(child, nn.Linear))
        return [0.0, *[matrices + self.attention_flops()] * len(self.blocks), self.product_flops(self.head)]

    def product_flops(self, layer: nn.Linear) -> float:
        """Of one product of a sequence with a layer's matrix: two per multiply-add."""
        return 2.0 * self.sequence_length * layer.weight.numel()

    def attention_flops(self) -> float:
        """Of one sequence's attention, at its causal half: 2 products x S^2/2 x D x 2."""
        return 2.0 * self.sequence_length**2 * self.embedding.embedding_dim


def has_own_layers(model: nn.Module) -> TypeGuard[Decoder]:
    """Whether its parameters are those of `Decoder.layers`: none tied, added or replaced by others."""
    if not isinstance(model, Decoder):
        return False
    return {name for name, _ in model.named_parameters()} == {name for layer in model.layers() for name in layer}


def is_plain(model: nn.Module) -> TypeGuard[Decoder]:
    """Whether rules written by hand for the Decoder are this model's: nothing derived from its classes, replaced, tied
    or added, no hook and no forward of an instance's own. Asked at each inner step, so quick."""
    if type(model) is not Decoder or any(type(block) is not Block for block in model.blocks):
        return False
    layers: list[tuple[nn.Module | None, type[nn.Module]]] = [(model.embedding, nn.Embedding), (model.head, nn.Linear)]
    layers.append((model.final_norm, nn.RMSNorm))
    for block in model.blocks:
        layers += [(block._modules.get(name), kind) for name, kind in _KINDS.items()]
    if not all(layer is not None and type(layer) is kind and _is_as_made(layer) for layer, kind in layers):
        return False
    children = len(model._modules) + sum(len(block._modules) for block in model.blocks)
    return (
        len({id(layer.weight) for layer, _ in layers if layer is not None}) == len(layers)
        and children == len(layers) + 1  # the list of blocks
        and not any(module._parameters or _is_changed(module) for module in (model, *model.blocks))
    )


_KINDS: dict[str, type[nn.Module]] = {  # a block's layers
    "norm1": nn.RMSNorm, "query": nn.Linear, "key": nn.Linear, "value": nn.Linear, "query_norm": nn.LayerNorm,
    "key_norm": nn.LayerNorm, "out": nn.Linear, "norm2": nn.RMSNorm, "up": nn.Linear, "down": nn.Linear,
}  # fmt: skip


def _is_as_made(layer: nn.Module) -> bool:
    """A weight and nothing else, and the settings that `Decoder` and `Block` give it."""
    if [name for name, p in layer._parameters.items() if p is not None] != ["weight"] or _is_changed(layer):
        return False
    if isinstance(layer, nn.Embedding):
        return layer.padding_idx is None and layer.max_norm is None
    return getattr(layer, "eps", NORM_EPS) == NORM_EPS


def _is_changed(module: nn.Module) -> bool:
    """By a hook, or by a forward of its own, as tools that wrap a model set it."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or not {"forward", "features", "before", "after"}.isdisjoint(module.__dict__)


def rope_table(length: int, features: int) -> Tensor:
    """[2, S, K/2] in fp64: cosines and sines of position x theta^(-2i/K)."""
    frequencies = ROPE_THETA ** (-torch.arange(0, features, 2, dtype=torch.float64) / features)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal; all [B, H, S, K]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def merge(heads: Tensor) -> Tensor:
    """[B, H, S, K] -> [B, S, D]."""
    return heads.transpose(1, 2).flatten(2)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """RoPE: rotate the feature pairs (i, i + K/2) of x [B, H, S, K]; linear in x, so it is its own tangent."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def shapes_only(config: RunConfig) -> Decoder:
    """The run's model without memory (on the meta device), to count parameters or to check what is built on them."""
    size = config.model
    with torch.device("meta"):
        return Decoder(
            config.data.vocabulary, size.width, size.mlp_width, size.blocks, size.heads, config.data.sequence_length
        )


def parameter_count(config: RunConfig) -> int:
    """Parameters of the run's model, embedding and head included."""
    return sum(p.numel() for p in shapes_only(config).parameters())
