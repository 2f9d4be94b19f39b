"""One frozen, validated object that describes a run completely.

`RunConfig` round-trips through JSON and has a stable content hash, which names the run: the same hash gives the same
losses bit for bit on one CPU with one version of everything. Every field has its unit below it. Ready-made
configurations are in `gnlib.profiles`.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line that names the field."""


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _OneLine(ModelMetaclass):
    """A section that is called by itself refuses as a whole configuration does."""

    def __call__(self, *arguments: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*arguments, **fields)
        except ValidationError as error:
            raise ConfigError(_one_line(error, self)) from None  # type: ignore[arg-type]


class Section(BaseModel, metaclass=_OneLine):
    """Frozen; unknown names are errors, not silently dropped (a typo must not change what is measured)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Which pydantic would take as 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("a number is needed")
        return value


class ModelConfig(Section):
    """The paper's decoder (arXiv 2510.09378, section 4)."""

    width: int = Field(64, gt=0)
    """Features of the residual stream."""
    mlp_width: int = Field(256, gt=0)
    """Hidden features of the two-matrix GELU MLP."""
    blocks: int = Field(2, gt=0)
    """Transformer blocks."""
    heads: int = Field(4, gt=0)
    """Attention heads; they divide the width into an even number of features each (RoPE rotates pairs)."""
    seed: int = Field(0, ge=0)
    """Seed of the random initialisation."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % (2 * self.heads):
            _refuse("model.heads", f"{self.heads} heads must divide width {self.width} into even parts")
        return self


class DataConfig(Section):
    """Text, tokenizer and the fixed-length sequences made from them."""

    source: str = Field("docstrings", min_length=1)
    """`docstrings` (CPython's own prose, no download), `c4` (allenai/c4 "en", streamed), `synthetic` (seeded tokens for
    tests), or the path of a .txt, .jsonl or .parquet file (each also .gz or .zst) or of a folder of such files."""
    tokenizer: str = "bpe"
    """`bpe` (byte-level BPE trained on the source), a tokenizer.json on disk, or a Hugging Face tokenizer by name."""
    vocabulary: int = Field(1024, gt=256)
    """Size of the vocabulary: the model's output width, and the size of a trained BPE."""
    sequence_length: int = Field(64, gt=1)
    """Tokens predicted per sequence."""
    validation_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Share of the documents held out, chosen by a hash of the document, or of the group it belongs to."""
    group: str | None = Field(None, min_length=1)
    """Field of .jsonl rows or column of .parquet files, such as `id`, whose text up to the first `#` names what a
    document is a piece of, such as a book: its pieces are held out together. None takes every document by itself."""
    max_tokens: int | None = Field(None, gt=0)
    """Stop preparing after this many training tokens (needed for C4); None takes everything."""
    fingerprint: str | None = None
    """Hash of the prepared token files. Filled in when a run starts, so that it is part of the run's name."""


class StartConfig(Section):
    """The AdamW checkpoint that every run starts from, made once and cached (arXiv 2510.09378, section 4)."""

    chinchilla_fraction: float = Field(0.05, ge=0, le=1)
    """Training tokens as a share of 20 tokens per parameter; 0 starts from the random initialisation."""
    batch: int = Field(16, gt=0)
    """Sequences per AdamW step."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate, reached after warm-up and decayed by a cosine to a tenth."""
    warmup: int = Field(20, ge=0)
    """Steps of linear warm-up."""
    seed: int = Field(10_000, ge=0)
    """Seed of the data order; far from the runs' own seeds, so that no run repeats it."""


class InnerConfig(Section):
    """The solver of an outer step's subproblem: `steps` optimiser steps on batches of outer_batch / steps sequences.

    Weight decay, clipping and betas are by default those of the paper's 45M runs (arXiv 2510.09378, section 4);
    learning rates are tuned by profile.
    """

    optimizer: str = "muon"
    """A name of `gnlib.optimizers.registry` or the import path of a torch.optim.Optimizer class."""
    source: str | None = None
    """Hash of the files of an optimiser class of your own, so that an edited one is another run; filled in."""
    lr: float = Field(0.02, gt=0)
    """Peak learning rate (for Muon: of the hidden matrices)."""
    adam_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the AdamW part beside Muon (embedding, head, vectors); None takes lr."""
    weight_decay: float = Field(1e-3, ge=0)
    """Decoupled weight decay (coupled for sgd, which has no other)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Averaging factors of Adam-like optimisers."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Momentum of Muon and SGD."""
    clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm of a block; None does not clip."""
    options: dict[str, float | int | bool | str] = Field(default_factory=dict)
    """Further keyword arguments of the optimiser; an unknown one is an error."""
    steps: int = Field(1, gt=0)
    """N, inner steps per outer step; 1 for the baselines."""
    schedule: Literal["constant", "global_cosine", "global_inner_cosine", "constant_inner_cosine"] = "global_cosine"
    """Learning rate over inner steps (arXiv 2510.09378, section 3.3)."""
    warmup: int = Field(0, ge=0)
    """Inner steps of linear warm-up at the start of the run."""
    final: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of a cosine, as a share of its peak."""
    warm_start: bool = True
    """Start from the previous outer step's solution before line search and keep the optimiser's state; False starts
    from the current parameters with fresh state."""

    @model_validator(mode="after")
    def _check(self) -> InnerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            _refuse("method.inner.betas", f"{self.betas} must be in [0, 1)")
        return self


class LineSearchConfig(Section):
    """Step length along the inner solution, by the true loss on batches of its own (arXiv 2510.09378, section 3.1)."""

    candidates: int = Field(5, gt=0)
    """K: step sizes 2^(-i/2), i = 0 .. K-1."""
    zero: bool = True
    """Also try 0 (stay), so that an outer step cannot raise the search loss."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Sequences of the search as a share of the outer batch."""


class MethodConfig(Section):
    """How one outer step is made; `gnlib.methods` has the named ones."""

    objective: Literal["loss", "gauss_newton", "prox_linear"] = "loss"
    """What the inner solver minimises: the loss itself (baselines) or a linearised subproblem."""
    blocks: Literal["full", "layerwise", "matrix"] = "full"
    """Parameter blocks solved apart, all others held fixed."""
    ridge: float = Field(0.0, ge=0)
    """lambda in lambda * sum over tensors of mean(delta^2), added to a linearised subproblem."""
    inner: InnerConfig = InnerConfig()
    line_search: LineSearchConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if self.ridge and self.objective == "loss":
            _refuse("method.ridge", "a ridge needs objective gauss_newton or prox_linear")
        return self


class EvaluationConfig(Section):
    every: int = Field(1, gt=0)
    """Outer steps between evaluations."""
    sequences: int = Field(512, gt=0)
    """Validation sequences, the first ones of the held-out file, the same for every run."""
    average: float = Field(0.0, ge=0, lt=1)
    """Bias-corrected average of the parameters over outer steps that is evaluated; 0 evaluates the parameters."""
    stop_below: float | None = Field(None, gt=0)
    """End the run at the first validation loss that is not above this, nats per token; None runs all outer steps."""


class ComputeConfig(Section):
    precision: Literal["fp64", "fp32", "tf32", "bf16"] = "fp32"
    """Of matrix products; parameters, reductions and losses stay in fp32 (fp64 for fp64)."""
    compile: bool = False
    """torch.compile the objectives (worth it on a GPU)."""
    micro_batch: int = Field(16, gt=0)
    """Sequences per forward pass at most."""
    deterministic: bool = False
    """Only deterministic GPU kernels (slower; CPU runs are deterministic anyway)."""
    threads: int = Field(1, gt=0)
    """CPU threads; part of the configuration because sums are ordered by it."""


MACHINE = {"data": ("fingerprint",), "compute": ("compile", "micro_batch", "deterministic", "threads")}


CONJUGATE_GRADIENT = "conjugate_gradient"
"""The inner solver whose steps share the whole outer batch (`gnlib.conjugate_gradient`)."""


class RunConfig(Section):
    """Everything that determines a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    start: StartConfig = StartConfig()
    method: MethodConfig = MethodConfig()
    outer_steps: int = Field(10, ge=0)
    """T, outer steps."""
    outer_batch: int = Field(1024, gt=0)
    """Training sequences per outer step, the line search's not counted."""
    evaluation: EvaluationConfig = EvaluationConfig()
    compute: ComputeConfig = ComputeConfig()
    seed: int = Field(0, ge=0)
    """Seed of the data order."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        steps, micro = self.method.inner.steps, self.compute.micro_batch
        if self.outer_batch % steps:
            _refuse("outer_batch", f"{self.outer_batch} sequences must be a multiple of method.inner.steps {steps}")
        inner_batch = self.outer_batch // (1 if self.method.inner.optimizer == CONJUGATE_GRADIENT else steps)
        if inner_batch > micro and inner_batch % micro:
            _refuse("compute.micro_batch", f"{micro} must divide the inner batch of {inner_batch} sequences")
        return self

    @property
    def outer_batch_tokens(self) -> int:
        return self.outer_batch * self.data.sequence_length

    @property
    def run_id(self) -> str:
        """12 hex digits: SHA-256 of the fields that differ from the defaults, so a new field keeps old names."""
        return _digest(self.model_dump(mode="json", exclude_defaults=True))

    @property
    def recipe_id(self) -> str:
        """`run_id` without what differs between machines that repeat an experiment: the corpus' fingerprint, and how
        the arithmetic is cut up, which changes results by rounding alone. Records are found by it."""
        tree = self.model_dump(mode="json", exclude_defaults=True)
        for section, names in MACHINE.items():
            kept = {name: value for name, value in tree.pop(section, {}).items() if name not in names}
            tree |= {section: kept} if kept else {}
        return _digest(tree)

    def replace(self, *layers: Mapping[str, Any], **changes: Any) -> RunConfig:
        """A validated copy with dotted fields changed, in order: `config.replace({"method.inner.lr": 0.01})`."""
        tree = self.model_dump()
        for layer in (*layers, changes):
            for name, value in layer.items():
                _set(tree, name, value)
        return RunConfig.parse(tree)

    @staticmethod
    def parse(tree: Any) -> RunConfig:
        """From a dictionary; raises `ConfigError` with one line per run, naming the first wrong field."""
        if not isinstance(tree, Mapping):
            raise ConfigError(f"configuration: expected an object with fields, got {tree!r}")
        try:
            return RunConfig.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(_one_line(error, RunConfig)) from None

    @staticmethod
    def load(path: str | Path) -> RunConfig:
        """From a JSON file."""
        try:
            return RunConfig.parse(json.loads(Path(path).read_text()))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such configuration file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a configuration file ({error})") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not JSON ({error})") from None


def _refuse(field: str, reason: str) -> NoReturn:
    raise ConfigError(f"{field}: {reason}")


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *path, leaf = name.split(".")
    node = tree
    for key in path:
        if key in node and node[key] is None:  # an absent section, e.g. method.line_search
            node[key] = {}
        if not isinstance(node.get(key), dict):
            raise ConfigError(f"{name}: no such field; {_near(name)}")
        node = node[key]
    node[leaf] = copy.deepcopy(value)  # the next change may go inside it, and it belongs to the caller


def _digest(tree: Any) -> str:
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _near(field: str, root: type[BaseModel] = RunConfig) -> str:
    """What may have been meant: fields of that name elsewhere or of a similar one, else those of its section."""
    names = _names(root)
    section, _, leaf = field.rpartition(".")
    same = [name for name in names if name.rpartition(".")[2] == leaf]
    if near := same or difflib.get_close_matches(field, names):
        return f"near: {', '.join(near)}"
    inside = [name for name in names if name.rpartition(".")[0] == section]
    top = dict.fromkeys(name.partition(".")[0] for name in names)
    return f"allowed: {', '.join(inside if section and inside else top)}"


def _names(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted fields."""
    found = []
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found += _names(inner[0], f"{prefix}{name}.") if inner else [prefix + name]
    return found


def _one_line(error: ValidationError, root: type[BaseModel]) -> str:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # ours: already names its field
        return str(cause)
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{field}: no such field; {_near(field, root)}"
    return f"{field}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})"
