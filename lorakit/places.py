"""Where a name in a recipe points: a path on disk, or data inside an installed package."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from lorakit.errors import LorakitError

PACKAGE = "package:"


def locate(name: str, error: type[LorakitError], where: str) -> Path:
    """The path of `name`: a path as it stands, or `package:DISTRIBUTION/PATH`.

    Raises:
        LorakitError: of type `error`, where the package or the path is not there.

    """
    inside = name.startswith(PACKAGE)
    path = _in_package(name, error, where) if inside else Path(name).expanduser()
    if not path.exists():
        there = f" inside the package: {path}" if inside else ""
        raise error(f"{where}: {name!r}: there is no such file or folder{there}.")
    return path


def _in_package(name: str, error: type[LorakitError], where: str) -> Path:
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    if not (package and inside):
        raise error(f"{where}: {name!r}: expected {PACKAGE}DISTRIBUTION/PATH.")
    try:
        return Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        raise error(
            f"{where}: {name!r}: the package {package!r} is not installed; pip install {package}."
        ) from None
