"""What a finished folder held when lorakit wrote it: lorakit-manifest.json, as a checkpoint's.

Of an adapter it lists tensors, settings and facts; of a merged model all that transformers reads.
Names and places may be changed by hand, as with checkpoints' bases: what of adapter_config.json
makes no difference to the update is not compared, nor where recipe.yaml finds its base and rows.
Cards and tokenizers of adapters are not listed, since lorakit does not read them. Whoever changes
more on purpose removes the manifest: a folder without one, as PEFT's own and those of earlier
versions are, is taken as it stands.
"""

import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from lorakit import manifest, peft_config, yamltext
from lorakit.errors import FolderError

NAME = "lorakit-manifest.json"
"""A name of our own: models of others come with a manifest.json that means other things."""
PLACES = {
    "": ("output_dir",),
    "model": ("name", "revision"),
    "task": ("data_dir",),
    "data": ("train", "validation", "revision"),
}
"""Keys of a recipe that say where something is, by section."""


def write(folder: Path, names: Iterable[str]) -> None:
    """Lists those of `names` that are in `folder`; last, when they are as they shall be."""
    here = [name for name in names if (folder / name).is_file()]
    manifest.write(folder, here, NAME, _GISTS)


def check(folder: Path) -> None:
    """Reads what is listed, a gigabyte in about a second, once in a process; nothing is done where
    nothing is.

    Raises:
        FolderError: a file is missing or not what was written; all such are named.

    """
    if os.path.exists(folder / NAME):  # no folder's name is too long to be asked for
        facts = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.exists())
        _check(folder, tuple((n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in facts))


@cache
def _check(folder: Path, _: tuple[tuple[str, int, int, int], ...]) -> None:
    """`check`, of a folder whose files have these sizes and dates."""
    try:
        manifest.verify(folder, NAME, _GISTS)
    except FolderError as error:
        raise FolderError(
            f"{error}\n  Copy or write it again; or, if that was meant, remove {NAME} from it, and "
            "nothing is compared."
        ) from None


def _settings(path: Path) -> bytes:
    """What adapter_config.json says of the update: all that is read of it but the base's name."""
    found = peft_config.read(path.parent).model_dump(
        mode="json",
        include=set(peft_config.PeftConfig.model_fields) - {"base_model_name_or_path"},
        exclude_defaults=True,  # so that what a later version reads besides is no difference
    )
    return json.dumps(found, sort_keys=True).encode()


def _recipe(path: Path) -> bytes:
    """What recipe.yaml says but places."""
    with path.open(encoding="utf-8", errors="replace") as file:
        found = yamltext.parse(file.read(yamltext.LONGEST + 1), str(path)).data
    for section, keys in PLACES.items():
        inside = found.get(section) if section else found
        for key in keys:
            if isinstance(inside, dict):
                inside.pop(key, None)
    return json.dumps(found, sort_keys=True, default=str).encode()


_GISTS = {peft_config.CONFIG: _settings, "recipe.yaml": _recipe}
