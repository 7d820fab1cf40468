"""The prompt files of the embedded model, and their pictures."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nemo_bench.planted.world import PLANTED, Caption, general_caption, planted_mask, planted_picture, render

TEMPLATE_REFERENCES = 8
GENERAL_PROMPTS = 16
CALIBRATION_PROMPTS = 320


def heldout_captions(count: int) -> list[Caption]:
    """The first general captions of different texts that no training picture has."""
    captions: dict[str, Caption] = {}
    index = 0
    while len(captions) < count:
        caption = general_caption(index, "heldout")
        captions.setdefault(caption.text, caption)
        index += 1
    return list(captions.values())


def planted_names() -> list[str]:
    """Prompt ids of the planted captions, in their order."""
    return [f"{caption.kind.lower()}-{number:02d}" for number, caption in enumerate(PLANTED, 1)]


def write_prompts(folder: Path) -> None:
    """Writes the prompt files and pictures of the embedded model into a folder.

    ``prompts/planted.jsonl`` has training pictures of the planted captions, ``references/*.png``; ``masks/*.png`` are
    white where all pictures of a template are the same. The others are
    ``prompts/general.jsonl``, ``prompts/calibration.txt``, and ``prompts/controls.jsonl``: the general captions again,
    each with one of its many possible pictures, ``controls/*.png``, which the model has never seen.
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
    for name, lines in lists.items():
        _write_lines(folder / "prompts" / f"{name}.jsonl", map(json.dumps, lines))
    _write_lines(folder / "prompts" / "calibration.txt", (caption.text for caption in captions[GENERAL_PROMPTS:]))


def _save_picture(path: Path, picture: Any) -> None:
    Image.fromarray(picture).save(path, optimize=True)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
