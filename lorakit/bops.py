"""Bit operations and storage of a linear with a coded update, against LoRA in float32.

A product of a b-bit and a c-bit number counts b c (van Baalen et al., Bayesian Bits, NeurIPS 2020).
For one token, with k the live rank, and 32 for whatever is not quantised:

    base      n m b_W b_x
    adapter   n k b_A b_x  +  k b_E b_Ax  +  k m b_B b_EAx

Shares are of what the same linear costs in float32: n m 32^2 for the base and (n + m) r 32^2 for
an adapter, LoRA at the start's rank. The paper's own accounting is not known; which of the two
sums a number counts decides what it says, so both are told, with the sum they are a share of.
"""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

from lorakit.codes import FLOAT, CodedPair, Grid


@dataclass(frozen=True)
class Bits:
    """Bit-widths of what meets in a forward pass: factors, and what they are multiplied with."""

    W: int = FLOAT
    A: int = FLOAT
    E: int = 0  # 0: there is none
    B: int = FLOAT
    x: int = FLOAT
    Ax: int = FLOAT
    EAx: int = FLOAT


@dataclass(frozen=True)
class Bill:
    """What a linear, or several, cost; BOPs a token, and bits on disk."""

    adapter: int
    adapter_float: int
    """Of LoRA at the start's rank in float32."""
    base: int
    base_float: int
    storage: int
    storage_float: int
    """Of LoRA at the start's rank in float32."""

    @property
    def share(self) -> float:
        """BOPs of the adapter alone, of LoRA's in float32."""
        return self.adapter / self.adapter_float

    @property
    def share_with_base(self) -> float:
        """BOPs of adapter and base, of LoRA's and the base's in float32."""
        return (self.adapter + self.base) / (self.adapter_float + self.base_float)


@dataclass(frozen=True)
class Costs:
    """What an adapter costs, by module and in all."""

    bits: dict[str, Bits]
    modules: dict[str, Bill]
    total: Bill


def costs(
    pairs: Mapping[str, CodedPair], widths: Mapping[str, tuple[int, int]], start: Mapping[str, int]
) -> Costs:
    """The costs of `pairs`, with `widths` (n, m) and the ranks at the `start` by name."""
    bits = {name: bits_of(pair) for name, pair in pairs.items()}
    modules = {
        name: bill(*widths[name], start[name], pair.rank, bits[name])
        for name, pair in pairs.items()
    }
    return Costs(bits, modules, total(modules.values()))


def bits_of(pair: CodedPair) -> Bits:
    """The widths in `pair`; the input of a linear is never quantised."""
    grids = pair.grids
    down = _bits(grids.down)
    return Bits(
        W=_bits(grids.weight),
        A=pair.A.bits,
        E=pair.E.bits if pair.E is not None else 0,
        B=pair.B.bits,
        Ax=down,
        EAx=down if pair.E is None else _bits(grids.inner),
    )


def bill(n: int, m: int, r: int, k: int, bits: Bits) -> Bill:
    """The costs of one linear, n to m, of rank r at the start and k live."""
    return Bill(
        adapter=n * k * bits.A * bits.x + k * bits.E * bits.Ax + k * m * bits.B * bits.EAx,
        adapter_float=(n + m) * r * FLOAT**2,
        base=n * m * bits.W * bits.x,
        base_float=n * m * FLOAT**2,
        storage=n * k * bits.A + k * bits.E + k * m * bits.B,
        storage_float=(n + m) * r * FLOAT,
    )


def total(bills: Iterable[Bill]) -> Bill:
    """Their sum."""
    return Bill(*(sum(column) for column in zip(*map(astuple, bills), strict=True)))


def _bits(grid: Grid | None) -> int:
    return FLOAT if grid is None else grid.bits
