"""Tables and numbers for a person: plain data in, text out; no torch.

Results go to standard output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lorakit.report import StageEnd

if TYPE_CHECKING:
    from lorakit.bops import Bill, Costs

HEAT = ("#1b2a41", "#173f5f", "#20639b", "#2a8ba8", "#3caea3", "#8fc27a", "#f6d55c")
"""From few ranks to many."""


def answer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each text and what was said of it; of probabilities, the largest."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in rows[0]:
        if name != "probabilities":
            number = name == "probability"
            table.add_column(name, overflow="fold", justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_said(value) for key, value in row.items() if key != "probabilities"))
    return table


def _said(value: Any) -> Text:
    if isinstance(value, list):
        return Text(", ".join(map(str, value)) or "none")
    return Text(f"{value:.3f}" if isinstance(value, float) else str(value))


def rank_table(start: Mapping[str, int], kept: Mapping[str, int]) -> Table:
    """Ranks by block and kind of module, `kept` of `start`, the cell's colour showing the share.

    Modules outside the blocks share a row, `rest`. Six kinds fit a terminal of 80 columns.
    """
    places = {name: _place(name) for name in start}
    inside = {name: place for name, place in places.items() if place is not None}
    rest = [name for name, place in places.items() if place is None]
    kinds = list(dict.fromkeys(kind for _, kind in inside.values()))
    table = Table(
        title="Ranks kept, of those at the start",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("block")
    for kind in kinds:
        table.add_column(kind.replace(".", "\n."), justify="center", vertical="bottom")
    table.add_column("all", justify="right", vertical="bottom")

    def names(block: str | None = None, kind: str | None = None) -> list[str]:
        chosen = inside.items()
        return [n for n, (b, k) in chosen if block in (None, b) and kind in (None, k)]

    for block in dict.fromkeys(block for block, _ in inside.values()):
        cells = [_cell(names(block, kind), start, kept) for kind in kinds]
        table.add_row(block, *cells, _total(names(block), start, kept))
    if rest:
        table.add_row("rest", *[""] * len(kinds), _total(rest, start, kept))
    table.add_section()
    totals = [_total(names(kind=kind), start, kept) for kind in kinds]
    table.add_row("all", *totals, _total(list(start), start, kept))
    return table


def stage_table(ends: Sequence[StageEnd], start: int) -> Table:
    """A line for each stage: ranks kept, and the score on what was seen and what was not."""
    table = Table(
        title="Score against ranks kept, stage by stage",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )
    metric, dense = ends[0].metric, ends[0]
    columns = ("stage", "step", "ranks", "kept", f"training {metric}", "of dense")
    for column in (*columns, f"validation {metric}", "of dense"):
        table.add_column(column, justify="right")
    for end in ends:
        table.add_row(
            str(end.stage),
            f"{end.step:,}",
            f"{end.ranks}/{start}",
            f"{end.ranks / start:.0%}",
            score(metric, end.train),
            f"{end.train / dense.train:.1%}" if dense.train else "",
            score(metric, end.validation),
            f"{end.validation / dense.validation:.1%}" if dense.validation else "",
        )
    return table


def cost_table(costs: Costs, ranks: Mapping[str, int]) -> Table:
    """A line for each module: rank, bits, storage, and bit operations as shares of float32's."""
    table = Table(
        title="Bits, storage, and bit operations as shares of LoRA's in float32",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    outer = any((b.W, b.Ax, b.EAx) != (32, 32, 32) for b in costs.bits.values())
    table.add_column("module", overflow="fold")
    columns = ("rank", "bits\nA/E/B", *(("bits\nW/Ax/EAx",) if outer else ()))
    for column in (*columns, "storage", "adapter", "and base"):
        table.add_column(column, justify="right", vertical="bottom")
    for name, bill in costs.modules.items():
        bits = costs.bits[name]
        widths = [f"{bits.A}/{bits.E or '-'}/{bits.B}"]
        widths += [f"{bits.W}/{bits.Ax}/{bits.EAx}"] if outer else []
        short = ".".join(_place(name) or (name,))
        table.add_row(short, str(ranks[name]), *widths, *_bill(bill))
    table.add_section()
    table.add_row("all", str(sum(ranks.values())), *[""] * (len(columns) - 1), *_bill(costs.total))
    return table


def measured_table(
    rows: Mapping[str, int],
    scores: Mapping[str, Mapping[str, float]],
    errors: Mapping[str, Mapping[str, float]],
) -> Table:
    """A line for each task and metric, with its standard error."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("task")
    table.add_column("rows", justify="right")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("±", justify="right")
    for task, values in scores.items():
        for i, (metric, value) in enumerate(values.items()):
            error = errors.get(task, {}).get(metric)
            of = (task, f"{rows[task]:,}" if task in rows else "") if i == 0 else ("", "")
            table.add_row(*of, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}")
    return table


def scored_table(rows: Sequence[tuple[str, str, int, Mapping[str, float]]]) -> Table:
    """A line for each task and split: how many rows it has, and its scores."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("task", "split", "rows", "scores"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for task, split, count, values in rows:
        table.add_row(task, split, f"{count:,}", scores(values))
    return table


def two_columns(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values, without lines."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def before_after(rows: Sequence[tuple[str, str, str]], title: str) -> Group:
    """Three columns below a line: what, before pruning, after."""
    table = Table("")
    table.add_column("before pruning", justify="right")
    table.add_column("after", justify="right")
    for row in rows:
        table.add_row(*row)
    return Group(Text(title, style="italic"), table)  # a table's own title breaks at its width


def ranks(start: Mapping[str, int], kept: Mapping[str, int]) -> tuple[str, str, str]:
    """A row of `before_after`: all ranks, at the start and kept."""
    have, had = sum(kept.values()), sum(start.values())
    return ("ranks", f"{had}", f"{have} ({have / had:.0%})")


def print_json(value: Any) -> None:
    """To standard output; what JSON has no word for, as text."""
    print(json.dumps(value, indent=2, default=str))


def size(count: float) -> str:
    """Bytes for people: 4.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError(count)


def score(name: str, value: float) -> str:
    """A metric: percent with two decimals, a loss with four."""
    return f"{value:.4f}" if name == "loss" else f"{value:.2f}"


def scores(named: Mapping[str, float]) -> str:
    """`accuracy 96.71  loss 0.1716`."""
    return "  ".join(f"{name} {score(name, value)}" for name, value in named.items())


def _place(name: str) -> tuple[str, str] | None:
    """(block, kind): `encoder.layer.3.output.dense` -> ("3", "output.dense"); None outside."""
    found = re.match(r"^(?:.*?\.)?(\d+)\.(.*)$", name)
    return (found[1], found[2]) if found else None


def _cell(names: Sequence[str], start: Mapping[str, int], kept: Mapping[str, int]) -> Text:
    if not names:
        return Text("")
    have, had = sum(kept[n] for n in names), sum(start[n] for n in names)
    share = min(1.0, have / had)  # a start that is subtracted takes ranks of its own
    colour = HEAT[round(share * (len(HEAT) - 1))]
    ink = "black" if share > 0.6 else "white"
    return Text(f" {have} ", style=f"{ink} on {colour}" if have else "dim")


def _total(names: Sequence[str], start: Mapping[str, int], kept: Mapping[str, int]) -> str:
    return f"{sum(kept[n] for n in names)}/{sum(start[n] for n in names)}"


def _bill(bill: Bill) -> tuple[str, str, str]:
    return size(bill.storage / 8), f"{bill.share:.1%}", f"{bill.share_with_base:.1%}"
