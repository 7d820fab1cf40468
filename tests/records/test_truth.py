"""Files of known memorization neurons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.errors import ModelError
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.truth import read_truth, truth_digest


def written(folder: Path, content: Any) -> Path:
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return path


def test_truth_is_read_by_prompt(tmp_path: Path) -> None:
    path = written(tmp_path, {"schema": 1, "neurons": {"vm-01": {"mid": [3, 17], "down": [0]}}})
    assert read_truth(path) == {"vm-01": Neurons({"down": [0], "mid": [3, 17]})}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"schema": 2, "neurons": {}}, "schema: Input should be 1"),
        ({"schema": 1, "neurons": {"vm-01": {"mid": ["3"]}}}, "neurons.vm-01.mid.0"),
        ({"schema": 1, "neurons": {"vm-01": {"mid": []}}}, "no neurons for 'vm-01'"),
        ({"vm-01": {"mid": [3]}}, "expected"),
    ],
)
def test_another_content_is_explained(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ModelError, match=r"model\.truth=") as error:
        read_truth(written(tmp_path, content))
    assert said in str(error.value)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be read"):
        read_truth(tmp_path / "none.json")


def test_the_digest_is_of_the_prompts_asked_for() -> None:
    known = {"a": Neurons({"mid": [1]}), "b": Neurons({"mid": [2]})}
    of_a = truth_digest(known, [Prompt("a", "text"), Prompt("c", "text")])
    assert of_a == truth_digest({**known, "b": Neurons({"mid": [5]})}, [Prompt("a", "text")])
    assert of_a != truth_digest({**known, "a": Neurons({"mid": [5]})}, [Prompt("a", "text")])
