"""External images: matched to prompts and seeds, and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nemo_bench.errors import NemoBenchError
from nemo_bench.prompts.external import check_images, mapped_images, named_images
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.data import Prompt

PROMPTS = [Prompt("a", "a red sun"), Prompt("b", "a big map"), Prompt("c", "a big map")]


def save(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    Image.new("RGB", size, "red").save(path)
    return path


def named(folder: Path, *names: str) -> Path:
    for name in names:
        save(folder / name)
    return folder


def mapping(folder: Path, *rows: dict[str, Any]) -> Path:
    for row in rows:
        if isinstance(row.get("image"), str) and row["image"].strip() and not row["image"].startswith("no"):
            save(folder / row["image"])
    path = folder / "map.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(found: list[tuple[Task, str]]) -> list[tuple[str, str, int]]:
    return [(Path(path).name, task.prompt.id, task.seed) for task, path in found]


def test_images_named_like_those_of_the_public_scripts_are_matched(tmp_path: Path) -> None:
    named(tmp_path, "img_0000_00.jpg", "img_0000_01.JPG", "img_0001_00.png", "img_0001_01.webp")
    (tmp_path / "prompts.txt").write_text("something else")
    found = named_images(tmp_path, PROMPTS[:2])
    assert listed(found) == [
        ("img_0000_00.jpg", "a", 0),
        ("img_0000_01.JPG", "a", 1),
        ("img_0001_00.png", "b", 0),
        ("img_0001_01.webp", "b", 1),
    ]
    assert found[3][0] == Task.of_image(PROMPTS[1], 1)


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    named(tmp_path, "img_0000_00.png")
    for name in ("._img_0000_00.png", ".DS_Store", "Thumbs.db", ".thumbnail.jpg"):
        (tmp_path / name).write_bytes(b"left by a system")
    assert [Path(path).name for _, path in named_images(tmp_path, PROMPTS[:1])] == ["img_0000_00.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "holds no run, cell or image"),
        (("img_0000_00.jpg", "0001.jpg"), r"1 of 2 images are not named like img_0000_00\.jpg.*: 0001\.jpg; .*--map"),
        (
            ("img_0000_00.jpg", "img_0001_00.jpg", "img_0002_00.jpg"),
            r"1 images are of prompts beyond the 2 .*img_0002_00",
        ),
        (("img_0000_00.jpg", "img_0000_00.png", "img_0001_00.jpg"), "image 0 of prompt 'a' is there twice"),
        (("img_0000_00.jpg", "img_000_00.jpg", "img_0001_00.jpg"), "image 0 of prompt 'a' is there twice"),
        (("img_0000_00.jpg", "img_0000_01.jpg", "img_0001_01.jpg"), "1 of 4 images are missing: img_0001_00"),
    ],
)
def test_wrong_names_are_an_error(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(NemoBenchError, match=message):
        named_images(named(tmp_path, *names), PROMPTS[:2])


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NemoBenchError, match="does not exist; give a run, a cell, or a folder of images"):
        named_images(tmp_path / "none", PROMPTS)


def test_a_mapping_matches_by_id_or_text_with_or_without_seeds(tmp_path: Path) -> None:
    rows = [
        {"image": "x.png", "id": "b", "seed": 3},
        {"image": "y.png", "text": "a red sun"},
        {"image": "z.png", "prompt": "a red sun", "seed": ""},
        {"image": "w.png", "index": "c", "text": "whatever", "seed": "07"},
    ]
    found = mapped_images(mapping(tmp_path, *rows), tmp_path, PROMPTS)
    assert listed(found) == [("x.png", "b", 3), ("y.png", "a", 0), ("z.png", "a", 1), ("w.png", "c", 7)]


def test_a_mapping_written_by_a_spreadsheet_is_read(tmp_path: Path) -> None:
    image = save(tmp_path / "x.png")
    path = tmp_path / "map.csv"
    path.write_text(f"\ufeff;Path;Caption;Seed\n0;{image};a red sun;5\n", encoding="utf-8")
    assert listed(mapped_images(path, Path("/other"), PROMPTS[:1])) == [("x.png", "a", 5)]


OK = {"image": "a.png", "id": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a"}], "line 1: no column of images.*Accepted names: image, file, path"),
        ([{"image": "", "id": "a"}], "line 1: the image is ''"),
        ([{"image": 7, "id": "a"}], "line 1: the image is 7"),
        ([OK, {"image": "b.png", "id": "z"}], "line 2: no prompt has the id 'z'; the list begins with 'a'"),
        ([OK, {"image": "b.png"}], "line 2: names neither id nor text"),
        ([OK, {"image": "b.png", "text": "unknown"}], "line 2: 0 prompts have the text 'unknown'"),
        ([OK, {"image": "b.png", "text": "a big map"}], "line 2: 2 prompts have the text 'a big map'; expected the id"),
        ([{**OK, "seed": "x"}], "line 1: the seed is 'x'"),
        ([{**OK, "seed": -1}], "line 1: the seed is -1"),
        ([{**OK, "seed": 1.5}], r"line 1: the seed is 1\.5"),
        ([{**OK, "seed": True}], "line 1: the seed is True"),
        ([OK, {"image": "none.png", "id": "b"}], r"1 of 2 images do not exist: .*none\.png"),
        ([{**OK, "seed": 1}, {"image": "b.png", "id": "a", "seed": 1}], "image 1 of prompt 'a' .*line 1 and .*line 2"),
        ([OK, {"image": "b.png", "id": "b"}, {**OK, "id": "c"}], r"a\.png is there twice: .*line 1 and .*line 3"),
    ],
)
def test_a_wrong_mapping_is_an_error(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(NemoBenchError, match=message):
        mapped_images(mapping(tmp_path, *rows), tmp_path, PROMPTS)


def test_prompts_without_images_are_left_out(tmp_path: Path) -> None:
    found = named_images(named(tmp_path, "img_0000_00.jpg", "img_0002_00.jpg"), PROMPTS)
    assert listed(found) == [("img_0000_00.jpg", "a", 0), ("img_0002_00.jpg", "c", 0)]
    assert listed(mapped_images(mapping(tmp_path, OK), tmp_path, PROMPTS)) == [("a.png", "a", 0)]


def found_in(*paths: Path) -> list[tuple[Task, str]]:
    return [(Task.of_image(PROMPTS[0], seed), str(path)) for seed, path in enumerate(paths)]


def test_images_are_hashed(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{number}.png", (8, 8)) for number in range(300)]
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    for decode in (True, False):
        found = check_images(tmp_path, found_in(*paths), decode=decode, progress=False)
        assert found == [(sha256, (8, 8) if decode else None, "") for sha256 in expected]


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated, r"1 of 2 images can't be read: .*b\.png \(image file is truncated"),
        (lambda path: path.write_text("<html>"), r"1 of 2 images can't be read: .*b\.png \(no image"),
        (lambda path: path.write_bytes(b""), "1 of 2 images can't be read"),
        (lambda path: path.unlink(), r"1 of 2 images can't be read: .*b\.png .*No such file"),
    ],
)
def test_unreadable_images_are_an_error(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    a, b = save(tmp_path / "a.png"), save(tmp_path / "b.png", (64, 64) if spoil is truncated else (8, 8))
    spoil(b)
    with pytest.raises(NemoBenchError, match=message):
        check_images(tmp_path, found_in(a, b), progress=False)


@given(st.integers(1, 4), st.integers(1, 3), st.randoms(use_true_random=False))
def test_every_image_finds_its_prompt(
    tmp_path_factory: pytest.TempPathFactory, prompts: int, seeds: int, random: Any
) -> None:
    folder = tmp_path_factory.mktemp("images")
    names = [f"img_{prompt:04d}_{seed:02d}.png" for prompt in range(prompts) for seed in range(seeds)]
    random.shuffle(names)
    for name in names:
        (folder / name).touch()
    prompt_list = [Prompt(f"p{number}", "text") for number in range(prompts)]
    expected = [Task.of_image(prompt, seed) for prompt in prompt_list for seed in range(seeds)]
    assert [task for task, _ in named_images(folder, prompt_list)] == expected
