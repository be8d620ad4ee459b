"""Writing so that a reader sees a whole file or folder, or none; and one writer at a time."""

import atexit
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from lorakit.errors import FolderError, LorakitError

_OWN = ".lorakit-"
"""How the folders begin that are a single process's."""


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well.

    Its files are fsynced before the rename. On an error nothing stays behind.
    """
    temporary = _beside(path)
    with written(path), passing_folder(temporary):
        sweep(path.parent, f".{path.name}.")
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)


@contextmanager
def passing_folder(path: Path) -> Iterator[None]:
    """A new folder that is gone when the block ends, however it does. One that ends in .tmp is
    swept where the process was killed.
    """
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Within it, what the system answers to writing is a FolderError that names `path`."""
    try:
        yield
    except LorakitError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise FolderError(f"{path} cannot be written: {reason}.") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what is written to it takes its place when the block ends
    well. On an error nothing stays behind.
    """
    temporary = _beside(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise FolderError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):  # what the disk answers has been told
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes or replaces a small file in one stroke."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_root() -> Path:
    """Where stands what can be made again: $LORAKIT_CACHE, or ~/.cache/lorakit; a folder for this
    process alone where that cannot be written to. Nothing breaks if it is deleted.
    """
    path = Path(os.environ.get("LORAKIT_CACHE") or "~/.cache/lorakit").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _own_cache()
    return path if os.access(path, os.W_OK | os.X_OK) else _own_cache()


@cache
def _own_cache() -> Path:
    held = ExitStack()
    atexit.register(held.close)
    return held.enter_context(own_folder(Path(gettempdir())))


@contextmanager
def own_folder(within: Path) -> Iterator[Path]:
    """A folder of this process alone in `within`, gone when the block ends; those that processes
    left there which were killed are removed.
    """
    sweep(within, _OWN)
    with TemporaryDirectory(
        prefix=_OWN, suffix=f".{os.getpid()}.tmp", dir=within, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def remove(folder: Path) -> None:
    """Removes a folder, which no reader sees in part."""
    temporary = _beside(folder)
    os.rename(folder, temporary)
    shutil.rmtree(temporary)


def sweep(folder: Path, start: str = ".") -> None:
    """Removes what processes that were killed have left in `folder`, of names with that `start`."""
    for path in folder.glob(f"{start}*.tmp"):
        if not _alive("".join(path.suffixes[-2:-1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it, no other process enters the same block for `folder`.

    The lock is the system's and on the folder itself: it leaves no file, and goes with its process.

    Raises:
        FolderError: another process has it.

    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file in hex digits; of a folder, of the names and digests of all its files."""
    if not path.is_dir():
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    files = (each for each in sorted(path.rglob("*")) if each.is_file())
    told = "".join(f"{digest(each)} {each.relative_to(path)}\n" for each in files)
    return sha256(told.encode()).hexdigest()


def refuse_existing(path: Path, otherwise: str) -> None:
    """Raises FolderError where `path` exists, or cannot be made for want of permission."""
    if path.exists() or path.is_symlink():
        raise FolderError(f"{path} exists; nothing is overwritten. {otherwise}")
    refuse_locked(path)


def refuse_locked(path: Path) -> None:
    """Raises FolderError where nothing can be made at `path` for want of permission."""
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise FolderError(f"{path} cannot be made: no permission to write in {above}.")


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderError(f"{folder}: another process trains into it; wait, or stop it.") from None
    except OSError:  # a file system without locks
        return


def _reason(error: Exception) -> str | None:
    """What the system has answered; None where it was not asked.

    Libraries in Rust (safetensors, tokenizers) tell it by exceptions of their own, in words:
    `No space left on device (os error 28)`.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    told = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(told[1])) if told else None


def _beside(path: Path) -> Path:
    """A name for what is not whole yet, which tells whose it is."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _alive(suffix: str) -> bool:
    """Whether the process runs whose number the suffix is; any other of that number counts too."""
    number = suffix.removeprefix(".")
    if not number.isdecimal():
        return True  # none of ours
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
