"""Truncation: the best approximation at its rank, one budget over modules, and what it costs."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lorakit.adapter import Factors
from lorakit.errors import LorakitError
from lorakit.linalg import product_svd
from lorakit.prune import Pairs, Selection, cut, padded

SHAPES = {"square": (12, 12, 5), "tall": (30, 8, 6), "wide": (7, 40, 7), "thin": (9, 9, 1)}


@pytest.fixture
def pairs() -> Pairs:
    """(m, n, k) by name, of different sizes and strengths."""
    return {
        name: Factors(torch.randn(k, n), 3.0**i * torch.randn(m, k))
        for i, (name, (m, n, k)) in enumerate(SHAPES.items())
    }


def ranks(pairs: Pairs) -> dict[str, int]:
    return {name: pair.rank for name, pair in pairs.items()}


def product(pair: Factors) -> torch.Tensor:
    return pair.B.double() @ pair.A.double()


def spectrum(pair: Factors) -> torch.Tensor:
    return torch.linalg.svdvals(product(pair))[: pair.rank]


def test_the_svd_of_a_product_is_found_without_the_product(pairs: Pairs) -> None:
    for pair in pairs.values():
        U, S, Vh = product_svd(pair.A, pair.B)
        assert_close(U @ torch.diag(S) @ Vh, product(pair))
        assert_close(S, spectrum(pair))
        assert_close(U.T @ U, torch.eye(len(S), dtype=torch.float64))


def test_nothing_of_the_size_of_the_product_is_ever_made() -> None:
    """60,000 x 50,000 numbers would take 24 GB."""
    pair = Factors(torch.randn(4, 50_000), torch.randn(60_000, 4))
    assert cut({"big": pair}, Selection(rank=2), {"big": 4}).pairs["big"].rank == 2


def test_without_a_rule_pairs_stay_as_they_are(pairs: Pairs) -> None:
    result = cut(pairs, Selection(), ranks(pairs))
    assert result.pairs is pairs
    assert result.error == 0.0


def test_a_pair_cut_to_a_rank_is_the_best_of_that_rank(pairs: Pairs) -> None:
    """Eckart-Young: the truncated SVD of the full product."""
    result = cut(pairs, Selection(rank=3), ranks(pairs))
    for name, pair in pairs.items():
        U, S, Vh = torch.linalg.svd(product(pair), full_matrices=False)
        k = min(3, pair.rank)
        best = U[:, :k] @ torch.diag(S[:k]) @ Vh[:k]
        assert_close(product(result.pairs[name]), best, rtol=1e-4, atol=1e-4)
        assert result.pairs[name].rank == k


def test_new_factors_are_balanced(pairs: Pairs) -> None:
    """A' A'^T = B'^T B' = S, so that a cut adapter trains on well."""
    for pair in cut(pairs, Selection(rank=4), ranks(pairs)).pairs.values():
        assert_close(pair.A @ pair.A.T, pair.B.T @ pair.B, rtol=1e-4, atol=1e-4)


def test_keeping_everything_keeps_the_update(pairs: Pairs) -> None:
    for selection in (Selection(keep=1.0), Selection(energy=1.0), Selection(rank=99)):
        result = cut(pairs, selection, ranks(pairs))
        assert ranks(result.pairs) == ranks(pairs)
        assert result.error == pytest.approx(0, abs=1e-9)
        for name, pair in pairs.items():
            assert_close(product(result.pairs[name]), product(pair), rtol=1e-4, atol=1e-4)


def test_the_error_is_the_root_of_the_squares_dropped(pairs: Pairs) -> None:
    result = cut(pairs, Selection(keep=0.4), ranks(pairs))
    kept = ranks(result.pairs)
    dropped = sum(float(spectrum(p)[kept[n] :].square().sum()) for n, p in pairs.items())
    whole = sum(float(product(p).square().sum()) for p in pairs.values())
    assert result.error == pytest.approx((dropped / whole) ** 0.5)
    lost = sum(
        float((product(p) - product(result.pairs[n])).square().sum()) for n, p in pairs.items()
    )
    assert result.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


def test_energy_keeps_the_fewest_ranks_that_hold_its_share(pairs: Pairs) -> None:
    for share in (0.5, 0.9, 0.99):
        result = cut(pairs, Selection(energy=share), ranks(pairs))
        for name, pair in pairs.items():
            energy = spectrum(pair).square()
            k = result.pairs[name].rank
            assert energy[:k].sum() >= share * energy.sum()
            assert energy[: k - 1].sum() < share * energy.sum()


def test_keep_takes_the_largest_singular_values_of_all_modules_together(pairs: Pairs) -> None:
    result = cut(pairs, Selection(keep=0.5), ranks(pairs))
    kept = ranks(result.pairs)
    total = sum(ranks(pairs).values())
    assert sum(kept.values()) == total // 2
    inside = torch.cat([spectrum(p)[: kept[n]] for n, p in pairs.items()])
    outside = torch.cat([spectrum(p)[kept[n] :] for n, p in pairs.items()])
    assert inside.min() > outside.max()
    assert 0 in kept.values()  # the weak modules leave the adapter


def test_keep_counts_the_share_in_the_ranks_of_the_start(pairs: Pairs) -> None:
    """A run that has lost half of its ranks already loses nothing to --keep 0.5."""
    start = {name: 2 * rank for name, rank in ranks(pairs).items()}
    assert ranks(cut(pairs, Selection(keep=0.5), start).pairs) == ranks(pairs)


def test_a_budget_of_parameters_is_met_and_spent_on_energy_per_parameter(pairs: Pairs) -> None:
    cost = {name: m + n for name, (m, n, _) in SHAPES.items()}
    start = ranks(pairs)
    budget = 0.4 * sum(start[name] * cost[name] for name in pairs)
    result = cut(pairs, Selection(keep=0.4, of="parameters"), start)
    kept = ranks(result.pairs)
    assert sum(pair.parameters for pair in result.pairs.values()) <= budget
    worth = {n: spectrum(p).square() / cost[n] for n, p in pairs.items()}
    inside = torch.cat([worth[n][: kept[n]] for n in pairs])
    outside = torch.cat([worth[n][kept[n] :] for n in pairs])
    assert inside.min() > outside.max()


def one_value(m: int, n: int, sigma: float) -> Factors:
    """A pair of rank 1 with that singular value."""
    return Factors(torch.eye(1, n), sigma * torch.eye(m, 1))


def test_a_budget_of_parameters_by_hand() -> None:
    """Energy for a parameter is 25 / 50 in the large module and 4 / 10 in the small one."""
    pairs = {"small": one_value(4, 6, 2.0), "large": one_value(20, 30, 5.0)}

    def kept(keep: float) -> dict[str, int]:
        return ranks(cut(pairs, Selection(keep=keep, of="parameters"), ranks(pairs)).pairs)

    assert kept(50 / 60) == {"small": 0, "large": 1}
    assert kept(1.0) == {"small": 1, "large": 1}
    assert kept(49 / 60) == {"small": 0, "large": 0}  # the first that does not fit ends it


@pytest.mark.parametrize("of", ["ranks", "parameters"])
def test_what_a_small_budget_keeps_a_larger_one_keeps_too(pairs: Pairs, of: str) -> None:
    before = dict.fromkeys(pairs, 0)
    for keep in torch.linspace(0.05, 1, 39).tolist():
        kept = ranks(cut(pairs, Selection(keep=keep, of=of), ranks(pairs)).pairs)  # type: ignore[arg-type]
        assert all(kept[name] >= before[name] for name in pairs)
        before = kept


def test_the_order_of_modules_changes_nothing(pairs: Pairs) -> None:
    turned = dict(reversed(pairs.items()))
    one, other = (cut(p, Selection(keep=0.3), ranks(p)).pairs for p in (pairs, turned))
    assert ranks(one) == {name: ranks(other)[name] for name in one}


def test_dead_modules_stay_dead(pairs: Pairs) -> None:
    pairs["dead"] = Factors(torch.zeros(0, 5), torch.zeros(6, 0))
    pairs["null"] = Factors(torch.zeros(2, 5), torch.zeros(6, 2))
    start = {**ranks(pairs), "dead": 3}
    for selection in (Selection(keep=0.9), Selection(energy=0.9), Selection(rank=2)):
        assert cut(pairs, selection, start).pairs["dead"].rank == 0
    assert cut(pairs, Selection(energy=0.9), start).pairs["null"].rank == 0


def test_padding_gives_one_rank_and_the_same_update(pairs: Pairs) -> None:
    wide = padded(pairs)
    assert set(ranks(wide).values()) == {7}
    for name, pair in pairs.items():
        assert torch.equal(wide[name].B @ wide[name].A, pair.B @ pair.A) or torch.allclose(
            wide[name].B @ wide[name].A, pair.B @ pair.A, rtol=1e-6
        )


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        (Selection(rank=2, keep=0.5), "--rank and --keep exclude each other"),
        (Selection(rank=0), "--rank: 0"),
        (Selection(energy=0.0), "--energy: 0"),
        (Selection(keep=1.5), "--keep: 1.5"),
        (Selection(keep=0.5, of="modules"), "--of: 'modules'"),  # type: ignore[arg-type]
    ],
)
def test_rules_out_of_range_are_refused(pairs: Pairs, selection: Selection, says: str) -> None:
    with pytest.raises(LorakitError, match=says):
        cut(pairs, selection, ranks(pairs))


def test_a_pruned_run_answers_as_the_run_and_scores_the_same(recipe: Path, lorakit) -> None:
    """Run, checkpoint and pruned folder, in float32."""
    import json

    sora = ("adapter.variant=sora", "adapter.sparsity={xi: 0.05, gate_init: normal}")
    assert lorakit("train", recipe, *sora, "train.steps=12").code == 0
    pruned = json.loads(lorakit("prune", "runs/tiny", "--json").out)
    kept, start = sum(pruned["ranks"].values()), sum(pruned["start"].values())
    assert 0 < kept < start
    assert pruned["difference"] < 1e-5
    assert pruned["error"] == 0.0
    answers = [
        json.loads(lorakit("eval", path, "--json").out)["scores"]
        for path in ("runs/tiny", "runs/tiny/checkpoints/step-000012", "runs/tiny/pruned")
    ]
    assert answers[0] == answers[1]
    assert answers[0]["accuracy"] == answers[2]["accuracy"]
    assert answers[0]["loss"] == pytest.approx(answers[2]["loss"], abs=1e-5)
