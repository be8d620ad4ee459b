"""Writing so that a reader sees a whole file or folder, or none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import FolderError


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well.

    Its files are fsynced before the rename. On an error nothing stays behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        os.rename(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise FolderError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes or replaces a small file in one stroke."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise FolderError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(path: Path, otherwise: str) -> None:
    """Raises FolderError where `path` exists, or cannot be made for want of permission."""
    if path.exists() or path.is_symlink():
        raise FolderError(f"{path} exists; nothing is overwritten. {otherwise}")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise FolderError(f"{path} cannot be made: no permission to write in {above}.")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
