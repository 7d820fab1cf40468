"""Reference images of prompts: the manifest of downloaded ones, checks, and a digest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_bench.errors import PromptError
from nemo_bench.records.data import Prompt
from nemo_bench.records.images import unreadable
from nemo_bench.records.io import digest, file_digest, parse_json

MANIFEST = "manifest.jsonl"
"""File in a folder of downloaded reference images, written by ``nemo-bench references``."""


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads the manifest of a folder of downloaded reference images; a last line torn by a kill is dropped.

    Returns:
        The last entry of each link: ``url``, ``prompts`` (ids by list) and ``status``, which is ``ok`` with ``file``,
        ``sha256``, ``bytes``, ``format``, ``width`` and ``height``, or ``dead`` with ``why`` and ``may_heal``, whether
        another try may succeed. Empty without a manifest.

    Raises:
        PromptError: A line before the last is no entry.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    entries: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry: dict[str, Any] = parse_json(line)
            entries[entry["url"]] = {**entry, "status": entry["status"], "prompts": entry.get("prompts", {})}
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                msg = f"{path}, line {number} is no entry of fetched images; delete that line, its link is tried again"
                raise PromptError(msg) from None
    return entries


def with_downloaded(source: str, folder: Path, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Adds downloaded images of a folder to ``references`` of prompts, and dead links to ``dead_references``.

    Prompts stay as they are if the manifest has none of their links; that it has only some is a PromptError.
    """
    manifest = read_manifest(folder)
    links = {link for prompt in prompts for link in prompt.links}
    untried = links - manifest.keys()
    if untried == links:
        return list(prompts)
    if untried:
        msg = f"{source}: {len(untried)} of {len(links)} links were not tried yet, such as {min(untried)}"
        raise PromptError(f"{msg}; go on with: nemo-bench references {source} {folder}")
    alive = {link: folder / manifest[link]["file"] for link in links if manifest[link]["status"] == "ok"}
    return [
        prompt._replace(
            references=(*prompt.references, *(alive[link] for link in prompt.links if link in alive)),
            dead_references=tuple(link for link in prompt.links if link not in alive),
        )
        for prompt in prompts
    ]


def dead_references(prompts: Iterable[Prompt]) -> list[str]:
    """Collects the dead links of prompts, each once, in the order of the prompts."""
    return list(dict.fromkeys(link for prompt in prompts for link in prompt.dead_references))


def references_digest(prompts: Sequence[Prompt]) -> str:
    """Hashes the contents of reference images, in the order of the prompts, to 16 digits; paths do not matter.

    Raises:
        PromptError: A reference image can't be read.
    """
    # Template prompts share their reference images: each file is read once.
    files: dict[Path, str] = {}
    for path in dict.fromkeys(path for prompt in prompts for path in prompt.references):
        try:
            files[path] = file_digest(path)
        except OSError as error:
            raise PromptError(f"{path}: this reference image can't be read ({error.strerror})") from error
    return digest([[files[path] for path in prompt.references] for prompt in prompts])


def check_references(source: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Decodes all reference images, and moves undecodable ones from ``references`` to ``damaged_references``.

    Args:
        source: Origin of the prompts, for errors.
        prompts: The prompts.

    Raises:
        PromptError: A file is missing, or there are files and none can be decoded.
    """
    prompts = [p._replace(references=(*p.references, *p.damaged_references), damaged_references=()) for p in prompts]
    missing = [(path, prompt.id) for prompt in prompts for path in prompt.references if not path.is_file()]
    if missing:
        count = f"{len(missing)} reference files of {len({id_ for _, id_ in missing})} prompts are missing"
        msg = f"{source}: {count}: {first_of([f'{path} (prompt {id_!r})' for path, id_ in missing])}"
        raise PromptError(f"{msg}. Add them, or name the folder that relative file names start from")
    owners = {path: prompt.id for prompt in reversed(prompts) for path in prompt.references}
    damaged = unreadable(owners, "reference images")
    if damaged and len(damaged) == len(owners):
        shown = first_of([f"{path} of prompt {owners[path]!r} ({why})" for path, why in damaged.items()])
        msg = f"{source}: none of the {len(owners)} reference files can be read as an image: {shown}"
        raise PromptError(f"{msg}; replace them, or take them out of the list")
    return [
        prompt._replace(
            references=tuple(path for path in prompt.references if path not in damaged),
            damaged_references=tuple(path for path in prompt.references if path in damaged),
        )
        for prompt in prompts
    ]


def first_of(items: Sequence[str]) -> str:
    """Lists the first three items, for an error message."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
