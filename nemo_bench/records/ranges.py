"""Ranges of arguments, stated in their annotations: ``ratio: Share`` or ``steps: Annotated[int, Field(ge=1)]``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, InstanceOf, PydanticUserError, TypeAdapter, ValidationError

from nemo_bench.errors import ConfigError, shortened

Count = Annotated[int, Field(ge=1)]
"""A number of things, at least 1."""
Index = Annotated[int, Field(ge=0)]
"""A number that counts from 0, such as a seed."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole, 0 to 1."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0, such as a learning rate."""
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number, at least 0."""


class Checked:
    """A class whose constructors check arguments against the ranges in their annotations.

    Subclasses need do nothing but annotate the fields of a dataclass, or the arguments of ``__init__``:

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(eq=False)
        ... class Blur(Checked):
        ...     strength: Share = 0.5
        >>> Blur(1.5)
        Traceback (most recent call last):
        nemo_bench.errors.ConfigError: Blur: strength=1.5; expected less than or equal to 1
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _checking(cls.__init__)  # type: ignore[method-assign] # of the same signature

    def __post_init__(self) -> None:
        check_ranges(type(self).__name__, type(self), vars(self))


def _checking(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def checked(self: object, *args: Any, **options: Any) -> None:
        given = inspect.signature(init).bind(self, *args, **options).arguments
        check_ranges(type(self).__name__, init, given)
        init(self, *args, **options)

    return checked


def check_ranges(owner: str, annotated: Any, values: Mapping[str, Any]) -> None:
    """Checks values by name against the ranges in the annotations of a function or class.

    Raises:
        ConfigError: A value is out of its range; names the owner.
    """
    for name, adapter in _ranges(annotated).items():
        try:
            adapter.validate_python(values.get(name))
        except ValidationError as error:
            if name in values:
                expected = error.errors()[0]["msg"].replace("Input should be ", "expected ")
                given = shortened(str(values[name]), 40)
                raise ConfigError(f"{owner}: {name}={given}; {expected}") from None


@cache
def _ranges(annotated: Any) -> dict[str, TypeAdapter[Any]]:
    """Validators of what is annotated with a range, by name."""
    plain = get_type_hints(annotated)
    hints = get_type_hints(annotated, include_extras=True).items()
    return {name: validator(hint) for name, hint in hints if hint != plain[name]}


@cache
def validator(hint: Any) -> TypeAdapter[Any]:
    """The strict validator of a type; where pydantic can't check it so, a check of its instances or none."""
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except PydanticUserError:
        return TypeAdapter(InstanceOf[hint] if inspect.isclass(hint) else Any)
