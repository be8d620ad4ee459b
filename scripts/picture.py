"""Draws the README's picture of a pruned adapter's ranks, and puts its scores beside it.

    .venv/bin/python scripts/picture.py runs/quickstart/pruned

Writes docs/images/ranks.svg from the ranks in lorakit.json, and between the README's `results`
marks what `lorakit eval` of the folder prints.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from lorakit.display import rank_table

ROOT = Path(__file__).parents[1]
PICTURE, README = ROOT / "docs" / "images" / "ranks.svg", ROOT / "README.md"
THEME = TerminalTheme(
    background=(16, 20, 28),
    foreground=(222, 226, 232),
    normal=[(0, 0, 0), *[(222, 226, 232)] * 7],
    bright=[(96, 104, 116), *[(222, 226, 232)] * 7],
)
# rich's own frame loads a font from another host and draws a window around the text
FRAME = """\
<svg viewBox="{terminal_width} {terminal_height}" xmlns="http://www.w3.org/2000/svg" role="img"
     aria-label="Ranks kept in each linear of each block, of those at the start">
<style>
.{unique_id}-matrix {{
    font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
    font-size: {char_height}px;
    line-height: {line_height}px;
}}
{styles}
</style>
<defs>
{lines}
</defs>
<rect x="-16" y="-16" width="100%" height="100%" rx="10" fill="#10141c" />
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</svg>
"""
MARGIN = 16


def picture(start: dict[str, int], kept: dict[str, int]) -> str:
    """The table of ranks as an SVG that asks no other host for anything."""
    table = rank_table(start, kept)
    with open(os.devnull, "w") as nowhere:
        width = Console(file=nowhere, width=400).measure(table).maximum
        console = Console(file=nowhere, width=width, record=True, color_system="truecolor")
        console.print(table)
    svg = console.export_svg(theme=THEME, code_format=FRAME, unique_id="ranks")
    return re.sub(r'viewBox="(\S+) (\S+)"', _with_margin, svg, count=1)


def results(folder: Path) -> str:
    """What `lorakit eval FOLDER` prints, with the command above it."""
    arguments = ["eval", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", *arguments],
        env={**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join([f"$ lorakit {' '.join(arguments)}", *lines])


def with_results(readme: str, printed: str) -> str:
    """The README with `printed` between its marks."""
    block = f"<!-- results -->\n```text\n{printed}\n```\n<!-- /results -->"
    changed, found = re.subn(
        r"<!-- results -->.*?<!-- /results -->", lambda _: block, readme, flags=re.DOTALL
    )
    assert found == 1, "README.md has lost its `results` marks"
    return changed


def _with_margin(sizes: re.Match[str]) -> str:
    width, height = (round(float(size) + 2 * MARGIN) for size in sizes.groups())
    return f'viewBox="-{MARGIN} -{MARGIN} {width} {height}" width="{width}" height="{height}"'


def main() -> None:
    """Reads the folder named on the command line; writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a pruned folder, as `lorakit prune` writes it")
    folder = parser.parse_args().folder
    card = json.loads((folder / "lorakit.json").read_text(encoding="utf-8"))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(card["start"], card["ranks"]), encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    README.write_text(with_results(readme, results(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
