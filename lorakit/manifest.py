"""What is in the files of a folder: manifest.json, by which a changed or cut one is found out.

    {"format": 1, "files": {"adapter.safetensors": {"bytes": 1024, "sha256": "…"}, …}}

Written last. Against accidents, not against people: whoever can change a file can change this one.
"""

import hashlib
import json
from pathlib import Path

from lorakit.errors import FolderError, several

NAME, FORMAT = "manifest.json", 1


def write(folder: Path) -> None:
    """Lists all files that are in `folder` now, in a text of which no byte is idle."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NAME)
    files = {path.name: _facts(path) for path in paths}
    (folder / NAME).write_text(json.dumps({"format": FORMAT, "files": files}), encoding="utf-8")


def verify(folder: Path) -> None:
    """Reads every file once.

    Raises:
        FolderError: a file is missing or not what was written, the manifest among them; all such
            are named.

    """
    if faults := _faults(folder):
        raise FolderError(several(f"{folder} is not as it was written", faults))


def _faults(folder: Path) -> list[str]:
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
        given, files = manifest["format"], manifest["files"]
        if given != FORMAT:
            return [f"{NAME}: format {given!r}; this lorakit reads {FORMAT}"]
        return [fault for name, facts in files.items() if (fault := _fault(folder, name, facts))]
    except FileNotFoundError:
        return [f"{NAME}: missing"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return [f"{NAME}: cannot be read: {error}"]


def _fault(folder: Path, name: str, facts: dict[str, object]) -> str | None:
    path = folder / name
    if path.name != name:
        return f"{NAME}: {name!r} is no file of this folder"
    if not path.is_file():  # a device, or a pipe, would be read without end
        return f"{name}: {'no file' if path.exists() else 'missing'}"
    try:
        found = _facts(path)
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror}"
    if found["bytes"] != facts["bytes"]:
        return f"{name}: {found['bytes']:,} bytes, {facts['bytes']:,} were written"
    if found != facts:
        return f"{name}: other content than was written"
    return None


def _facts(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
