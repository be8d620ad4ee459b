"""Why a model could not be loaded, and what to do about it."""

from collections.abc import Iterator
from pathlib import Path


def cannot_load(name: str, revision: str | None, folder: Path, error: Exception) -> str:
    """Why the model `name`, were it in `folder`, could not be loaded."""
    from huggingface_hub import is_offline_mode

    if folder.is_dir() and not (folder / "config.json").is_file():
        return f"model.name: {name!r} is a folder without a model: no config.json in it."
    message = f"model.name: {name!r} cannot be loaded: {first_line(error)}"
    if folder.is_dir():
        return message
    if is_offline_mode():
        return f"{message}\n  HF_HUB_OFFLINE is set: only models already in the cache can be used."
    return f"{message}\n  {_advice(name, revision, error)}"


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
    """What an error of another library says, without its advice."""
    return str(error).strip().splitlines()[0]
