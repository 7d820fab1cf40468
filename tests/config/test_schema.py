"""Typed settings."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nemo_bench.config import (
    overridden,
)
from nemo_bench.errors import ConfigError


@dataclass
class Training:
    steps: int = 3
    rate: float = 0.5
    name: str = "a"


def test_overridden_dataclass_is_typed_and_checked() -> None:
    assert overridden(["name=1_0", "steps=1_0"], Training) == Training(10, name="1_0")
    assert overridden(["steps=5"], Training) == Training(5, 0.5)
    assert overridden([], Training) == Training()
    for word, message in (
        ("stepz=5", "unknown setting 'stepz=5'.*Did you mean 'steps'"),
        ("steps", "unknown setting 'steps'; write key=value"),
        ("steps=many", "steps=many: expected a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            overridden([word], Training)
