"""adapter_config.json, PEFT's settings of an adapter: read by type, its patterns within a time."""

from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import regex
from pydantic import ConfigDict, Field, ValidationError

from lorakit.errors import FolderError, several
from lorakit.schema import Section, expected
from lorakit.yamltext import written

CONFIG = "adapter_config.json"
LONGEST = 2**22
"""Bytes of settings; those of a model of thousands of linears are a tenth of it."""
PATIENCE = 1.0
"""Seconds for the regular expressions of one table, all modules together. A thousand matches take a
hundredth of it; `(a|aa)+b`, made for it, would take years."""
_NAME = regex.compile(r"[\w.-]+")
Rank = Annotated[int, Field(gt=0, lt=2**31)]


class PeftConfig(Section):
    """What a reader of plain LoRA needs; names and defaults are PEFT's.

    Other keys are training's affair, or another version's.
    """

    model_config = ConfigDict(extra="allow")

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: Rank = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    modules_to_save: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    bias: str = "none"

    def other(self, key: str) -> Any:
        """A key that only some versions know; null where it is absent."""
        return (self.model_extra or {}).get(key)


def read(folder: Path) -> PeftConfig:
    """The settings in `folder`.

    Raises:
        FolderError: the file is missing, too long or no JSON, or keys are missing or of another
            type; all of them are listed.

    """
    path = folder / CONFIG
    try:
        with path.open("rb") as file:
            text = file.read(LONGEST + 1)
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}.") from error
    if len(text) > LONGEST:
        raise FolderError(f"{path} cannot be read: longer than {LONGEST:,} bytes.")
    try:
        return PeftConfig.model_validate_json(text)
    except ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for fault in error.errors():
            by_key.setdefault(".".join(map(str, fault["loc"])), []).append(fault)
        raise FolderError(several(str(path), [_fault(*item) for item in by_key.items()])) from None


def _fault(key: str, complaints: list[Any]) -> str:
    """`r: 'x': expected a whole number`."""
    first, key = complaints[0], key if key.isprintable() else repr(key)
    if first["type"] in ("json_invalid", "missing"):
        return f"{key}: {first['msg']}" if key else str(first["msg"])
    given = f"{written(first['input'])}: expected {expected(complaints, '')}"
    return f"{key}: {given}" if key else given


class Patterns:
    """`rank_pattern` or `alpha_pattern`: a number by a module's name, as PEFT finds it.

    A key is a regular expression for the end of a name, from a dot on; the first that fits holds.
    Most are names, and looked up as such: hundreds of them over hundreds of modules would take
    seconds to match. So their dots are dots, where for PEFT they are any character.
    """

    def __init__(self, folder: Path, name: str, given: Mapping[str, float], default: float) -> None:
        """Raises FolderError for a key that is no regular expression."""
        self.where, self.default, self.left = f"{folder / CONFIG}: {name}", default, PATIENCE
        self.numbers = tuple(given.values())
        self.names = {key: i for i, key in enumerate(given) if _NAME.fullmatch(key)}
        self.patterns = {
            i: self._compiled(key) for i, key in enumerate(given) if key not in self.names
        }
        self.found: dict[str, float] = {}

    def of(self, module: str) -> float:
        """The number of a module.

        Raises:
            FolderError: patience is at its end.

        """
        if module not in self.found:
            first = min(self._by_name(module), self._by_pattern(module))
            self.found[module] = (*self.numbers, self.default)[first]
        return self.found[module]

    def _by_name(self, module: str) -> int:
        """The first key that is an end of `module`; their count where none is."""
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        return min(
            (self.names[end] for end in ends if end in self.names), default=len(self.numbers)
        )

    def _by_pattern(self, module: str) -> int:
        """As `_by_name`, for the other keys."""
        stop = monotonic() + self.left
        try:
            for i, pattern in self.patterns.items():
                if pattern.match(module, timeout=max(stop - monotonic(), 1e-3)):
                    return i
        except TimeoutError:
            raise FolderError(f"{self.where}: matching takes longer than {PATIENCE:g} s.") from None
        finally:
            self.left = stop - monotonic()
        return len(self.numbers)

    def _compiled(self, key: str) -> "regex.Pattern[str]":
        try:
            return regex.compile(rf"(.*\.)?({key})$")
        except (regex.error, RecursionError) as error:
            raise FolderError(f"{self.where}: {written(key)}: no pattern: {error}.") from None
