"""The head in chunks of tokens: the same numbers as in one piece, and never a [tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LENGTH, VOCABULARY, decoder_case, direction, normal
from oracles import assert_all_close, assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gnlib import head
from gnlib.linearise import DecoderLinearisation, Linearisation
from gnlib.losses import CrossEntropy
from gnlib.objective import GaussNewtonObjective, LinearisedObjective, ProxLinearObjective, forward_loss

OBJECTIVES: list[type[LinearisedObjective]] = [GaussNewtonObjective, ProxLinearObjective]
TOKENS = 2 * LENGTH


@pytest.mark.parametrize("rows", [1, 3, 4, TOKENS])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks_of_any_size_give_the_derivatives_of_the_reference(
    objective: type[LinearisedObjective], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole model, of its layers, and of the head alone, which leave out one part of the product each."""
    case = decoder_case()
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", rows * VOCABULARY)
    expand = objective(case.loss).expand
    anchor = case.anchor()
    blocks = [list(anchor), *case.model.layers()]  # type: ignore[operator]
    deltas = [direction({name: anchor[name] for name in block}, seed=i) for i, block in enumerate(blocks)]
    fast = DecoderLinearisation(case.model, case.inputs).derivatives(deltas, case.targets, expand)  # type: ignore[arg-type]
    slow = Linearisation(case.model, case.inputs).derivatives(deltas, case.targets, expand)
    assert_close(fast[0], slow[0])
    for (value, gradient), (expected_value, expected_gradient) in zip(fast[1], slow[1], strict=True):
        assert_close(value, expected_value)
        assert_all_close(gradient, expected_gradient)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("objective", [None, *OBJECTIVES])
def test_no_tensor_of_tokens_by_vocabulary_is_made(
    objective: type[LinearisedObjective] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 tokens and 512 words at width 8: chunked, nothing is larger than the chunk or the head's own weight."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 2**14)
    generator = torch.Generator().manual_seed(0)
    x, weight = normal((256, 8), generator), normal((512, 8), generator)
    targets = torch.randint(512, (256,), generator=generator)
    with torch.no_grad(), _Largest() as largest:
        if objective is None:
            head.mean_loss(x, weight, targets, CrossEntropy())
        else:
            change = head.Change(normal((256, 8), generator), normal((512, 8), generator))
            head.derivatives(x, weight, targets, [change], objective(CrossEntropy()).expand)
    assert largest.elements <= 2**14 < 256 * 512


def test_the_loss_in_chunks_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    case = decoder_case()
    whole = case.loss.value(case.model(case.inputs), case.targets)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    assert_close(forward_loss(case.loss)(case.model, case.inputs, case.targets), whole)


def test_chunks_cover_every_token_once_and_their_shares_add_up() -> None:
    for tokens in (1, 5, 64, 100):
        for vocabulary in (1, 2**27, 2**28, 2**29 + 1):
            chunks = list(head._chunks(tokens, vocabulary))
            assert [i for rows, _ in chunks for i in range(rows.start, rows.stop)] == list(range(tokens))
            assert sum(share for _, share in chunks) == pytest.approx(1.0, rel=1e-12)
