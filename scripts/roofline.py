"""What a training step of a BERT classifier has to compute and to move, and what a machine can.

A step is counted as its matrix products, by formula. For T = batch x length tokens, a linear from
n to m numbers, adapted at rank r, has

    forward     W x          2 T n m             A x, B (A x)                     2 T r (n + m)
    backward    W^T dy       2 T n m             gradients of A, B, and of A x    2 T r (n + 2 m)
                                                 A^T (B^T dy)                     2 T r n

floating-point operations. A frozen weight has no gradient, and W^T dy and A^T (B^T dy) fall away
where no adapter lies beneath. Attention has two products of 2 T length d, and backward one for each
operand that an adapter lies beneath: four at most. Of the last block, what follows attention is
computed for the first token of each row alone, as lorakit does and Trainer does not.

A product takes at least the time that its operations take at the machine's peak, and that its
operands and result take through memory (roofline model: Williams, Waterman and Patterson 2009); the
least time of a step is their sum. Norms, GELU, softmax, dropout, sums and the optimizer are not in
it, nor is what caches spare: it is a yardstick, not a bound that nothing could go below.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch

Module = tuple[int, str]
"""Number of the block, and the linear's name within it; the pooler is in none, which is -1."""
POOLER: Module = (-1, "pooler.dense")


class Product(NamedTuple):
    """(m, k) by (k, n), `count` of them."""

    count: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.count * self.m * self.k * self.n

    @property
    def numbers(self) -> int:
        """Read and written, each once."""
        return self.count * (self.m * self.k + self.k * self.n + self.m * self.n)


class Machine(NamedTuple):
    """What it reaches at best."""

    flops: float
    """In a second, in products."""
    bytes: float
    """In a second, to and from memory."""

    def least(self, products: Iterable[Product], bytes_each: int) -> float:
        """Seconds that these take, at least, in numbers of so many bytes."""
        return sum(max(p.flops / self.flops, p.numbers * bytes_each / self.bytes) for p in products)


@dataclass(frozen=True)
class Encoder:
    """The sizes of a BERT with a classifier, all of whose rows are of one length."""

    blocks: int
    width: int
    inner: int
    heads: int
    labels: int

    @classmethod
    def of(cls, config: Any) -> "Encoder":
        """Those of a model's configuration."""
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_labels,
        )

    def step(self, batch: int, length: int, rank: int, adapted: Iterable[Module]) -> list[Product]:
        """The products of one step, those of equal sizes as one."""
        met = Counter[tuple[int, int, int]]()
        for count, *sizes in _Step(self, batch, length, rank, frozenset(adapted)).products:
            met[*sizes] += count
        return [Product(count, *sizes) for sizes, count in met.items()]


def module_of(name: str) -> Module:
    """The linear of that dotted name, as transformers has it in BERT."""
    if name.endswith(POOLER[1]):
        return POOLER
    found = re.search(r"layer\.(\d+)\.(?:attention\.self\.)?(.+)$", name)
    assert found, f"{name}: no linear of BERT's encoder"
    return int(found[1]), found[2]


class _Step:
    """Follows a step through the model; `products` is what it has met."""

    def __init__(
        self, model: Encoder, batch: int, length: int, rank: int, adapted: frozenset[Module]
    ) -> None:
        self.rank, self.adapted = rank, adapted
        self.products: list[Product] = []
        tokens, width, inner = batch * length, model.width, model.inner
        flows = False  # whether what goes on depends on an adapter
        for block in range(model.blocks):
            last = block == model.blocks - 1
            q, k, v = (
                self._linear((block, name), width, width, tokens, flows)
                for name in ("query", "key", "value")
            )
            each = model.heads * batch, length, width // model.heads
            scores = self._attend(each, q, k)
            mixed = self._attend((each[0], length, length), scores, v, out=each[2])
            out = self._linear((block, "attention.output.dense"), width, width, tokens, mixed)
            flows, rows = flows or out, batch if last else tokens
            up = self._linear((block, "intermediate.dense"), width, inner, rows, flows)
            down = self._linear((block, "output.dense"), inner, width, rows, up)
            flows = flows or down
        flows = self._linear(POOLER, width, width, batch, flows)
        self._classify(batch, width, model.labels, flows)

    def _linear(self, module: Module, n: int, m: int, tokens: int, flows: bool) -> bool:
        """Notes a linear; whether its output depends on an adapter."""
        r = self.rank
        self._note((tokens, n, m), flows and (tokens, m, n))
        if module in self.adapted:
            self._note((tokens, n, r), (tokens, r, m))
            self._note((tokens, m, r), (m, tokens, r), (r, tokens, n), flows and (tokens, r, n))
        return flows or module in self.adapted

    def _attend(
        self, sizes: tuple[int, int, int], left: bool, right: bool, out: int | None = None
    ) -> bool:
        """Notes one of attention's products, whose backward ones are of the same size."""
        count, m, k = sizes
        for _ in range(1 + left + right):
            self.products.append(Product(count, m, k, out or m))
        return left or right

    def _classify(self, rows: int, width: int, labels: int, flows: bool) -> None:
        """Notes the head, which is trained whole."""
        self._note((rows, width, labels), (labels, rows, width), flows and (rows, labels, width))

    def _note(self, *sizes: "tuple[int, int, int] | bool") -> None:
        self.products += [Product(1, *size) for size in sizes if not isinstance(size, bool)]


def machine(shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype) -> Machine:
    """Measures this one: products of such shapes, the best of them, and a copy beyond any cache."""
    rates = []
    for m, k, n in shapes:
        left, right = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        rates.append(2 * m * k * n / _seconds(lambda a=left, b=right: a @ b))  # type: ignore[misc]
    source = torch.ones(2**29, dtype=torch.uint8)
    copied = torch.empty_like(source)
    moved = 2 * source.nbytes / _seconds(lambda: copied.copy_(source), 10)
    return Machine(max(rates), moved)


def _seconds(work: Callable[[], Any], times: int = 200) -> float:
    """Of one call, the fewest: what others on the machine take is not its own."""
    found = []
    for _ in range(times):
        start = perf_counter()
        work()
        found.append(perf_counter() - start)
    return min(found)
