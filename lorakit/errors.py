"""What a user can get wrong. The command line prints the message alone; a traceback is our bug."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class LorakitError(Exception):
    """Something the user wrote, named or keeps on disk can't be used."""


class RecipeError(LorakitError):
    """A recipe has keys that do not exist or values that cannot hold."""


class ModelError(LorakitError):
    """A base model cannot be loaded, or does not fit what is asked of it."""


class DataError(LorakitError):
    """Rows are missing, empty or not what the task needs."""


class FolderError(LorakitError):
    """A run, a checkpoint or an adapter folder is missing, in the way, or does not fit."""


class NotFiniteError(LorakitError):
    """A loss or its gradient is no number to go on with."""


class Stopped(LorakitError):  # noqa: N818  (asked for, and nothing is wrong)
    """A run was told to stop, and has saved where it is."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal
        """As a shell has it for a process that a signal has ended."""


class Doubt(str):
    """A note, unlike the others, that must not be missed: something is not as it should be."""

    __slots__ = ()


class NotLowRankError(LorakitError):
    """A layer's update is no plain pair of small matrices; the message says why."""


class NotCodedError(LorakitError):
    """A layer has no integer codes to pack."""


def nearest(name: str, known: Iterable[str], close: float = 0.6) -> str:
    """A sentence naming the known word closest to `name`; empty where none is so `close` (to 1)."""
    near = get_close_matches(name, list(known), n=1, cutoff=close)
    return f" Nearest: {near[0]!r}." if near else ""


def one_of(option: str, given: str, known: Sequence[str]) -> None:
    """Raises LorakitError unless `given`, the value of an option, is one of the `known`."""
    if given not in known:
        expected = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
        raise LorakitError(f"{option}: {given!r}: expected {expected}.{nearest(given, known)}")


def no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """`no variant 'sorra'. Nearest: 'sora'. Known: lora, sora.`"""
    known = sorted(known)
    return f"no {kind} {name!r}.{nearest(name, known)} Known: {', '.join(known) or 'none'}."


def several(title: str, faults: Sequence[str]) -> str:
    """One message for all `faults`: the title with their number, then a line each."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return "\n".join([f"{title}: {count}", *(f"  {fault}" for fault in faults)])
