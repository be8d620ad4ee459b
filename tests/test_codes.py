"""Codes: their grid, how they are stored, what a linear of them computes, and what it costs."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lorakit import bops
from lorakit.bops import Bits, bill, bits_of, total
from lorakit.codes import (
    BITS,
    Coded,
    CodedPair,
    Grid,
    Grids,
    coded_base,
    coded_update,
    pack,
    top,
    unpack,
)
from lorakit.errors import NotLowRankError

INTEGER = [b for b in BITS if b < 32]
ONE, NONE = torch.tensor(1.0), Grids()


def bound(value: float) -> torch.Tensor:
    return torch.tensor(value)


def drawn(shape: tuple[int, ...], bits: int) -> Coded:
    """Codes over the whole range of their bits, both ends among them."""
    if bits == 32:
        return Coded(torch.randn(shape), ONE, 32)
    codes = torch.randint(-top(bits), top(bits) + 1, shape, dtype=torch.int16)
    if codes.numel() > 1:
        codes.view(-1)[0], codes.view(-1)[-1] = -top(bits), top(bits)
    return Coded(codes, torch.tensor(0.037), bits)


def pair(
    n: int = 7,
    m: int = 5,
    k: int = 3,
    bits: tuple[int, int, int] = (4, 8, 2),
    grids: Grids = NONE,
) -> CodedPair:
    A, E, B = drawn((k, n), bits[0]), drawn((k,), bits[1]), drawn((m, k), bits[2])
    return CodedPair(A, E, B, 0.7, grids)


@pytest.mark.parametrize("bits", INTEGER)
@pytest.mark.parametrize("signed", [True, False])
def test_a_grid_rounds_to_the_nearest_of_its_levels(bits: int, signed: bool) -> None:
    grid = Grid(bound(2.0), bits, signed)
    x = torch.linspace(-2 if signed else 0, 2, 1001)
    step = (4 if signed else 2) / (2**bits - 1)
    assert float(grid.step) == pytest.approx(step)
    assert (grid(x) - x).abs().max() <= step / 2 * (1 + 1e-3)
    assert_close(grid(grid(x)), grid(x), rtol=0, atol=0)


@pytest.mark.parametrize("bits", INTEGER)
def test_levels_number_one_less_than_the_bits_could_name_where_signed(bits: int) -> None:
    """Symmetric around 0; 2 bits are ternary."""
    x = torch.linspace(-3, 3, 400_001)
    assert len(Grid(bound(2.0), bits)(x).unique()) == 2**bits - 1
    assert Grid(bound(2.0), bits).codes(x).abs().max() == 2 ** (bits - 1) - 1
    assert Grid(bound(2.0), bits, signed=False).codes(x).aminmax() == (0, 2**bits - 1)


def test_32_bits_clip_and_do_not_round() -> None:
    x = torch.randn(100)
    assert torch.equal(Grid(bound(1.0), 32)(x), x.clamp(-1, 1))
    assert torch.equal(Grid(bound(1.0), 32, signed=False)(x), x.clamp(0, 1))


@pytest.mark.parametrize("bits", BITS)
def test_a_tensor_as_codes_is_the_tensor_on_its_grid(bits: int) -> None:
    grid, x = Grid(bound(1.5), bits), torch.randn(6, 7)
    coded = grid.coded(x)
    assert torch.equal(coded.dense(), grid(x))
    assert coded.codes.dtype == (torch.float32 if bits == 32 else torch.int16)
    assert coded.bits == bits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1,), (3,), (4, 5), (7, 9), (0, 4), (4, 0)])
def test_packing_is_undone_by_unpacking(bits: int, shape: tuple[int, ...]) -> None:
    coded = drawn(shape, bits)
    packed = pack(coded)
    again = unpack(packed, shape, float(coded.step), bits)
    assert torch.equal(again.codes, coded.codes)
    assert torch.equal(again.dense(), coded.dense())
    assert again.codes.dtype == coded.codes.dtype


@pytest.mark.parametrize("bits", INTEGER)
@pytest.mark.parametrize("count", [1, 4, 5, 63, 64])
def test_b_bits_take_b_bits_a_number_and_less_than_a_byte_to_fill_up(bits: int, count: int) -> None:
    packed = pack(drawn((count,), bits))
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count * bits // 8)


def test_the_order_of_bits_is_the_one_that_is_written_down() -> None:
    """-1, 0, 1, 1 at 2 bits are 0, 1, 2, 2 from the lowest bits up; 16 bits go low byte first."""
    two = Coded(torch.tensor([-1, 0, 1, 1], dtype=torch.int16), ONE, 2)
    assert pack(two).tolist() == [0b10_10_01_00]
    sixteen = Coded(torch.tensor([0x0102 - top(16)], dtype=torch.int16), ONE, 16)
    assert pack(sixteen).tolist() == [0x02, 0x01]


@pytest.mark.parametrize("bits", INTEGER)
def test_the_one_pattern_that_is_no_code_is_refused(bits: int) -> None:
    everything = torch.full((2,), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"a code above {top(bits)}, which {bits} bits"):
        unpack(everything, (16 // bits,), 1.0, bits)


@pytest.mark.parametrize("bits", [2, 4])
def test_filling_that_is_not_zero_is_refused(bits: int) -> None:
    packed = pack(drawn((8 // bits + 1,), bits))
    packed[-1] |= 1 << 7
    with pytest.raises(ValueError, match="not filled up with zeros"):
        unpack(packed, (8 // bits + 1,), 1.0, bits)


def added(x: Tensor, pair: CodedPair) -> Tensor:
    """What the pair adds, for x (rows, n) to (rows, m)."""
    return coded_update(x, pair, x.new_zeros(len(x), pair.B.codes.shape[0]))


@pytest.mark.parametrize("bits", BITS)
def test_the_update_is_the_product_of_the_dequantised_factors(bits: int) -> None:
    coded, x = pair(bits=(bits, bits, bits)), torch.randn(4, 7)
    E = coded.E
    assert E is not None
    by_hand = 0.7 * ((x @ coded.A.dense().T) * E.dense()) @ coded.B.dense().T
    assert_close(added(x, coded), by_hand)
    A, B = coded.plain()
    assert_close(x @ A.T @ B.T, by_hand)


def test_without_e_all_its_numbers_are_one() -> None:
    coded, x = pair(), torch.randn(4, 7)
    ones = coded._replace(E=Coded(torch.ones(3), ONE, 32))
    assert torch.equal(added(x, coded._replace(E=None)), added(x, ones))
    assert torch.equal(coded._replace(E=None).plain()[1], ones.plain()[1])


def test_no_rank_is_no_update() -> None:
    assert torch.equal(added(torch.randn(4, 7), pair(k=0)), torch.zeros(4, 5))


def test_layout_in_memory_does_not_reach_the_result() -> None:
    """Codes cut out of a larger tensor and codes fresh from disk give equal bits."""
    whole, x = pair(n=64, m=48, k=8), torch.randn(32, 64)
    assert whole.E is not None
    cut = whole._replace(
        A=whole.A._replace(codes=whole.A.codes[:5]),
        E=whole.E._replace(codes=whole.E.codes[:5]),
        B=whole.B._replace(codes=whole.B.codes[:, :5]),
    )
    parts = {
        name: unpack(pack(p), tuple(p.codes.shape), float(p.step), p.bits)
        for name, p in cut.parts().items()
    }
    fresh = CodedPair(parts["A"], parts["E"], parts["B"], cut.scale)
    assert torch.equal(added(x, cut), added(x, fresh))


@pytest.mark.parametrize("name", ["down", "inner", "up"])
def test_each_quantiser_of_the_update_rounds_where_it_stands(name: str) -> None:
    grid, x = Grid(bound(0.5), 4), torch.randn(4, 7)
    coded = pair()
    E = coded.E
    assert E is not None
    down = linear(x, coded.A.dense())
    down = grid(down) if name == "down" else down
    inner = down * E.dense()
    inner = grid(inner) if name == "inner" else inner
    up = linear(inner, coded.scale * coded.B.dense())
    up = grid(up) if name == "up" else up
    assert torch.equal(added(x, coded._replace(grids=Grids(**{name: grid}))), up)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_base_weight_is_rounded_and_its_bias_is_not(kind: str) -> None:
    base = nn.Linear(7, 5) if kind == "linear" else Conv1D(5, 7)
    nn.init.normal_(base.bias)
    grid, x = Grid(bound(0.3), 2), torch.randn(4, 7)
    before = base.weight.clone()
    W = grid(base.weight)
    by_hand = x @ (W.T if kind == "linear" else W) + base.bias
    assert_close(coded_base(x, base, Grids(weight=grid)), by_hand)
    assert torch.equal(base.weight, before)
    assert torch.equal(coded_base(x, base, Grids()), base(x))
    assert torch.equal(coded_base(x, base, Grids(base=grid)), grid(base(x)))


def test_a_bfloat16_input_gets_a_bfloat16_answer() -> None:
    x = torch.randn(4, 7, dtype=torch.bfloat16)
    grids = Grids(*[Grid(bound(1.0), bits) for bits in (2, 4, 8, 16, 32, 4)])
    assert added(x, pair(grids=grids)).dtype == torch.bfloat16
    base = nn.Linear(7, 5, dtype=torch.bfloat16)
    assert coded_base(x, base, grids).dtype == torch.bfloat16


@pytest.mark.parametrize("name", Grids._fields)
def test_no_plain_pair_is_made_of_a_layer_whose_other_numbers_are_quantised(name: str) -> None:
    with pytest.raises(NotLowRankError, match="prune --packed"):
        pair(grids=Grids(**{name: Grid(ONE, 8)})).plain()


def test_bit_operations_of_a_layer_of_2_by_3_by_hand() -> None:
    """A 2 x 1, then E, then B 1 x 3: 2*4*32 + 8*16 + 3*2*8; base 6 weights of 8 bits by 32."""
    costs = bill(n=2, m=3, r=2, k=1, bits=Bits(W=8, A=4, E=8, B=2, Ax=16, EAx=8))
    assert costs.adapter == 256 + 128 + 48
    assert costs.adapter_float == (2 + 3) * 2 * 1024
    assert (costs.base, costs.base_float) == (6 * 8 * 32, 6 * 1024)
    assert costs.storage == 2 * 4 + 8 + 3 * 2
    assert costs.storage_float == 5 * 2 * 32
    assert costs.share == 432 / 10240
    assert costs.share_with_base == (432 + 1536) / (10240 + 6144)


@pytest.mark.parametrize(("width", "share"), [(32, 1.0), (8, 0.0625), (4, 0.015625)])
def test_a_full_rank_pair_costs_the_square_of_its_bits_over_32(width: int, share: float) -> None:
    bits = Bits(W=width, A=width, B=width, x=width, Ax=width, EAx=width)
    costs = bill(n=12, m=20, r=4, k=4, bits=bits)
    assert costs.share == costs.share_with_base == share
    assert costs.storage / costs.storage_float == width / 32


def test_e_costs_one_product_a_rank_more_than_lora() -> None:
    assert bill(12, 20, 4, 4, Bits(E=32)).adapter - bill(12, 20, 4, 4, Bits()).adapter == 4 * 1024


def test_costs_grow_with_bits_and_with_ranks() -> None:
    for name in ("A", "E", "B"):
        rising = [bill(9, 8, 4, 3, Bits(**({"E": 2} | {name: b}))) for b in BITS]
        assert all(a.adapter < b.adapter for a, b in itertools.pairwise(rising))
        assert all(a.storage < b.storage for a, b in itertools.pairwise(rising))
    rising = [bill(9, 8, 4, k, Bits(E=2)) for k in range(5)]
    assert all(a.adapter < b.adapter for a, b in itertools.pairwise(rising))
    assert rising[0].adapter == 0


def test_widths_are_read_off_the_codes_and_their_quantisers() -> None:
    assert bits_of(pair()) == Bits(A=4, E=8, B=2)
    grids = Grids(weight=Grid(ONE, 8), down=Grid(ONE, 16), inner=Grid(ONE, 4))
    assert bits_of(pair(grids=grids)) == Bits(W=8, A=4, E=8, B=2, Ax=16, EAx=4)
    only_down = pair(grids=Grids(down=Grid(ONE, 16)))
    assert bits_of(only_down).EAx == 32  # the product with E is rounded nowhere
    assert bits_of(only_down._replace(E=None)).EAx == 16


def test_the_costs_of_all_modules_are_the_sum_over_them() -> None:
    pairs = {"one": pair(), "two": pair(n=4, m=9, k=2)}
    costs = bops.costs(pairs, {"one": (7, 5), "two": (4, 9)}, {"one": 4, "two": 4})
    assert costs.total == total(costs.modules.values())
    assert costs.total.adapter == sum(c.adapter for c in costs.modules.values())
    assert costs.modules["one"] == bill(7, 5, 4, 3, Bits(A=4, E=8, B=2))
    stored = sum(p.codes.numel() * p.bits for one in pairs.values() for p in one.parts().values())
    assert costs.total.storage == stored
