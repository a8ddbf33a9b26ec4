"""What every part of the recipe is made of: its base class, and bounded numbers."""

from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the recipe: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, tree: object) -> object:
        """Python's True is an int, and pydantic would take `batch_size: true` for 1."""
        if isinstance(tree, dict):
            for name, value in tree.items():
                known = cls.model_fields.get(name)
                if known is None or bool in (known.annotation, *get_args(known.annotation)):
                    continue
                if isinstance(value, bool):
                    raise ValueError(f"{name} is not a yes-or-no value, and was given {value}")
        return tree
