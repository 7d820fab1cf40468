"""External images, made by other code: matches them to prompts and seeds, and checks them before they are scored."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from nemo_bench.errors import PromptError, StoreError
from nemo_bench.prompts.readers import Row, read_rows
from nemo_bench.prompts.references import first_of
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.data import Prompt
from nemo_bench.records.images import ImageFile, inspect_image, inspect_images, list_images
from nemo_bench.records.io import check_folder
from nemo_bench.records.schema import ImageRecord

NAMING = re.compile(r"img_(\d+)_(\d+)\.(?:jpe?g|png|webp)", re.IGNORECASE)
"""File names of the public scripts: position of the prompt in its list and number of the image, both from 0."""


ExternalImages = Sequence[tuple[Task, str]]
"""External images: the task that each one answers, and its file."""


def named_images(folder: Path, prompts: Sequence[Prompt]) -> list[tuple[Task, str]]:
    """Finds external images by their names, such as ``img_0000_00.jpg``, in a folder of these and no others.

    Returns:
        The images by prompt, in the order of the numbers; all prompts with images have the same numbers.

    Raises:
        StoreError: An image has another name, a number beyond the prompts or the number of another image, or is
            missing.
    """
    check_folder(folder)
    names = [path.name for path in list_images(folder)]
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
    images = [(Task.of_image(prompts[n], seed), str(folder / name)) for n, seed, name in numbered]
    _refuse_duplicates(folder, images, [path for _, path in images])
    positions = sorted({position for position, _, _ in numbered})
    seeds = sorted({seed for _, seed, _ in numbered})
    present = {(position, seed) for position, seed, _ in numbered}
    _refuse(
        folder,
        [f"img_{n:04d}_{seed:02d}" for n in positions for seed in seeds if (n, seed) not in present],
        f"of {len(positions) * len(seeds)} images are missing",
        "make them, or take out all images of these prompts",
    )
    return images


def mapped_images(mapping: Path, folder: Path, prompts: Sequence[Prompt]) -> list[tuple[Task, str]]:
    """Finds external images by a list of them.

    The list is csv, jsonl or parquet with columns:

    - ``image``, ``file`` or ``path``: the file, absolute or relative to the folder;
    - ``id`` or ``index``: id of the prompt; or else ``prompt``, ``caption`` or ``text``: its text;
    - ``seed`` (optional): number among the images of the prompt; by default counted from 0.

    Returns:
        The images in the order of the list; a prompt may have none.

    Raises:
        PromptError: A row names no image, no whole number as seed, or not exactly one prompt.
        StoreError: A file is missing, or an image or seed is listed twice.
    """
    rows = read_rows(mapping, "images")
    counts: Counter[str] = Counter()
    images = []
    by_id = {prompt.id: prompt for prompt in prompts}
    by_text: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_text.setdefault(prompt.text, []).append(prompt)
    for row in rows:
        name = row.first("images")
        if not isinstance(name, str) or not name.strip():
            raise PromptError(f"{row.where}: the image is {name!r}; expected the name of a file")
        prompt = _prompt(row, by_id, by_text)
        images.append((Task.of_image(prompt, _seed(row, counts[prompt.id])), str(folder / name.strip())))
        counts[prompt.id] += 1
    _refuse(
        mapping,
        [path for _, path in images if not os.path.isfile(path)],
        f"of {len(images)} images do not exist",
        "make them, take their lines out, or name the folder that they are in",
    )
    _refuse_duplicates(mapping, images, [row.where for row in rows])
    return images


def _prompt(row: Row, by_id: dict[str, Prompt], by_text: dict[str, list[Prompt]]) -> Prompt:
    given = row.first("ids")
    id_ = "" if given is None else str(given).strip()
    if id_:
        if id_ not in by_id:
            raise PromptError(f"{row.where}: no prompt has the id {id_!r}; the list begins with {next(iter(by_id))!r}")
        return by_id[id_]
    text = row.first("prompts")
    same = by_text.get(text, []) if isinstance(text, str) else []
    if len(same) != 1:
        what = f"{len(same)} prompts have the text {text!r}" if text else "names neither id nor text of a prompt"
        raise PromptError(f"{row.where}: {what}; expected the id of a prompt, or the text of exactly one")
    return same[0]


def _seed(row: Row, counted: int) -> int:
    value = row.cells.get("seed")
    if value is None or value == "":
        return counted
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}", str(value).strip()):
        raise PromptError(f"{row.where}: the seed is {value!r}; expected a whole number from 0, or no column of seeds")
    return int(value)


def check_images(
    source: Path, images: ExternalImages, *, decode: bool = True, progress: bool = True
) -> list[ImageFile]:
    """Hashes all external images, and by default decodes them; ``source``, their origin, is for errors.

    Raises:
        StoreError: Some can't be read to their end.
    """
    files = inspect_images([path for _, path in images], "images", decode=decode, progress=progress)
    _refuse(
        source,
        [f"{path} ({file.problem})" for (_, path), file in zip(images, files, strict=True) if file.problem],
        f"of {len(images)} images can't be read",
        "make them again",
    )
    return files


def changed_images(folder: Path, records: Iterable[ImageRecord]) -> list[str]:
    """External images of a cell whose file differs from its record; reads only files modified since.

    Generated images have no ``written`` time and are skipped.
    """
    return [
        record.image
        for record in records
        if record.image
        and record.written is not None
        and (path := folder / record.image).stat().st_mtime_ns != record.written
        and inspect_image(path, decode=False).sha256 != record.sha256
    ]


def _refuse_duplicates(source: Path, images: ExternalImages, places: Sequence[str]) -> None:
    of_task: dict[str, str] = {}
    of_path: dict[str, str] = {}
    for (task, path), place in zip(images, places, strict=True):
        if task.id in of_task:
            what = f"image {task.seed} of prompt '{task.prompt.id}' is there twice"
            raise StoreError(f"{source}: {what}: {of_task[task.id]} and {place}; keep one, or give another seed")
        if path in of_path:
            raise StoreError(f"{source}: {path} is there twice: {of_path[path]} and {place}; take one out")
        of_task[task.id] = of_path[path] = place


def _refuse(source: Path, wrong: Sequence[str], what: str, advice: str) -> None:
    if wrong:
        raise StoreError(f"{source}: {len(wrong)} {what}: {first_of(wrong)}; {advice}")
