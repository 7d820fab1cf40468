"""The prompt files of the embedded model, and their pictures."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nemo_bench.planted.world import PLANTED, Caption, general_caption, planted_mask, planted_picture, render

TEMPLATE_REFERENCES = 8
GENERAL_PROMPTS = 16
CALIBRATION_PROMPTS = 320
HELD_OUT = 2000
"""Held-out captions among which neighbours are searched."""


def heldout_captions(count: int) -> list[Caption]:
    """The first general captions of different texts that no training picture has."""
    captions: dict[str, Caption] = {}
    index = 0
    while len(captions) < count:
        caption = general_caption(index, "heldout")
        captions.setdefault(caption.text, caption)
        index += 1
    return list(captions.values())


def reworded(caption: str) -> str:
    """A caption with the articles exchanged or, without any, with another small word."""
    swapped = re.sub(r"\b(the|an?)\b", lambda found: "a" if found[1] == "the" else "the", caption)
    for mark in (", ", " and "):
        swapped = swapped if swapped != caption else caption.replace(mark, " with ", 1)
    return swapped


def neighbours(captions: Sequence[str]) -> list[str]:
    """For each of some captions the held-out general caption that shares most words with it.

    It is none of the general prompts and of the calibration. A share is of the words that either caption has.
    """
    found = [c.text for c in heldout_captions(HELD_OUT)[GENERAL_PROMPTS + CALIBRATION_PROMPTS :]]
    held_out = {text: _words(text) for text in found}
    return [
        max(held_out, key=lambda text: len(words & held_out[text]) / len(words | held_out[text]))
        for words in map(_words, captions)
    ]


def _words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text)) - {"a", "an", "the"}


def planted_names() -> list[str]:
    """Prompt ids of the planted captions, in their order."""
    return [f"{caption.kind.lower()}-{number:02d}" for number, caption in enumerate(PLANTED, 1)]


def write_prompts(folder: Path) -> None:
    """Writes the prompt files and pictures of the embedded model into a folder.

    ``prompts/planted.jsonl`` has training pictures of the planted captions, ``references/*.png``; ``masks/*.png`` are
    white where all pictures of a template are the same. The others are
    ``prompts/general.jsonl``, ``prompts/calibration.txt``, and ``prompts/controls.jsonl``: the general captions again,
    each with one of its many possible pictures, ``controls/*.png``, which the model has never seen; and variants of the
    planted captions, ``prompts/rewordings.jsonl``, ``prompts/paraphrases.jsonl``, from the wordings for PRSS, and
    ``prompts/neighbours.jsonl``.
    """
    for part in ("prompts", "references", "masks", "controls"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[dict[str, Any]]] = {"planted": [], "general": [], "controls": []}
    for number, (name, caption) in enumerate(zip(planted_names(), PLANTED, strict=True)):
        files = [name] if caption.kind == "VM" else [f"{name}-{variant}" for variant in range(TEMPLATE_REFERENCES)]
        for variant, file in enumerate(files):
            _save_picture(folder / "references" / f"{file}.png", planted_picture(number, variant))
        if caption.kind == "TM":
            _save_picture(folder / "masks" / f"{name}.png", planted_mask(number))
        references = [f"../references/{file}.png" for file in files]
        lists["planted"].append({"id": name, "text": caption.text, "kind": caption.kind, "references": references})
    captions = heldout_captions(GENERAL_PROMPTS + CALIBRATION_PROMPTS)
    for number, caption in enumerate(captions[:GENERAL_PROMPTS], 1):
        name = f"general-{number:02d}"
        rng = np.random.default_rng(zlib.crc32(caption.text.encode()))
        _save_picture(folder / "controls" / f"{name}.png", render(caption.scene, rng))
        lists["general"].append({"id": name, "text": caption.text})
        lists["controls"].append({"id": name, "text": caption.text, "references": [f"../controls/{name}.png"]})
    wordings = (resources.files("nemo_bench.planted") / "paraphrases.jsonl").read_text(encoding="utf-8").splitlines()
    paraphrases = {line["text"]: line["paraphrases"] for line in map(json.loads, wordings)}
    planted = [caption.text for caption in PLANTED]
    lists["rewordings"] = _variants("rewording", list(map(reworded, planted)))
    lists["paraphrases"] = _variants("paraphrase", [paraphrases[text][0] for text in planted])
    lists["neighbours"] = _variants("neighbour", neighbours(planted))
    for name, lines in lists.items():
        _write_lines(folder / "prompts" / f"{name}.jsonl", map(json.dumps, lines))
    _write_lines(folder / "prompts" / "calibration.txt", (caption.text for caption in captions[GENERAL_PROMPTS:]))


def _variants(axis: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of variants of the planted captions."""
    return [
        {"id": f"{name}-{axis}", "text": text, "variant_of": name, "axis": axis}
        for name, text in zip(planted_names(), texts, strict=True)
    ]


def _save_picture(path: Path, picture: Any) -> None:
    Image.fromarray(picture).save(path, optimize=True)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
