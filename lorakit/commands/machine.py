"""What `lorakit doctor` and `lorakit env` do."""

from pathlib import Path

from rich.console import Console

from lorakit import display, doctor
from lorakit.display import print_json
from lorakit.engine import Engine
from lorakit.environment import report

SIGNS = {"ok": "✓", "note": "!", "fail": "✗"}


def examine(path: Path | None, overrides: list[str], as_json: bool) -> int:
    """`lorakit doctor`; the exit code: 1 where something would fail."""
    checks = doctor.machine()
    if path is not None:
        checks += doctor.of_recipe(path / "recipe.yaml" if path.is_dir() else path, overrides)
    failed = any(check.state == "fail" for check in checks)
    if as_json:
        print_json({"ok": not failed, "checks": [check._asdict() for check in checks]})
    else:
        rows = [(f"{SIGNS[check.state]} {check.name}", check.text) for check in checks]
        Console().print(display.two_columns(rows))
    return int(failed)


def environment() -> None:
    """`lorakit env`."""
    print_json(report(Engine()))
