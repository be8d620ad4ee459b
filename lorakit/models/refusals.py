"""Why a model could not be loaded, and what to do about it."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lorakit.errors import ModelError
from lorakit.models.heads import CLASSES

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
DOES = {
    "SEQ_CLS": "classifies texts",
    "TOKEN_CLS": "labels words",
    "QUESTION_ANS": "finds answers in texts",
    "CAUSAL_LM": "writes text as a decoder alone",
    "SEQ_2_SEQ_LM": "writes text by an encoder and a decoder",
}
"""What models of each of PEFT's kinds do; those of another answer in vectors."""
OTHER = {"CAUSAL_LM": "SEQ_2_SEQ_LM", "SEQ_2_SEQ_LM": "CAUSAL_LM"}
TASKS = {"CAUSAL_LM": "causal-lm", "SEQ_2_SEQ_LM": "seq2seq"}


@contextmanager
def explained(name: str, revision: str | None, folder: Path) -> Iterator[None]:
    """Within it, whatever is raised is a ModelError: why the model `name`, were it in `folder`,
    cannot be loaded.
    """
    try:
        yield
    except ModelError:
        raise
    except UnpicklingError as error:
        raise ModelError(
            f"model.name: {name!r} cannot be loaded: its weights are a pickle of more than "
            "tensors, which may run code; save them as safetensors."
        ) from error
    except Exception as error:  # a broken file leads its reader to any of them
        raise ModelError(_why(name, revision, folder, error)) from error


def _why(name: str, revision: str | None, folder: Path, error: Exception) -> str:
    from huggingface_hub import is_offline_mode

    here = os.path.isdir(folder)  # which a name longer than any file's is not; Path's raises
    if here and not (folder / "config.json").is_file():
        return f"model.name: {name!r} is a folder without a model: no config.json in it."
    message = f"model.name: {name!r} cannot be loaded: "
    if not here and not HUB_ID.fullmatch(name):
        return f"{message}there is no such folder, and names of the hub are OWNER/NAME."
    files = folder if here else _cached(name, revision)
    if files is not None and (path := _broken(files)):
        return (
            f"{message}{path} is cut or damaged, {path.stat().st_size:,} bytes; copy or download "
            "it again."
        )
    if "ignore_mismatched_sizes" in str(error):  # a switch of transformers' that users do not see
        return f"{message}its weights are not of the shapes that its config.json tells."
    message += first_line(error)
    if here:
        return message
    if is_offline_mode():
        return f"{message}\n  HF_HUB_OFFLINE is set: only models already in the cache can be used."
    return f"{message}\n  {_advice(name, revision, error)}"


def _cached(name: str, revision: str | None) -> Path | None:
    """Where the hub's client keeps the files of a model, if it does."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _broken(folder: Path) -> Path | None:
    """The first of a model's files that is none of its kind."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return path
    for path in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(path, "pt")
        except (OSError, SafetensorError):
            return path
    return None


def refuse_other_kinds(name: str, config: Any, kind: str | None) -> None:
    """Raises ModelError where transformers has no model of this family that does what is asked."""
    if _has(config, kind):
        return
    other = OTHER.get(kind or "")
    hint = f" task.name={TASKS[other]} takes it." if other and _has(config, other) else ""
    raise ModelError(
        f"model.name: {name!r} is a {config.model_type!r}, a family without a model that "
        f"{DOES.get(kind or '', 'answers in vectors')}.{hint}"
    )


def _has(config: Any, kind: str | None) -> bool:
    import transformers

    return type(config) in getattr(transformers, CLASSES[kind])._model_mapping


def _advice(name: str, revision: str | None, error: Exception) -> str:
    """What to do about an answer of the hub's, which transformers wraps into errors of its own."""
    from huggingface_hub import errors, get_token

    page = f"https://huggingface.co/{name}"
    login = "" if get_token() else "; then log in: `hf auth login`"
    for cause in _causes(error):
        if isinstance(cause, errors.GatedRepoError):
            return f"It is gated: accept its licence at {page}{login}."
        if isinstance(cause, errors.RepositoryNotFoundError):
            return f"The hub has no such model, or a private one{login or ': ask for access'}."
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"model.revision: {revision!r}: it has no such branch, tag or commit."
    return "It is no folder here; as a hub id it was not found or not reachable."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: Exception) -> str:
    """What an error of another library says, without its advice; its kind, where that says more."""
    said = (str(error).strip() or "it").splitlines()[0]
    return said if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}"
