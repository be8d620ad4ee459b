"""The ladder of bit-widths and its gates: closed forms, brute force, finite differences."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lorakit.codes import BITS, Grid, top
from lorakit.quantizer import (
    DEAD,
    SHIFT,
    THRESHOLD,
    bits_of,
    chain,
    is_open,
    ladder,
    on,
    sample,
    shares,
)

BETA = 0.7


def quantised(x: Tensor, z: Tensor, beta: float = BETA) -> Tensor:
    return ladder(x, torch.tensor(beta).log(), shares(z[None])[0])


def opened(bits: int) -> Tensor:
    """Gates open up to `bits`."""
    return torch.tensor([float(b <= bits) for b in BITS[1:]])


def residual_ladder(x: Tensor, z: Tensor, beta: float) -> Tensor:
    """The paper's own form, in float64: every rung rounds what those before it left over."""
    x = x.double().clamp(-beta * (1 - 1e-7), beta * (1 - 1e-7))
    total, weight = torch.zeros_like(x), 1.0
    got = torch.zeros_like(x)
    for bits, gate in zip(BITS, [1.0, *z.tolist()], strict=True):
        step = 2 * beta / (2**bits - 1)
        rung = step * ((x - got) / step).round()
        weight *= gate
        total, got = total + weight * rung, got + rung
    return total


def values(count: int = 4000) -> Tensor:
    """Within the range, and away from ties: those of 16 bits are those of every width below."""
    codes = torch.randint(-top(16), top(16) + 1, (count,)) + torch.empty(count).uniform_(-0.4, 0.4)
    return codes * 2 * BETA / (2**16 - 1)


# the ladder


@pytest.mark.parametrize("z", [opened(b) for b in BITS] + [torch.tensor([0.9, 0.4, 1.0, 0.2])])
def test_the_mean_of_widths_is_the_papers_ladder_of_residuals(z: Tensor) -> None:
    x = values()
    assert_close(quantised(x, z), residual_ladder(x, z, BETA).float(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("bits", BITS)
def test_with_hard_gates_it_is_the_uniform_quantiser_that_evaluation_uses(bits: int) -> None:
    x = 1.5 * values()
    assert_close(quantised(x, opened(bits)), Grid(torch.tensor(BETA), bits)(x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_half_a_step_at_most_and_a_second_time_nothing_changes(bits: int) -> None:
    x, step = torch.cat([values(), torch.tensor([BETA, -BETA, 0.0])]), 2 * BETA / (2**bits - 1)
    once = quantised(x, opened(bits))
    assert (once - x).abs().max() <= step / 2 + 1e-7
    assert_close(quantised(once, opened(bits)), once, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", BITS[:-1])
def test_no_code_leaves_its_width_however_large_the_number(bits: int) -> None:
    x = torch.cat([100 * values(), torch.tensor([BETA, -BETA])])
    codes = quantised(x, opened(bits)) * (2**bits - 1) / (2 * BETA)
    assert codes.abs().max().round() == top(bits) == 2 ** (bits - 1) - 1
    assert_close(codes, codes.round(), rtol=1e-6, atol=1e-6)


def test_two_bits_are_ternary_and_32_are_the_number_itself() -> None:
    x, step = values(), 2 * BETA / 3
    assert_close(quantised(x, opened(2)).unique(), torch.tensor([-step, 0.0, step]))
    assert torch.equal(quantised(x, opened(32)), x)


def test_the_largest_error_falls_with_every_width() -> None:
    x = values()
    errors = [float((quantised(x, opened(b)) - x).abs().max()) for b in BITS]
    assert errors == sorted(errors, reverse=True)


def test_behind_a_closed_gate_no_gate_matters() -> None:
    x = values()
    for rest in product((0.0, 0.3, 1.0), repeat=3):
        assert torch.equal(quantised(x, torch.tensor([0.0, *rest])), quantised(x, opened(2)))


def test_a_tensor_of_zeros_stays_one_and_has_finite_gradients() -> None:
    x, log_bound = torch.zeros(5, requires_grad=True), torch.tensor(-18.0, requires_grad=True)
    v = shares(torch.rand(1, 4))[0].requires_grad_()
    q = ladder(x, log_bound, v)
    q.sum().backward()
    assert not q.any()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, log_bound, v))


# its gradients


def test_numbers_within_the_range_have_gradient_1_and_those_beyond_it_none() -> None:
    x = torch.tensor([-2.0, -0.71, -0.69, 0.0, 0.3, 0.69, 0.71, 2.0], requires_grad=True)
    quantised(x, torch.tensor([1.0, 0.6, 0.3, 0.9])).sum().backward()
    assert_close(x.grad, torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0]))


@pytest.mark.parametrize("bits", BITS[:-1])
def test_the_step_s_has_gradient_q_minus_x_over_s(bits: int) -> None:
    """The ladder telescopes, so that no other rung is left in it."""
    for x in values(20):
        beta = torch.tensor(BETA, requires_grad=True)
        q = ladder(x[None], beta.log(), shares(opened(bits)[None])[0])
        q.sum().backward()
        step, ds_dbeta = 2 * BETA / (2**bits - 1), 2 / (2**bits - 1)
        assert_close(beta.grad, ((q.sum() - x) / step * ds_dbeta).detach())


def test_beyond_the_range_the_bound_has_the_sign_of_the_number() -> None:
    """Up to the half step that the largest code is below the bound."""
    for x, want in ((3.0, 1.0), (-3.0, -1.0)):
        beta = torch.tensor(BETA, requires_grad=True)
        ladder(torch.tensor([x]), beta.log(), shares(opened(16)[None])[0]).sum().backward()
        assert_close(beta.grad, torch.tensor(want), rtol=1e-4, atol=0)


def test_gates_have_the_gradients_of_finite_differences() -> None:
    """Q is a polynomial in its gates."""
    x, weight = values(50), torch.randn(50)
    z = torch.tensor([0.8, 0.5, 0.9, 0.3], requires_grad=True)
    (quantised(x, z) * weight).sum().backward()
    for i in range(4):
        ends = [
            (quantised(x, z.detach() + h * torch.eye(4)[i]) * weight).sum() for h in (-0.1, 0.1)
        ]
        assert_close(z.grad[i], (ends[1] - ends[0]) / 0.2, rtol=1e-3, atol=1e-5)


# gates


@pytest.mark.parametrize("phi", [-1.9, -0.5, 0.0, 2.0, 6.0])
def test_drawn_gates_are_on_off_and_between_as_often_as_the_closed_forms_say(phi: float) -> None:
    z = sample(torch.full((200_000,), phi))
    logit = torch.tensor(phi)
    assert (z > 0).float().mean() == pytest.approx(float(on(logit)), abs=5e-3)
    assert (z == 1).float().mean() == pytest.approx(float(torch.sigmoid(logit + SHIFT)), abs=5e-3)
    assert z.min() >= 0
    assert z.max() <= 1
    assert float(on(logit)) > float(torch.sigmoid(logit + SHIFT))  # so some are between


def test_the_table_of_the_closed_forms() -> None:
    """P(z > 0) and P(z = 1) as Bayesian Bits' own functions give them."""
    table = {-2.0: (0.401, 0.027), 0.0: (0.832, 0.168), 2.0: (0.973, 0.599), 6.0: (0.9995, 0.988)}
    for phi, (above, one) in table.items():
        logit = torch.tensor(phi)
        assert float(on(logit)) == pytest.approx(above, abs=6e-4)
        assert float(torch.sigmoid(logit + SHIFT)) == pytest.approx(one, abs=6e-4)


def test_a_gate_is_open_in_evaluation_where_it_is_0_in_fewer_than_34_of_100_draws() -> None:
    assert pytest.approx(-0.935303, abs=1e-6) == THRESHOLD
    assert 1 - float(on(torch.tensor(THRESHOLD))) == pytest.approx(0.34, abs=1e-6)
    phi = torch.tensor([THRESHOLD - 1e-4, THRESHOLD + 1e-4])
    assert is_open(phi).tolist() == [False, True]


def test_a_gate_below_minus_2_is_0_in_training_too_and_has_no_gradient() -> None:
    phi = torch.tensor([DEAD, DEAD - 5, DEAD + 0.01], requires_grad=True)
    drawn = torch.stack([sample(phi) for _ in range(500)])
    drawn.sum().backward()
    assert not drawn[:, :2].any()
    assert phi.grad[:2].tolist() == [0.0, 0.0]
    assert phi.grad[2] > 0


def test_sixteen_patterns_of_gates_are_five_widths() -> None:
    for pattern in product((False, True), repeat=4):
        rungs = 0
        while rungs < 4 and pattern[rungs]:
            rungs += 1
        phi = torch.where(torch.tensor([pattern]), 3.0, -3.0)
        assert bits_of(phi) == [2 ** (1 + rungs)]


def test_the_penalty_is_the_sum_of_products_from_0_to_4() -> None:
    assert_close(chain(torch.full((4,), 50.0)), torch.tensor(4.0))
    assert_close(chain(torch.full((4,), -50.0)), torch.tensor(0.0))
    phi = torch.randn(3, 4, requires_grad=True)
    p = on(phi.detach())
    brute = [sum(float(row[: b + 1].prod()) for b in range(4)) for row in p]
    assert_close(chain(phi), torch.tensor(brute))
    chain(phi).sum().backward()
    assert (phi.grad > 0).all()


def test_shares_are_a_distribution_over_the_widths() -> None:
    v = shares(torch.rand(7, 4))
    assert (v >= 0).all()
    assert_close(v.sum(dim=-1), torch.ones(7))
    for bits in BITS:
        assert shares(opened(bits)[None])[0].tolist() == [float(b == bits) for b in BITS]
