"""A finished adapter opened for a command; what there is to be said of it is said aloud."""

from pathlib import Path
from typing import NamedTuple

from lorakit import run_folder
from lorakit.models import Precision
from lorakit.progress import Watch
from lorakit.trained import Trained, open_trained

RUNS = Path("runs")
"""Where the newest run is looked for."""


class Source(NamedTuple):
    """Where an adapter stands, and over which base."""

    path: Path | None
    """Null: the newest run."""
    which: str | None = None
    """Of a run's checkpoints."""
    base: str | None = None
    force: bool = False
    """Over a base of other weights, too."""


def opened(source: Source, watch: Watch, precision: Precision = "fp32") -> Trained:
    """The adapter in its base.

    Raises:
        LorakitError: as `open_trained`; or there is no run.

    """
    path = source.path
    if path is None:
        path = run_folder.newest_run(RUNS)
        watch.note(f"the newest run: {path}")
    found = open_trained(path, source.which, precision, source.base, source.force)
    for warning in found.warnings:
        watch.warn(warning)
    return found
