"""Texts of classes, read from their source."""

from __future__ import annotations

import pytest
from hydra.utils import get_object

from cell_configs import one_cell
from nemo_bench.config import (
    grid,
    options,
)
from nemo_bench.config.about import class_text


@pytest.mark.parametrize("group", ["method", "detector"])
@pytest.mark.parametrize("name", ["title", "summary", "citation"])
def test_text_read_from_source_is_the_attribute_of_the_class(group: str, name: str) -> None:
    for option in options(group):
        choice = one_cell(f"{group}={option}") if group != "method" else grid([f"method={option}"])[0]
        node = getattr(choice.settings, group)
        assert class_text(node["_target_"], name) == getattr(get_object(node["_target_"]), name)
