"""The loss of words is torch's cross-entropy in float32, with none of its copies."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.tasks import words
from lorakit.tasks.words import word_losses


def drawn(targets: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(targets, size, generator=draw)
    return logits.to(dtype).requires_grad_(), torch.randint(0, size, (targets,), generator=draw)


def known(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float(), targets, reduction="none")


@pytest.mark.parametrize("rows", [1, 3, 10, 11, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_cross_entropy(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(words.PIECE, "cpu", rows * 37)
    logits, targets = drawn(11, 37, dtype)
    share = torch.linspace(0, 1, 11)
    ours, theirs = word_losses(logits, targets), known(logits, targets)
    assert ours.dtype == torch.float32
    assert_close(ours, theirs)
    (of_ours,), (of_theirs,) = (torch.autograd.grad(x, logits, share) for x in (ours, theirs))
    assert of_ours.dtype == dtype
    assert torch.equal(logits, drawn(11, 37, dtype)[0])  # untouched
    assert_close(of_ours, of_theirs)
    assert_close(of_ours.float().sum(1), torch.zeros(11), rtol=0, atol=1e-6 + 37 * _step(dtype))


def _step(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def test_the_gradient_is_that_of_the_formula() -> None:
    def losses(logits: Tensor) -> Tensor:
        return word_losses(logits, torch.tensor([4, 0, 2]))

    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses(logits).sum().backward()
    for i in range(3):
        for j in range(5):
            moved = torch.zeros(3, 5)
            moved[i, j] = 1e-2
            with torch.no_grad():
                slope = (losses(logits + moved) - losses(logits - moved)).sum() / 2e-2
            assert logits.grad is not None
            assert_close(logits.grad[i, j], slope, rtol=0, atol=1e-3)


def test_logits_as_large_as_they_come_lose_nothing() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 0.0, 1e30]])
    losses = word_losses(logits, torch.tensor([1, 2]))
    assert losses.tolist() == [2e4, 0.0]


def test_a_batch_without_targets_has_no_losses() -> None:
    assert word_losses(torch.empty(0, 7), torch.empty(0, dtype=torch.long)).shape == (0,)


def test_nothing_in_float32_is_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(words.PIECE, "cpu", 8 * 64)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            found = func(*args, **kwargs or {})
            if isinstance(found, Tensor) and found.dtype == torch.float32:
                largest = max(largest, found.numel())
            return found

    logits, targets = drawn(100, 64, torch.bfloat16)
    with Sizes():
        word_losses(logits, targets).sum().backward()
    assert largest == 8 * 64
    with Sizes():
        known(logits, targets).sum().backward()
    assert largest == 100 * 64  # so this counts what it says
