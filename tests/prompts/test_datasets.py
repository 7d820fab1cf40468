"""Prompts of Hugging Face data sets, saved to disk or from a hub that is replaced."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_bench import Prompt, read_prompts
from nemo_bench.errors import PromptError

datasets = pytest.importorskip("datasets")
ROWS = {
    "Prompt": ["a red cup", 'ein grüner Baum, "alt"'],
    "other": ["no prompt", "nor this"],
    "kind": ["VM", None],
    "id": ["cup", "tree"],
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    whole = datasets.Dataset.from_dict(ROWS)
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "split")
    return tmp_path / "split"


def test_a_saved_data_set_is_a_list_of_prompts(saved: Path) -> None:
    expected = [Prompt("cup", "a red cup", "VM"), Prompt("tree", 'ein grüner Baum, "alt"', None)]
    assert read_prompts(saved) == expected
    assert read_prompts(saved, limit=1) == expected[:1]


def test_split_and_column_are_named_after_colons(splits: Path) -> None:
    assert [p.text for p in read_prompts(f"{splits}:test")] == [ROWS["Prompt"][1]]
    assert [p.text for p in read_prompts(f"{splits}:train:other")] == ROWS["other"]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("", r"there are 2 splits; name one, such as .*split:train\. .*test, train"),
        (":tets", r"there is no split 'tets'.* Did you mean 'test'"),
        (":test:Promt", r"there is no column 'Promt'. Did you mean 'Prompt'"),
    ],
)
def test_a_split_or_column_that_is_not_there_is_an_error(splits: Path, rest: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_prompts(f"{splits}{rest}")


def test_prompts_without_ids_are_numbered_by_the_name_and_checked(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "plain")
    assert [p.id for p in read_prompts(tmp_path / "plain")] == ["plain-0001", "plain-0002"]
    datasets.Dataset.from_dict({"text": ["one", ""]}).save_to_disk(tmp_path / "gap")
    with pytest.raises(PromptError, match=r"gap, row 2: the prompt is empty"):
        read_prompts(tmp_path / "gap")
    datasets.Dataset.from_dict({"words": ["one"]}).save_to_disk(tmp_path / "named")
    with pytest.raises(PromptError, match=r"no column of prompts. Columns found: words. Accepted names: caption, "):
        read_prompts(tmp_path / "named")


@pytest.fixture
def hub(splits: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    def load(name: str, config: str | None) -> object:
        if name != "user/name" or config not in (None, "large"):
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (ConnectError)\nmore")
        return datasets.load_from_disk(str(splits))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("nemo_bench.hub.check_data_set", lambda place: None)
    return load


@pytest.mark.usefixtures("hub")
def test_a_data_set_of_the_hub_is_read_by_its_id() -> None:
    assert [p.text for p in read_prompts("hf://user/name:test")] == [ROWS["Prompt"][1]]
    assert [p.text for p in read_prompts("hf://user/name/large:train:other")] == ROWS["other"]
    with pytest.raises(PromptError, match=r"hf://user/gone: the data set can't be loaded \(Couldn't reach .*\)$"):
        read_prompts("hf://user/gone")


def test_without_a_network_a_data_set_of_the_hub_is_one_message_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    start = time.perf_counter()
    with pytest.raises(PromptError, match=r"^prompts of hf://user/name: the network is unreachable.*HF_HUB_OFFLINE=1"):
        read_prompts("hf://user/name")
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("source", ["hf://", "hf://name", "hf://user/name/config/more", "hf://user/name:a:b:c"])
def test_an_address_of_another_form_is_an_error(source: str) -> None:
    with pytest.raises(PromptError, match=r"expected hf://user/name or hf://user/name/config"):
        read_prompts(source)


def test_without_the_library_the_error_names_what_to_install(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match=r"pip install 'nemo-bench\[datasets\]'"):
        read_prompts(saved)
