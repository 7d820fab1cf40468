"""Groups of YAML files."""

from __future__ import annotations

import pytest

from cell_configs import FILES
from nemo_bench.config import (
    GROUPS,
    describe_options,
    options,
)
from nemo_bench.errors import ConfigError


def test_every_group_has_files_and_every_file_a_group() -> None:
    assert {group for group, _ in FILES} == set(GROUPS)
    assert {group: options(group) for group in GROUPS} == {
        group: [name for folder, name in FILES if folder == group] for group in GROUPS
    }


def test_unknown_group_is_an_error() -> None:
    for ask in (options, describe_options):
        with pytest.raises(ConfigError, match=r"unknown group 'methods'\. Did you mean 'method'"):
            ask("methods")
