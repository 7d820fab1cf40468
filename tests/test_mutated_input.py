"""Mutated input to all that reads files or words of users: an answer or an error that explains, within seconds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_bench.config import grid
from nemo_bench.errors import LONGEST, NemoBenchError, StoreError
from nemo_bench.localization.published import read_published
from nemo_bench.prompts import read_links, read_manifest, read_prompts
from nemo_bench.prompts.external import mapped_images
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.schema import ImageRecord
from nemo_bench.records.store import read_records

PUBLISHED = (
    "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM\na b;;[[3, 17], []];0.5;[[3], []];0.1\n"
)
SOURCES = {
    "prompts.csv": "id,prompt,kind,url\na,a sun,VM,\"['http://x/1', 'http://x/2']\"\nb,a map,,http://x/3\n",
    "prompts.jsonl": '{"id": "a", "text": "a sun", "kind": "VM", "url": ["http://x/1.png"]}\n{"id": 7, "text": "b"}\n',
    "prompts.txt": "a sun\na big map\n",
    "published.csv": PUBLISHED,
    "map.jsonl": '{"image": "a.png", "id": "a", "seed": 3}\n',
    "manifest.jsonl": '{"url": "http://x/1.png", "status": "ok", "file": "1.png", "prompts": {"l": ["a"]}}\n',
    "neurons.json": '{"down": [1, 2], "mid": []}',
    "records/generate.0.jsonl": '{"id": "a", "prompt": "a", "seed": 0, "image": "a.png"}\n'
    '{"id": "b", "prompt": "a", "seed": 1, "failed": "not finite"}\n',
}
HUGE = [
    "[" * 100_000,
    "9" * 5_000,
    "a" * 200_000,
    "{" * 5_000,
    "\0",
    '"',
    "\ud7ff",
    "1e999",
    "null",
    "[[[]]]",
    "-1",
    ";",
    ",",
    "|",
]


def readers(folder: Path) -> dict[str, Callable[[], Any]]:
    prompts = [Prompt("a", "a sun")]
    return {
        "prompts.csv": lambda: (read_prompts(folder / "prompts.csv"), read_links(folder / "prompts.csv")),
        "prompts.jsonl": lambda: (read_prompts(folder / "prompts.jsonl"), read_links(folder / "prompts.jsonl")),
        "prompts.txt": lambda: read_prompts(folder / "prompts.txt"),
        "published.csv": lambda: read_published(folder / "published.csv"),
        "map.jsonl": lambda: mapped_images(folder / "map.jsonl", folder, prompts),
        "manifest.jsonl": lambda: read_manifest(folder),
        "neurons.json": lambda: Neurons.load(folder / "neurons.json"),
        "records/generate.0.jsonl": lambda: read_records(folder, ImageRecord),
    }


def mutated(text: str, draw: random.Random) -> str:
    """A few changes: something put in, taken out, doubled or moved."""
    for _ in range(draw.randint(1, 3)):
        start, end = sorted(draw.randint(0, len(text)) for _ in range(2))
        part = text[start:end]
        change = draw.choice(["", draw.choice(HUGE), part * 2, part[::-1]])
        text = text[:start] + change + text[end:]
    return text


@pytest.mark.parametrize("name", SOURCES)
def test_a_mutated_file_is_read_or_explained(tmp_path: Path, name: str) -> None:
    draw, path = random.Random(name), tmp_path / name
    path.parent.mkdir(exist_ok=True)
    read = readers(tmp_path)[name]
    path.write_text(SOURCES[name], encoding="utf-8")
    if name != "map.jsonl":  # its image is not there
        read()
    messages = []
    for _ in range(60):
        path.write_text(mutated(SOURCES[name], draw), encoding="utf-8")
        try:
            read()
        except NemoBenchError as error:
            messages.append(str(error))
    assert all(0 < len(message) < 6 * LONGEST for message in messages)
    assert messages or name in ("prompts.txt", "manifest.jsonl")


WORDS = [
    "seeds=range(0,1,0)", "seeds=range(1,100000000)", "model=glob(*)", "prompts=glob(*)", "seeds=interval(1,2)",
    "seeds=choice()", f"trainer={'9' * 5000}", f"trainer.devices={'9' * 3000}", f"model.steps={'9' * 400}",
    "hydra.run.dir=range(1,100000000)", "hydra.verbose=true", f"seeds={'[' * 800}", f"name={'a' * 200_000}",
    f"method={'a' * 200_000}", f"experiment={'x' * 5000}", "seeds=range(0,200)*range(0,200)",
]  # fmt: skip


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word[:24])
def test_a_word_that_can_not_be_meant_is_explained_at_once(word: str) -> None:
    start = time.process_time()
    with pytest.raises(NemoBenchError) as error:
        grid(["method=none", word] if not word.startswith("method") else [word])
    assert len(str(error.value)) < 2 * LONGEST
    assert time.process_time() - start < 20


def test_a_table_of_many_columns_is_read_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"c{number}" for number in range(20_000)) + ",text\n" + "1," * 20_000 + "x\n")
    start = time.process_time()
    assert [prompt.text for prompt in read_prompts(path)] == ["x"]
    assert time.process_time() - start < 3


def test_a_cell_may_be_longer_than_python_expects(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text(f"prompt,other\n{'a' * 200_000},b\n")
    assert len(read_prompts(path)[0].text) == 200_000


def test_a_message_shows_no_more_than_the_ends_of_what_it_quotes() -> None:
    text = str(StoreError(f"{'a' * 200_000}: expected less; write less"))
    assert len(text) < LONGEST + 100
    assert text.startswith("aaa")
    assert text.endswith("a: expected less; write less")
    assert "[198,0" in text
    assert str(StoreError("short")) == "short"
