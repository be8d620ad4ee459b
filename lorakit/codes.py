"""Numbers kept as integer codes: how they are rounded, and what a linear made of them computes.

    Q(x) = step round(x / step),   step = (high - low) / (2^b - 1),   b of 2, 4, 8, 16, 32

The range is [-bound, bound] where signed, else [0, bound]. A signed code lies within
+-(2^(b-1) - 1), so that b bits hold it: 2 bits are ternary. 32 bits are float32, clipped to the
range and not rounded.

    y = Q(W) x + b + s B (E * (A x)),    A (k, n), E (k,), B (m, k) as codes, * by element

A layer that learns codes evaluates by `coded_base`, `coded_update` and `gridded`, and so does one
that reads them from disk: on one machine the two agree bit for bit.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear, pad

from lorakit.errors import NotLowRankError

BITS = (2, 4, 8, 16, 32)
"""The widths there are."""
FLOAT = 32
"""The width at which numbers are float32 and nothing is rounded."""


def top(bits: int) -> int:
    """The largest signed code: 2^(b-1) - 1."""
    return (1 << bits - 1) - 1


class Coded(NamedTuple):
    """A tensor as codes on a signed grid."""

    codes: Tensor  # int16, each within +-top(bits); float32 at 32 bits
    step: Tensor  # (), float32; 1 at 32 bits
    bits: int

    def dense(self) -> Tensor:
        """step * codes, in float32; always new and contiguous, so that equal codes lie equally in
        memory, on which a matrix product's rounding may depend.
        """
        return (self.step * self.codes.float()).contiguous()


class Grid(NamedTuple):
    """A quantiser at evaluation: what is rounded to b bits within a range."""

    bound: Tensor  # (), float32, above 0
    bits: int
    signed: bool = True

    @property
    def low(self) -> Tensor:
        """The smallest value it lets through."""
        return -self.bound if self.signed else torch.zeros_like(self.bound)

    @property
    def step(self) -> Tensor:
        """(high - low) / (2^b - 1)."""
        return (self.bound - self.low) / ((1 << self.bits) - 1)

    def codes(self, x: Tensor) -> Tensor:
        """round(x / step) within the grid, as float32; below 32 bits only."""
        low, high = (-top(self.bits), top(self.bits)) if self.signed else (0, (1 << self.bits) - 1)
        return (x.float() / self.step).round().clamp(low, high)

    def coded(self, x: Tensor) -> Coded:
        """A float32 tensor as codes, detached; signed grids only."""
        assert self.signed
        with torch.no_grad():
            if self.bits == FLOAT:
                one = torch.ones_like(self.bound)
                return Coded(x.clamp(self.low, self.bound).contiguous(), one, FLOAT)
            return Coded(self.codes(x).short().contiguous(), self.step.clone(), self.bits)

    def __call__(self, x: Tensor) -> Tensor:
        """Q(x), computed in float32, in the precision of x."""
        if self.bits == FLOAT:
            return x.float().clamp(self.low, self.bound).to(x.dtype)
        return (self.step * self.codes(x)).to(x.dtype)


class Grids(NamedTuple):
    """Quantisers around a pair, in the order in which a forward pass meets them; null: none."""

    weight: Grid | None = None  # W
    base: Grid | None = None  # W x + b
    down: Grid | None = None  # A x
    inner: Grid | None = None  # E * (A x)
    up: Grid | None = None  # s B (E * (A x))
    total: Grid | None = None  # the sum

    def present(self) -> dict[str, Grid]:
        """Those there are, by name."""
        return {name: grid for name, grid in self._asdict().items() if grid is not None}


class CodedPair(NamedTuple):
    """What a layer is in evaluation: its update as codes, and the quantisers around it."""

    A: Coded  # (k, n)
    E: Coded | None  # (k,); None: all 1
    B: Coded  # (m, k)
    scale: float  # s
    grids: Grids = Grids()

    @property
    def rank(self) -> int:
        """k."""
        return self.A.codes.shape[0]

    @property
    def parameters(self) -> int:
        """Numbers stored: k (n + m), and k of E."""
        return sum(part.codes.numel() for part in self.parts().values())

    def parts(self) -> dict[str, Coded]:
        """A, E and B by name; no E where there is none."""
        parts = {"A": self.A, "E": self.E, "B": self.B}
        return {name: part for name, part in parts.items() if part is not None}

    def plain(self) -> tuple[Tensor, Tensor]:
        """A (k, n) and s B diag(E) (m, k), dequantised.

        Raises:
            NotLowRankError: base weight or activations are quantised too.

        """
        if self.grids.present():
            raise NotLowRankError(
                "the base weight or activations are quantised too, which no plain pair of matrices "
                "can do; `prune --packed` writes codes and quantisers as they are."
            )
        B = self.scale * self.B.dense()
        return self.A.dense(), B if self.E is None else B * self.E.dense()


def gridded(x: Tensor, grid: Grid | None) -> Tensor:
    """Q(x), or x where there is no quantiser."""
    return x if grid is None else grid(x)


def coded_update(x: Tensor, pair: CodedPair, y: Tensor) -> Tensor:
    """y + s B (E * (A x)), for x (rows, n) and y (rows, m), with the quantisers between.

    Factors are cast to the precision of x, as in any update. s goes into B, the smaller one, and so
    does E unless what it gives is quantised: the same products as the plain pair's, in their order.
    """
    grids, B = pair.grids, pair.scale * pair.B.dense()
    h = gridded(linear(x, pair.A.dense().to(x.dtype)), grids.down)
    if pair.E is not None and grids.inner is None:
        B = B * pair.E.dense()
    elif pair.E is not None:
        h = gridded(h * pair.E.dense().to(x.dtype), grids.inner)
    B = B.to(x.dtype)
    return torch.addmm(y, h, B.t()) if grids.up is None else y + grids.up(linear(h, B))


def coded_base(x: Tensor, base: nn.Module, grids: Grids) -> Tensor:
    """Q(W) x + b, quantised itself, for x (..., n) to (..., m). The bias is never quantised."""
    if grids.weight is None:
        y: Tensor = base(x)
    else:
        weight = base.weight
        assert isinstance(weight, Tensor)
        y = functional_call(base, {"weight": grids.weight(weight)}, (x,))
    return gridded(y, grids.base)


def pack(coded: Coded) -> Tensor:
    """The codes as uint8, (ceil(count b / 8),), in rows' order; at 32 bits the numbers as they are.

    A code c is stored as c + top(b), never negative: the first in the lowest bits of the first
    byte, 16 bits low byte first, the last byte filled up with zeros.
    """
    codes = coded.codes.detach().cpu().contiguous()
    if coded.bits == FLOAT:
        return codes
    numbers = codes.flatten().int() + top(coded.bits)
    if coded.bits >= 8:  # bytes to a code
        split = numbers[:, None] >> torch.arange(0, coded.bits, 8) & 255
        return split.flatten().to(torch.uint8)
    shifts = torch.arange(0, 8, coded.bits)  # codes to a byte
    filled = pad(numbers, (0, -len(numbers) % len(shifts)))
    return (filled.view(-1, len(shifts)) << shifts).sum(1).to(torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...], step: float, bits: int) -> Coded:
    """The inverse of `pack`.

    Raises:
        ValueError: a code is out of range, or the last byte is filled up with something else.

    """
    if bits == FLOAT:
        return Coded(packed, torch.tensor(step), bits)
    if bits >= 8:
        shifts = torch.arange(0, bits, 8)
        numbers = (packed.int().view(-1, len(shifts)) << shifts).sum(1)
    else:
        shifts = torch.arange(0, 8, bits)
        numbers = (packed.int()[:, None] >> shifts & 2**bits - 1).flatten()
    count = prod(shape)
    if numbers[count:].any():
        raise ValueError("the last byte is not filled up with zeros")
    codes = numbers[:count] - top(bits)
    if (codes > top(bits)).any():
        raise ValueError(f"a code above {top(bits)}, which {bits} bits do not have")
    return Coded(codes.view(shape).short(), torch.tensor(step), bits)
