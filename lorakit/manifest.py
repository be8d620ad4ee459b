"""What is in the files of a folder: a manifest, by which a changed or cut one is found out.

    {"format": 1, "files": {"adapter.safetensors": {"bytes": 1024, "sha256": "…"}, …}}

Written last. Against accidents, not against people: whoever can change a file can change this one.
A gigabyte takes about a second, once when it is written and whenever it is verified.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from lorakit.errors import FolderError, several

NAME, FORMAT = "manifest.json", 1
"""Of a checkpoint's; other folders may give theirs another name."""
Gists = Mapping[str, Callable[[Path], bytes]]
"""By a file's name: what of it counts, where that is not every byte."""
ALL: Gists = MappingProxyType({})


def write(
    folder: Path, names: Iterable[str] | None = None, manifest: str = NAME, gists: Gists = ALL
) -> None:
    """Lists files that are in `folder` now, null: all, in a text of which no byte is idle."""
    if names is None:
        names = (path.name for path in folder.iterdir() if path.is_file() and path.name != manifest)
    files = {name: _facts(folder / name, gists) for name in sorted(names)}
    text = json.dumps({"format": FORMAT, "files": files})
    (folder / manifest).write_text(text, encoding="utf-8")


def verify(folder: Path, manifest: str = NAME, gists: Gists = ALL) -> None:
    """Reads every file that is listed, once.

    Raises:
        FolderError: a file is missing or not what was written, the manifest among them; all such
            are named.
        LorakitError: of a file by whose gist it is known, its reader's.

    """
    if faults := _faults(folder, manifest, gists):
        raise FolderError(several(f"{folder} is not as it was written", faults))


def _faults(folder: Path, manifest: str, gists: Gists) -> list[str]:
    path = folder / manifest
    if not path.is_file():  # a device, or a pipe, would be read without end
        return [f"{manifest}: {'no file' if path.exists() else 'missing'}"]
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        given, files = listed["format"], listed["files"]
        if given != FORMAT:
            return [f"{manifest}: format {given!r}; this lorakit reads {FORMAT}"]
        strangers = [name for name in files if (folder / name).name != name]
        if strangers:
            return [f"{manifest}: {name!r} is no file of this folder" for name in strangers]
        found = (_fault(folder / name, facts, gists) for name, facts in files.items())
        return [fault for fault in found if fault]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return [f"{manifest}: cannot be read: {error}"]


def _fault(path: Path, facts: dict[str, object], gists: Gists) -> str | None:
    name = path.name
    if not path.is_file():
        return f"{name}: {'no file' if path.exists() else 'missing'}"
    try:
        found = _facts(path, gists)
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror}"
    if name not in gists and found["bytes"] != facts["bytes"]:
        return f"{name}: {found['bytes']:,} bytes, {facts['bytes']:,} were written"
    if found != facts:
        return f"{name}: other content than was written"
    return None


def _facts(path: Path, gists: Gists) -> dict[str, object]:
    if gist := gists.get(path.name):
        return {"sha256": hashlib.sha256(gist(path)).hexdigest()}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
