"""What `lorakit schema` and `lorakit recipes` do."""

from rich.console import Console

from lorakit import display, recipe, shipped
from lorakit.display import print_json


def schema() -> None:
    """`lorakit schema`."""
    print_json(recipe.json_schema())


def list_recipes(as_json: bool) -> None:
    """`lorakit recipes list`."""
    found = {name: shipped.summary(path) for name, path in shipped.recipes().items()}
    if as_json:
        print_json(found)
    else:
        Console().print(display.two_columns(list(found.items())))
