"""Pictures of runs, as PNG files. The only importer of matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from lorakit.report import StageEnd

BLUE, ORANGE, INK, GRID = "#20639b", "#ed7d3a", "#1b2a41", "#d9dee5"


def stage_curve(ends: Sequence[StageEnd], start: int, out: Path) -> None:
    """Score against ranks kept, a point for each stage: what is remembered, and what is learnt.

    Both are shown as shares of what the first, dense stage reached, as in SoRA's Algorithm 1.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(6.4, 4.0), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    dense = ends[0]
    kept = [100 * end.ranks / start for end in ends]
    for name, values, whole, colour in (
        ("memorisation: training sample", [e.train for e in ends], dense.train, BLUE),
        ("generalisation: validation", [e.validation for e in ends], dense.validation, ORANGE),
    ):
        shares = [100 * value / whole if whole else 0.0 for value in values]
        axes.plot(kept, shares, "o-", color=colour, label=name, linewidth=1.8, markersize=5)
    axes.invert_xaxis()  # the run goes from dense to sparse
    axes.set_xlabel("ranks kept (%)", color=INK)
    axes.set_ylabel(f"{dense.metric} (% of the dense stage's)", color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(out)
