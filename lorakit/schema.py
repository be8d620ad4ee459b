"""The strict base of every recipe section."""

from pydantic import BaseModel, ConfigDict


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
