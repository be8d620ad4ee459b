"""Tells and draws what scaling.py has measured.

    python scripts/scaling_report.py scaling.jsonl             tables, in Markdown
    python scripts/scaling_report.py scaling.jsonl --draw      and docs/images/scaling.svg

Of a point that was measured more than once, the last numbers count.
"""

import argparse
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from bench_train import spread
from roofline import Machine, Product

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "scaling.svg"
TITLES = {
    "length": "tokens of a text",
    "batch": "texts in a batch",
    "rank": "rank",
    "modules": "adapted linears (1: in the last block; in the first)",
}
"""Of the axes in the order of the picture; `rows` follows."""
PAPER, INK, FAINT = "#10141c", "#dee2e8", "#3a4252"
BLUE, ORANGE, GREEN = "#6cb2f5", "#f0a35e", "#8fd3a5"
"""The README's picture has the same paper and ink."""
LINE: dict[str, Any] = {"linewidth": 1.6, "markersize": 4}
LEGEND: dict[str, Any] = {"frameon": False, "handlelength": 1.8}
FONT = "DejaVu Sans"
STYLE = {
    "svg.fonttype": "none",  # text that can be read and searched
    "svg.hashsalt": "scaling",  # the same file for the same numbers
    "font.family": FONT,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": PAPER,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
}
Row = dict[str, Any]


def newest(path: Path) -> list[Row]:
    """Of every point the last row, in the order of the first, with what its products take."""
    rows: dict[tuple[Any, ...], Row] = {}
    best = Machine(0.0, 0.0)
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if row["axis"] == "machine":
            best = Machine(max(best.flops, row["flops"]), max(best.bytes, row["bytes"]))
        else:
            rows[row["axis"], row["value"], row.get("cached")] = row
    for row in rows.values():
        if "products" in row:
            products = [Product(*sizes) for sizes in row["products"]]
            row["gflop"] = sum(p.flops for p in products) / 1e9
            row["least_s"] = best.least(products, row["itemsize"])
    return list(rows.values())


def of(axis: str, measured: Sequence[Row]) -> list[Row]:
    """The rows of an axis."""
    return [row for row in measured if row["axis"] == axis]


def tables(measured: Sequence[Row]) -> str:
    """Of all axes there are, in Markdown."""
    parts = []
    for axis in dict.fromkeys(row["axis"] for row in measured):
        found = of(axis, measured)
        lines = _of_rows(found) if axis == "rows" else _of_steps(axis, found)
        head, *body = (f"| {' | '.join(line)} |" for line in lines)
        parts.append("\n".join([head, "| --- |" + " ---: |" * (len(lines[0]) - 1), *body]))
    return "\n\n".join(parts)


def _of_steps(axis: str, found: Sequence[Row]) -> list[list[str]]:
    lines = [[axis, "linears", "ms a step", "tokens/s", "GFLOP", "GFLOP/s", "of the least time"]]
    for row in found:
        second = median(row["seconds"])
        lines.append(
            [
                row["value"],
                str(row["modules"]),
                spread([1000 * s for s in row["seconds"]]),
                f"{row['tokens'] / second:,.0f}",
                f"{row['gflop']:.0f}",
                f"{row['gflop'] / second:.0f}",
                f"{second / row['least_s']:.1f} x",
            ]
        )
    return lines


def _of_rows(found: Sequence[Row]) -> list[list[str]]:
    lines = [["rows"]]
    for name in ("CPU seconds", "first step after s", "peak MB"):
        lines[0] += [name, "tokens reused"]
    for count in dict.fromkeys(row["value"] for row in found):
        both = [row for row in found if row["value"] == count]
        told = [f"{row[key]:,.0f}" for key in ("cpu_s", "first_step_s", "peak_mb") for row in both]
        lines.append([f"{count:,}", *told])
    return lines


def ratio(measured: Sequence[Row]) -> str:
    """What pruned SoRA takes of LoRA's time, round by round."""
    lora, sora = (row["seconds"] for row in of("pruned", measured))
    return spread([own / plain for own, plain in zip(sora, lora, strict=True)])


def draw(measured: Sequence[Row], out: Path) -> None:
    """Small multiples: a panel for each axis."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 5.8), facecolor=PAPER)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
        panels = list(figure.subplots(2, 3).flat)
        for axis, panel in zip(TITLES, panels, strict=False):
            _of_axis(panel, TITLES[axis], of(axis, measured))
            panel.set_ylim(20, 9000)  # the same in all
        runs = of("rows", measured)
        _of_runs(panels[4], "cpu_s", "CPU seconds of 20 steps' run", runs)
        _of_runs(panels[5], "peak_mb", "peak of memory (MB)", runs)
        for panel in panels[:4]:
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            panel.minorticks_off()
        panels[0].legend(**LEGEND, loc="upper left")
        panels[4].legend(**LEGEND, loc="upper left")
        svg = StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
    lines = (line.rstrip() for line in svg.getvalue().splitlines())
    text = "\n".join(lines).replace(f"'{FONT}'", f"'{FONT}', Verdana, sans-serif")
    out.write_text(f"{text}\n", encoding="utf-8")  # of like widths, where it is missing


def _of_axis(panel: Axes, title: str, found: Sequence[Row]) -> None:
    """Milliseconds of a step, and the least that its products would take."""
    names = [row["value"] if row["value"].isdigit() else str(row["modules"]) for row in found]
    at = range(len(found))
    ms = [[1000 * second for second in row["seconds"]] for row in found]
    low, middle, high = zip(*(quantiles(each, method="inclusive") for each in ms), strict=True)
    panel.fill_between(at, low, high, color=BLUE, alpha=0.3, linewidth=0)
    panel.plot(at, middle, "o-", color=BLUE, label="measured", **LINE)
    least = [1000 * row["least_s"] for row in found]
    panel.plot(at, least, "--", color=ORANGE, linewidth=1.4, label="least, by the roofline")
    panel.set_yscale("log")
    _dress(panel, title, "milliseconds a step", names)


def _of_runs(panel: Axes, key: str, unit: str, found: Sequence[Row]) -> None:
    """A number of whole runs, with an empty cache and with tokens reused."""
    for cached, colour, style, label in (
        (False, BLUE, "o-", "first run"),
        (True, GREEN, "o--", "tokens reused"),
    ):
        own = [row for row in found if row["cached"] == cached]
        panel.plot(
            range(len(own)), [row[key] for row in own], style, color=colour, label=label, **LINE
        )
    panel.set_ylim(0, 1.2 * max(row[key] for row in found))
    counts = dict.fromkeys(row["value"] for row in found)
    _dress(panel, "training rows", unit, [f"{n // 1000:,}k" for n in counts])


def _dress(panel: Axes, across: str, up: str, names: Sequence[str]) -> None:
    """A tick for each point, names, and no more."""
    panel.set_xticks(range(len(names)), names)
    panel.set_xlabel(across)
    panel.set_ylabel(up)
    panel.grid(axis="y")
    panel.tick_params(length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


def main() -> None:
    """Reads the file named on the command line; prints, and draws if told to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("measured", type=Path, help="as scaling.py writes it")
    parser.add_argument("--draw", action="store_true")
    given = parser.parse_args()
    measured = newest(given.measured)
    print(tables(measured))
    if of("pruned", measured):
        print(f"\nSoRA / LoRA: {ratio(measured)}")
    if given.draw:
        draw(measured, PICTURE)


if __name__ == "__main__":
    main()
