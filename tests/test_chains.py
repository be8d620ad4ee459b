"""Chains of gates on their way to a target: which close, when, and how they are led there."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit.chains import Closing, Tally, stacked
from lorakit.errors import RecipeError
from lorakit.quantizer import DEAD, THRESHOLD, is_open

START = 3.0


def chains(*lengths: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((length,), START)) for length in lengths]


def closing(
    logits: Sequence[nn.Parameter], left: float, steps: int = 100, window: tuple[int, int] = (1, 75)
) -> Closing:
    """Every gate counts 1, and so does what stands before each chain."""
    ones = stacked([torch.ones(len(p), dtype=torch.float64) for p in logits])

    def tally(fresh: bool = False) -> Tally:
        return Tally(ones, float(len(logits)), left)

    return Closing(logits, START, tally, "keep: some", steps, window)


def opened(logits: Sequence[Tensor]) -> list[list[bool]]:
    return [is_open(p.detach()).tolist() for p in logits]


def hear(way: Closing, *worth: Sequence[float]) -> None:
    """Gives every gate a gradient that makes it worth so much."""
    for p, own in zip(way.logits, worth, strict=True):
        p.grad = -torch.tensor(own)
    way.hear()


def test_worth_is_minus_the_sum_of_gradients_which_the_optimizer_never_sees() -> None:
    logits = chains(3, 2)
    way = closing(logits, 5.0)
    hear(way, [1.0, 2.0, 3.0], [4.0, 5.0])
    hear(way, [-0.5, 0.0, 0.25], [0.0, 1.0])
    assert_close(way.worth, torch.tensor([[0.5, 2.0, 3.25], [4.0, 6.0, 0.0]]))
    assert all(p.grad is None for p in logits)


def test_a_gradient_that_is_no_number_says_nothing_of_worth() -> None:
    """A run may leave such a step out and go on."""
    logits = chains(3, 2)
    way = closing(logits, 5.0)
    hear(way, [1.0, 2.0, 3.0], [4.0, 5.0])
    hear(way, [float("nan"), float("inf"), 1.0], [-float("inf")] * 2)
    assert_close(way.worth, torch.tensor([[1.0, 2.0, 4.0], [4.0, 5.0, 0.0]]))
    assert all(p.grad is None for p in logits)


def test_the_gates_worth_least_close_and_chains_close_from_their_ends() -> None:
    logits = chains(3, 3, 3)
    way = closing(logits, 3.0 + 5.0)
    hear(way, [9.0, 8.0, 1.0], [7.0, 0.5, 6.0], [2.0, 3.0, -1.0])
    for step in range(1, 101):
        way.close(step)
    # 6 protects the 0.5 before it, and 3 the 2; so -1, 1, 2 and 3 go
    assert opened(logits) == [[True, True, False], [True, True, True], [False, False, False]]
    assert way.met


def test_of_gates_worth_the_same_those_at_the_ends_close_first() -> None:
    logits, after = chains(4), []
    way = closing(logits, 1.0)
    for step in range(1, 76):
        way.close(step)
        after.append(opened(logits)[0])
    assert all(own == sorted(own, reverse=True) for own in after)
    assert after[-1] == [False] * 4


def test_a_gate_is_led_to_the_threshold_evenly_and_then_shut_for_good() -> None:
    logits, path = chains(1), []
    way = closing(logits, 1.0, window=(1, 75))
    for step in range(1, 101):
        way.close(step)
        path.append(float(logits[0].detach()))
    at = 75  # the only one to close does so at the last step
    assert path[: at - 10] == pytest.approx([START] * (at - 10))
    even = [THRESHOLD + (START - THRESHOLD) * d / 10 for d in range(9, 0, -1)]
    assert path[at - 10 : at - 1] == pytest.approx(even, abs=1e-5)
    assert path[at - 1 :] == [DEAD] * (101 - at)


@pytest.mark.parametrize("left", [8.0, 20.0, 61.0, 68.0])
@pytest.mark.parametrize("steps", [60, 101, 200])
def test_whatever_gates_are_worth_meanwhile_the_target_is_met_in_time(
    steps: int, left: float
) -> None:
    """The worst case: nothing that a step decides helps the next."""
    logits = chains(7, 7, 15, 15, 15, 1, 0, 0)
    way, last, most = closing(logits, left, steps, (1, steps)), 3 * steps // 4, 0
    before = 60
    for step in range(1, steps + 1):
        hear(way, *[torch.randn(len(p)).tolist() for p in logits])
        way.close(step)
        now = sum(map(sum, opened(logits)))
        most, before = max(most, before - now), now
        assert step >= steps // 4 + 1 or now == 60
        assert step < last or now == left - 8
        assert way.met == (step >= last)
    assert most <= 60 // 20
    assert all(own == sorted(own, reverse=True) for own in opened(logits))


def test_what_is_counted_may_shrink_on_the_way() -> None:
    """As ranks do whose E rounds to 0: then fewer gates close."""
    logits, gone = chains(9), 0.0

    def tally(fresh: bool = False) -> Tally:
        own = torch.ones(9, dtype=torch.float64)
        own[:3] -= gone
        return Tally(own[None], 1.0, 5.0)

    way = Closing(logits, START, tally, "keep: half", 100, (1, 75))
    for step in range(1, 101):
        gone = float(step > 30)
        way.close(step)
    assert opened(logits) == [[True] * 7 + [False] * 2]


def test_no_gate_closes_outside_of_its_window() -> None:
    logits = chains(10)
    way = closing(logits, 1.0, window=(41, 50))
    for step in range(1, 101):
        way.close(step)
        assert sum(opened(logits)[0]) == 10 - min(max(step - 40, 0), 10)


def test_a_window_too_short_for_one_gate_a_step_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"keep: some: takes 10 steps, .* step 50 there are 9"):
        closing(chains(10), 1.0, window=(42, 50))


def test_to_leave_less_than_has_gates_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"keep: some: the first rank .* are 0\.25 of all"):
        closing(chains(3, 3), 1.9)
    closing(chains(3, 3), 2.0)


def test_chains_without_gates_have_met_a_target_of_all() -> None:
    way = closing(chains(0, 0), 2.0)
    way.hear()
    for step in range(1, 76):
        way.close(step)
    assert way.met


def test_a_restored_one_goes_on_as_if_it_had_never_stopped() -> None:
    ends = []
    for stop in (None, 50):
        torch.manual_seed(0)
        logits = chains(7, 15, 3)
        way = closing(logits, 12.0)
        for step in range(1, 101):
            hear(way, *[torch.randn(len(p)).tolist() for p in logits])
            way.close(step)
            if step == stop:
                state = way.state_dict()
                way = closing(logits, 12.0)
                way.load_state_dict(state)
        ends.append((opened(logits), way.worth, way.met))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2]
    assert ends[1][2]
