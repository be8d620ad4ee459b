"""From layers to plain pairs, and from pairs to smaller ones.

Exact: dead ranks leave. Lossy, on request: the truncated SVD of every pair's product, the best
approximation at its rank (Eckart-Young), with the rank chosen by a number, by energy, or by one
budget over all modules (PARA, arXiv:2604.27796). Knows no variant: `factors()` has answered.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from lorakit.adapter import Adapter, Factors
from lorakit.errors import LorakitError
from lorakit.linalg import ThinSVD, product_svd

Pairs = dict[str, Factors]
Unit = Literal["ranks", "parameters"]


class Selection(NamedTuple):
    """What to keep beyond what is exact; at most one of `rank`, `energy` and `keep`."""

    rank: int | None = None
    energy: float | None = None
    keep: float | None = None
    of: Unit = "ranks"

    @property
    def lossy(self) -> bool:
        """Whether anything but dead ranks may leave."""
        return (self.rank, self.energy, self.keep) != (None, None, None)


class Cut(NamedTuple):
    """Pairs after a selection, and what it cost."""

    pairs: Pairs
    error: float
    """Norm of what was dropped over norm of the whole update, over all modules (Frobenius)."""


def plain(layers: Mapping[str, Adapter]) -> Pairs:
    """The plain pair of every layer, those of rank 0 among them."""
    return {name: layer.factors() for name, layer in layers.items()}


def cut(pairs: Pairs, selection: Selection, start: Mapping[str, int]) -> Cut:
    """Applies a selection. `start` holds the ranks that a share of `keep` is counted in.

    Raises:
        LorakitError: more than one rule is given, or one out of its range.

    """
    check(selection)
    if not selection.lossy:
        return Cut(pairs, 0.0)
    spectra = {name: product_svd(pair.A, pair.B) for name, pair in pairs.items() if pair.rank}
    if selection.rank is not None:
        ranks = {name: min(selection.rank, len(svd.S)) for name, svd in spectra.items()}
    elif selection.energy is not None:
        ranks = {name: _by_energy(svd, selection.energy) for name, svd in spectra.items()}
    else:
        assert selection.keep is not None
        sizes = {name: pair.A.shape[1] + pair.B.shape[0] for name, pair in pairs.items()}
        costs = sizes if selection.of == "parameters" else dict.fromkeys(pairs, 1)
        budget = selection.keep * sum(start[name] * costs[name] for name in pairs)
        ranks = _by_budget(spectra, costs, budget)
    whole = sum(float(svd.S.square().sum()) for svd in spectra.values())
    lost = sum(float(svd.S[ranks[name] :].square().sum()) for name, svd in spectra.items())
    return Cut(
        {
            name: _truncated(spectra[name], ranks[name], pair) if name in spectra else pair
            for name, pair in pairs.items()
        },
        (lost / whole) ** 0.5 if whole else 0.0,
    )


def check(selection: Selection) -> None:
    """Raises LorakitError for rules out of range or in each other's way."""
    given = [n for n in ("rank", "energy", "keep") if getattr(selection, n) is not None]
    if len(given) > 1:
        raise LorakitError(f"--{given[0]} and --{given[1]} exclude each other; give one.")
    if selection.rank is not None and selection.rank < 1:
        raise LorakitError(f"--rank: {selection.rank}: expected at least 1.")
    for name in ("energy", "keep"):
        value = getattr(selection, name)
        if value is not None and not 0 < value <= 1:
            raise LorakitError(f"--{name}: {value:g}: expected a share above 0 and up to 1.")
    if selection.of not in ("ranks", "parameters"):
        raise LorakitError(f"--of: {selection.of!r}: expected ranks or parameters.")


def padded(pairs: Pairs) -> Pairs:
    """All pairs at the largest of their ranks, filled up with zeros: the same update, larger."""
    top = max(pair.rank for pair in pairs.values())
    return {
        name: Factors(
            torch.nn.functional.pad(pair.A, (0, 0, 0, top - pair.rank)),
            torch.nn.functional.pad(pair.B, (0, top - pair.rank)),
        )
        for name, pair in pairs.items()
    }


def _by_energy(svd: ThinSVD, share: float) -> int:
    """The smallest rank that keeps `share` of the sum of squared singular values."""
    energy = svd.S.square().cumsum(0)
    if not energy[-1]:
        return 0
    return int((energy < share * energy[-1]).sum()) + 1 if share < 1 else len(svd.S)


def _by_budget(
    spectra: Mapping[str, ThinSVD], costs: Mapping[str, int], budget: float
) -> dict[str, int]:
    """Ranks that keep the most energy per cost over all modules, until the first that won't fit.

    Stopping there, rather than looking for a smaller one that fits, lets the kept sets of growing
    budgets nest. Singular values fall, so each module's kept ones are its largest.
    """
    values = [
        (float(s) ** 2 / costs[name], name) for name, svd in spectra.items() for s in svd.S if s
    ]
    ranks, spent = dict.fromkeys(spectra, 0), 0
    for _, name in sorted(values, key=lambda value: (-value[0], value[1])):
        if spent + costs[name] > budget * (1 + 1e-12):
            break
        spent += costs[name]
        ranks[name] += 1
    return ranks


def _truncated(svd: ThinSVD, rank: int, like: Factors) -> Factors:
    """A' = S^(1/2) Vh, B' = U S^(1/2) of the leading `rank` terms: balanced, to train on well."""
    root = svd.S[:rank].sqrt()
    return Factors(
        (root[:, None] * svd.Vh[:rank]).to(like.A.dtype).contiguous(),
        (svd.U[:, :rank] * root).to(like.B.dtype).contiguous(),
    )
