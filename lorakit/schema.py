"""The strict base of every recipe section, and what it says of a value that does not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails


class Section(BaseModel):
    """A frozen group of settings: unknown keys are refused, `true` is no number, `nan` no value.

    The docstring below each field is its help text, in the JSON schema and in the reference.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,
    )


def refuse_below(reasons: Mapping[str, str], section: BaseModel) -> None:
    """In the validator of a field that holds `section`: refuses values of its own keys.

    Raises:
        ValidationError: there are reasons; each is told where its key is, not where the section is.

    """
    faults = [
        InitErrorDetails(
            type="value_error",
            loc=(key,),
            input=getattr(section, key),
            ctx={"error": ValueError(why)},
        )
        for key, why in reasons.items()
    ]
    if faults:
        raise ValidationError.from_exception_data(type(section).__name__, faults)


def misfits(error: ValidationError) -> list[str]:
    """`key.below: Input should be a valid integer`: a line for each, of a file no user writes."""
    return [
        f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
        for fault in error.errors()
    ]


_WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_long": "at most {max_length} items",
    "too_short": "at least {min_length} items",
}
_WRONG_KIND = {kind for kind in _WORDS if kind.endswith("_type")}


def expected(complaints: Sequence[Mapping[str, Any]], description: str) -> str:
    """What one value should have been, in words.

    `complaints` are pydantic's, one for each branch of a union. Where a branch takes values of this
    kind but not this one, it alone speaks. What no list of types can say (a pattern, a choice of
    kinds) is said by the field's `description`.
    """
    near = [c for c in complaints if c["type"] not in _WRONG_KIND] or list(complaints)
    kind, given = near[0]["type"], near[0]["input"]
    if len(near) > 1 or kind not in _WORDS:
        description = description.strip().rstrip(".")
        return description[:1].lower() + description[1:] or str(near[0]["msg"])
    if kind == "string_type" and not isinstance(given, Mapping | tuple | None):
        return "text; put it in quotes"
    limits = {
        name: f"{value:g}" if isinstance(value, float) else value
        for name, value in near[0].get("ctx", {}).items()
    }
    return _WORDS[kind].format(**limits)
