"""Images made elsewhere: which prompt and seed each belongs to, checked before anything is scored."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from nemo_bench.errors import PromptError, StoreError
from nemo_bench.prompts import ImageTask, read_rows
from nemo_bench.prompts.readers import ID_COLUMNS, TEXT_COLUMNS, Row
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import check_folder
from nemo_bench.records.pictures import inspect_picture, list_pictures
from nemo_bench.records.schema import ImageRecord

NAMING = re.compile(r"img_(\d+)_(\d+)\.(?:jpe?g|png|webp)", re.IGNORECASE)
"""How the public scripts name images: position of the prompt in its list, from 0, and number of the image."""
IMAGE_COLUMNS = ("image", "file", "path")
SEED_COLUMN = "seed"
EXAMPLES = 3
"""Shown in an error."""
TOGETHER = 256
"""Images that are checked between two steps of the progress bar."""


class FoundImage(NamedTuple):
    """An image and what it is of.

    Attributes:
        task: Its prompt, its number among the images of the prompt, and the id of its record.
        path: The file.
    """

    task: ImageTask
    path: str


def named_images(folder: Path, prompts: Sequence[Prompt]) -> list[FoundImage]:
    """Images named as the public scripts do, such as ``img_0000_00.jpg``.

    Args:
        folder: The folder of the images; other images must not be in it.
        prompts: The prompts, in the order that the images are numbered by.

    Returns:
        Images by prompt and number; every prompt that has any has the same numbers.

    Raises:
        StoreError: An image is named otherwise, numbered beyond the prompts, there twice, or missing.
    """
    check_folder(folder)
    names = [path.name for path in list_pictures(folder)]
    if not names:
        raise StoreError(f"{folder} holds no run, cell or image; images are named img_0000_00.jpg, or given by --map")
    matches = {name: NAMING.fullmatch(name) for name in names}
    _refuse(
        folder,
        [name for name, match in matches.items() if match is None],
        f"of {len(names)} images are not named like img_0000_00.jpg, by position of prompt and image",
        "rename them, or give a mapping file with --map",
    )
    numbered = sorted((int(match[1]), int(match[2]), name) for name, match in matches.items() if match)
    _refuse(
        folder,
        [name for position, _, name in numbered if position >= len(prompts)],
        f"images are of prompts beyond the {len(prompts)} of the list, which are numbered from 0",
        "give the list that they were made from",
    )
    found = [FoundImage(ImageTask.from_prompt(prompts[n], seed), str(folder / name)) for n, seed, name in numbered]
    _refuse_twice(folder, found, [image.path for image in found])
    seeds = sorted({image.task.seed for image in found})
    present = {(position, seed) for position, seed, _ in numbered}
    having = sorted({position for position, _ in present})
    _refuse(
        folder,
        [f"img_{n:04d}_{seed:02d}" for n in having for seed in seeds if (n, seed) not in present],
        f"of {len(having) * len(seeds)} images are missing",
        "make them, or take out all images of these prompts",
    )
    return found


def mapped_images(mapping: Path, folder: Path, prompts: Sequence[Prompt]) -> list[FoundImage]:
    """Images as a list names them: csv, jsonl or parquet.

    - ``image``, ``file`` or ``path``: the file, absolute or in the folder;
    - ``id`` or ``index``: id of the prompt; or, without, ``prompt``, ``caption`` or ``text``: its very text;
    - ``seed``, if any: number of the image among those of the prompt; without, they are counted from 0.

    Args:
        mapping: The list.
        folder: Folder of relative files.
        prompts: The prompts.

    Returns:
        Images in the order of the list; a prompt may have none.

    Raises:
        PromptError: A row names no image, no whole number as seed, or not one prompt.
        StoreError: A file is missing, or an image or seed is there twice.
    """
    rows = read_rows(mapping, IMAGE_COLUMNS, "images")
    by_id = {prompt.id: prompt for prompt in prompts}
    by_text: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_text.setdefault(prompt.text, []).append(prompt)
    counts: Counter[str] = Counter()
    found = []
    for row in rows:
        name = row.first(IMAGE_COLUMNS)
        if not isinstance(name, str) or not name.strip():
            raise PromptError(f"{row.where}: the image is {name!r}; expected the name of a file")
        prompt = _prompt_of(row, by_id, by_text)
        found.append(
            FoundImage(ImageTask.from_prompt(prompt, _seed_of(row, counts[prompt.id])), str(folder / name.strip()))
        )
        counts[prompt.id] += 1
    _refuse(
        mapping,
        [image.path for image in found if not os.path.isfile(image.path)],
        f"of {len(found)} images do not exist",
        "make them, take their lines out, or name the folder that they are in",
    )
    _refuse_twice(mapping, found, [row.where for row in rows])
    return found


class Content(NamedTuple):
    """What is in an image file.

    Attributes:
        sha256: Of the file.
        size: Width and height, None where it was not decoded.
    """

    sha256: str
    size: tuple[int, int] | None


def check_images(
    source: Path, found: Sequence[FoundImage], *, decode: bool = True, progress: bool = True
) -> list[Content]:
    """Reads all images, several at a time and none for long.

    Args:
        source: What the images come from, for errors.
        found: The images.
        decode: Whether they are decoded too; without, they are only hashed.
        progress: Whether a bar is shown.

    Returns:
        What is in each.

    Raises:
        StoreError: Some can't be decoded to their end.
    """
    results: list[tuple[str, tuple[int, int] | None, str]] = []
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 2)) as pool, Progress(disable=not progress) as bar:
        line = bar.add_task("check images", total=len(found))
        for start in range(0, len(found), TOGETHER):
            part = [image.path for image in found[start : start + TOGETHER]]
            results += pool.map(inspect_picture if decode else _hashed, part)
            bar.update(line, advance=len(part))
    _refuse(
        source,
        [f"{image.path} ({why})" for image, (_, _, why) in zip(found, results, strict=True) if why],
        f"of {len(found)} images can't be read",
        "make them again",
    )
    return [Content(sha256, size) for sha256, size, _ in results]


def changed_images(folder: Path, records: Iterable[ImageRecord]) -> list[str]:
    """Images that are other ones than were recorded.

    Args:
        folder: A cell's folder.
        records: Of its images; those of images made here do not say when they were written, and are looked at where
            they are scored.

    Returns:
        Their files. Only files that were written since are read.
    """
    return [
        record.image
        for record in records
        if record.image
        and record.written is not None
        and (path := folder / record.image).stat().st_mtime_ns != record.written
        and _hashed(str(path))[0] != record.sha256
    ]


def _hashed(path: str) -> tuple[str, None, str]:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest(), None, ""
    except OSError as error:
        return "", None, str(error.strerror)


def _prompt_of(row: Row, by_id: dict[str, Prompt], by_text: dict[str, list[Prompt]]) -> Prompt:
    id_, text = row.first(ID_COLUMNS[:2]), row.first(TEXT_COLUMNS)
    if id_ is not None and str(id_).strip():
        if (prompt := by_id.get(str(id_).strip())) is None:
            raise PromptError(
                f"{row.where}: no prompt has the id {str(id_)!r}; the list begins with {next(iter(by_id))!r}"
            )
        return prompt
    same = by_text.get(text, []) if isinstance(text, str) else []
    if len(same) != 1:
        what = f"{len(same)} prompts have the text {text!r}" if text else "names neither id nor text of a prompt"
        raise PromptError(f"{row.where}: {what}; expected the id of a prompt, or the text of exactly one")
    return same[0]


def _seed_of(row: Row, counted: int) -> int:
    value = row.cells.get(SEED_COLUMN)
    if value is None or value == "":
        return counted
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}", str(value).strip()):
        raise PromptError(f"{row.where}: the seed is {value!r}; expected a whole number from 0, or no column of seeds")
    return int(value)


def _refuse_twice(source: Path, found: Sequence[FoundImage], places: Sequence[str]) -> None:
    of_task: dict[str, str] = {}
    of_path: dict[str, str] = {}
    for (task, path), place in zip(found, places, strict=True):
        if task.id in of_task:
            what = f"image {task.seed} of prompt '{task.prompt.id}' is there twice"
            raise StoreError(f"{source}: {what}: {of_task[task.id]} and {place}; keep one, or give another seed")
        if path in of_path:
            raise StoreError(f"{source}: {path} is there twice: {of_path[path]} and {place}; take one out")
        of_task[task.id] = of_path[path] = place


def _refuse(source: Path, wrong: Sequence[str], what: str, advice: str) -> None:
    if wrong:
        more = ", ..." if len(wrong) > EXAMPLES else ""
        raise StoreError(f"{source}: {len(wrong)} {what}: {', '.join(wrong[:EXAMPLES])}{more}; {advice}")
