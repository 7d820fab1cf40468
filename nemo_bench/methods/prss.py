"""PRSS: another wording of the prompt, and guidance that starts from what the memorized one predicts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_bench.diffusion import Conditioning, Diffusion, Step
from nemo_bench.diffusion.noise import masked_magnitude, norms
from nemo_bench.errors import ConfigError, PromptError
from nemo_bench.methods.base import Batch, Method
from nemo_bench.methods.bright_ending import BrightEndingOptimization, bright_ending
from nemo_bench.methods.embedding_optimization import EmbeddingOptimization
from nemo_bench.prompts import read_rows
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import digest

_PARAPHRASE = re.compile(r"caption(\d+)")


class PRSS(Method):
    """Semantic search and prompt re-anchoring (Chen et al. 2025).

    Search: where the magnitude of an image's prompt at the first timestep, on its starting noise, is above
    ``search_target``, the first paraphrase is taken whose magnitude is not, or else the least magnitude of prompt and
    paraphrases. An image below the target is left alone for good, however large later magnitudes are; records tell
    which images were not (``triggered``), which paraphrase was taken, 0 being the prompt, and whether its magnitude is
    at most the target (``reached``).

    Re-anchoring: for the other images, with c for the paraphrase, p for the prompt and m = |e(c) - e(empty)| in each
    step, the noise is e(empty) + g (e(c) - e(empty)) up to m = ``anchor_from``, and beyond it

        e(p) + r (e(c) - e(p)) + (g - r) (e(c) - e(empty)),

    where r grows linearly from 1 at ``anchor_from`` to the guidance scale g at ``anchor_full``, from where on it is
    e(p) + g (e(c) - e(p)). The paper states this last form alone, from a threshold on; the way between is the public
    code's, and ``anchor_full`` equal to ``anchor_from`` takes it out. Magnitudes are those of single images. Where the
    prompt stays the best of all, re-anchoring has no second wording to lead to.

    Published magnitudes are those of Stable Diffusion 1.4. Elsewhere ``search_target`` should be one that prompts that
    are not memorized stay below. Those of the embedded model have paraphrases in
    ``package:planted/paraphrases.jsonl``.

    Without a file, as in the public code without paraphrases, the embedding of each image is optimized as in
    :class:`EmbeddingOptimization`, and the image is re-anchored if that took a step.

    Args:
        file: Paraphrases (csv, jsonl, parquet), found by the text of the prompt: ``caption1``, ``caption2`` ... as
            published, or a list ``paraphrases``. None optimizes instead.
        search_target: At most this magnitude is enough for a wording. Published: 1.
        anchor_from: Published: 3.
        anchor_full: At least ``anchor_from``. Published: 5.
        bright_ending: Take magnitudes while searching under the mask of :class:`BrightEndingOptimization`.
        missing: What becomes of prompts that the file does not have: ``"error"``, before any weights load, or
            ``"none"``: they are their own only paraphrase.
        steps: AdamW steps at most where embeddings are optimized.
        rate: Learning rate, likewise.

    Raises:
        ConfigError: A number is out of range.
    """

    title = "PRSS"
    summary = "a paraphrase that adds less to the predicted noise, re-anchored at the prompt"
    touches = "prompt or its encoding, and guidance"
    sourcing = "public code; paper second hand"
    citation = cite("chen2025enhancing")
    makes_passes = True
    needs = frozenset({"guidance"})

    def __init__(
        self,
        file: str | None = None,
        search_target: float = 1.0,
        anchor_from: float = 3.0,
        anchor_full: float = 5.0,
        bright_ending: bool = False,
        missing: Literal["error", "none"] = "error",
        steps: int = 10,
        rate: float = 0.05,
    ) -> None:
        if not (search_target >= 0 and 0 <= anchor_from <= anchor_full < math.inf):
            raise ConfigError(
                "prss needs a search_target of 0 or more and 0 <= anchor_from <= anchor_full, given "
                f"search_target={search_target}, anchor_from={anchor_from}, anchor_full={anchor_full}"
            )
        if not file:
            self.title = f"{self.title} by optimization"
        self.file, self.missing, self.bright_ending = file, missing, bright_ending
        self.search_target, self.anchor_from, self.anchor_full = search_target, anchor_from, anchor_full
        self._optimization = (
            BrightEndingOptimization(search_target, steps, rate)
            if bright_ending
            else EmbeddingOptimization(search_target, steps, rate, images=None)
        )

    def check(self, family: str, guidance: float, dtype: str, *, compiled: bool = False) -> None:
        """See :meth:`Method.check`."""
        super().check(family, guidance, dtype, compiled=compiled)
        if not self.file:
            self._optimization.check(family, guidance, dtype, compiled=compiled)
        elif self.bright_ending:
            # Masks alone are taken, no gradients.
            self._optimization.check(family, guidance, "float32", compiled=compiled)

    @cached_property
    def _paraphrases(self) -> Mapping[str, tuple[str, ...]]:
        return read_paraphrases(Path(self.file)) if self.file else {}

    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        """See :meth:`Method.fingerprint`.

        Raises:
            NemoBenchError: The file can't be read, or lacks a prompt.
        """
        if not self.file:
            return {}
        lacking = [prompt.id for prompt in prompts if prompt.text not in self._paraphrases]
        if lacking and self.missing == "error":
            msg = f"{self.file} has no paraphrases for {len(lacking)} of {len(prompts)} prompts (first: '{lacking[0]}')"
            raise ConfigError(f"{msg}; add them, leave these prompts out, or take them as they are with missing=none")
        return {"file": digest([self._paraphrases.get(prompt.text) for prompt in prompts])}

    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        """See :meth:`Method.apply`."""
        if self.file:
            chosen = self._search(model, batch)
            triggered = [note["triggered"] for note in chosen.notes]
        else:
            self._optimization.batch_size = self.batch_size
            with self._optimization.apply(model, batch) as chosen:
                triggered = [note["steps"] > 0 for note in chosen.notes]
            chosen = replace(
                chosen, notes=tuple({**n, "triggered": t} for n, t in zip(chosen.notes, triggered, strict=True))
            )

        def rule(step: Step) -> Tensor:
            noise = step.guided(step.scale)
            above = (step.magnitude > self.anchor_from).tolist()
            rows = [row for row, fired in enumerate(triggered) if fired and above[row]]
            if rows:
                anchor = model.predict_noise(step.latents[rows], step.timestep, batch.text.rows(rows))
                noise[rows] = self.reanchored(step.scale, step.unconditional[rows], step.conditional[rows], anchor)
            return noise

        yield replace(chosen, rule=rule)

    def reanchored(self, scale: float, unconditional: Tensor, chosen: Tensor, anchor: Tensor) -> Tensor:
        """The noise of images that are re-anchored.

        Args:
            scale: Guidance scale g, above 1.
            unconditional: Noise predicted for the empty prompt, (N, channels, height, width).
            chosen: Noise predicted for the paraphrase, likewise.
            anchor: Noise predicted for the prompt, likewise.
        """
        magnitude = norms(chosen - unconditional)
        part = (magnitude - self.anchor_from) / max(
            self.anchor_full - self.anchor_from, torch.finfo(torch.float32).tiny
        )
        r = (1 + (scale - 1) * part.clamp(max=1))[:, None, None, None]
        plain = unconditional + scale * (chosen - unconditional)
        moved = anchor + r * (chosen - anchor) + (scale - r) * (chosen - unconditional)
        return torch.where((magnitude > self.anchor_from)[:, None, None, None], moved, plain)

    @torch.no_grad()
    def _search(self, model: Diffusion, batch: Batch) -> Batch:
        """The batch with a wording for each image."""
        timestep, images = model.timestep(), len(batch.prompts)
        unconditional = model.predict_noise(batch.latents, timestep, model.unconditional(images))
        masks = bright_ending(model, batch.prompts, batch.text, batch.latents) if self.bright_ending else None

        def magnitudes(rows: Sequence[int], text: Conditioning) -> list[float]:
            added = model.predict_noise(batch.latents[rows], timestep, text) - unconditional[rows]
            values: list[float] = (norms(added) if masks is None else masked_magnitude(added, masks[rows])).tolist()
            return values

        wordings = [(prompt.text, *self._paraphrases.get(prompt.text, ())) for prompt in batch.prompts]
        found = [[value] for value in magnitudes(range(images), batch.text)]
        for number in range(1, max(map(len, wordings))):
            rows = [i for i in range(images) if found[i][-1] > self.search_target and number < len(wordings[i])]
            if not rows:
                break
            for row, value in zip(
                rows, magnitudes(rows, model.encode([wordings[i][number] for i in rows])), strict=True
            ):
                found[row].append(value)
        best = [len(f) - 1 if f[-1] <= self.search_target else min(range(len(f)), key=f.__getitem__) for f in found]
        notes = tuple(
            {"triggered": f[0] > self.search_target, "paraphrase": b, "reached": f[b] <= self.search_target}
            for f, b in zip(found, best, strict=True)
        )
        changed = [row for row in range(images) if best[row]]
        if not changed:
            return replace(batch, notes=notes)
        both = batch.text.followed_by(model.encode([wordings[row][best[row]] for row in changed]))
        order = [images + changed.index(row) if best[row] else row for row in range(images)]
        return replace(batch, text=both.rows(order), notes=notes)


def read_paraphrases(path: Path) -> dict[str, tuple[str, ...]]:
    """Reads other wordings of prompts.

    Args:
        path: csv, jsonl or parquet with a column of prompts, and ``caption1``, ``caption2`` ... or a list
            ``paraphrases``; lines without any are passed over.

    Returns:
        Wordings by text of the prompt, in order.

    Raises:
        PromptError: The file can't be read, a wording is no text, or two lines of a prompt differ.
    """
    found: dict[str, tuple[str, ...]] = {}
    for row in read_rows(path):
        numbered = sorted((int(m[1]), name) for name in row.cells if (m := _PARAPHRASE.fullmatch(name)))
        listed = row.cells.get("paraphrases") or [row.cells[name] for _, name in numbered if row.cells[name]]
        if not isinstance(listed, list) or not all(isinstance(wording, str) and wording for wording in listed):
            raise PromptError(f"{row.where}: paraphrases {str(listed)[:60]!r} are no list of texts")
        if listed and found.setdefault(str(row.first("prompts")), tuple(listed)) != tuple(listed):
            raise PromptError(f"{row.where}: other paraphrases for a prompt than in a line before; leave one of them")
    return found
