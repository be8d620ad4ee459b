"""One file a paper. The file's name is the variant's name in a recipe; nothing is registered."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from lorakit.adapter import Variant
from lorakit.errors import RecipeError, no_such


@cache
def names() -> tuple[str, ...]:
    """The variants there are, in alphabetical order."""
    return tuple(sorted(module.name for module in iter_modules(__path__)))


def get(name: str) -> Variant:
    """The variant of that name.

    Raises:
        RecipeError: no file in this folder has that name.

    """
    if name not in names():
        raise RecipeError(f"adapter.variant: {no_such('variant', name, names())}")
    variant = import_module(f"{__name__}.{name}").VARIANT
    assert isinstance(variant, Variant)
    return variant
