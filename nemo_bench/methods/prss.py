"""PRSS: a paraphrase of the prompt, and guidance anchored at the prediction for the memorized prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import FAMILIES, Conditioning, Diffusion, Step
from nemo_bench.diffusion.noise import masked_magnitude, norms
from nemo_bench.errors import ConfigError, PromptError
from nemo_bench.methods.base import Batch, Method, Setup
from nemo_bench.methods.bright_ending import BrightEndingOptimization, bright_ending
from nemo_bench.methods.embedding_optimization import EmbeddingOptimization, OptimizedEmbedding
from nemo_bench.prompts import read_rows
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Prompt
from nemo_bench.records.io import digest
from nemo_bench.records.ranges import Index, NotNegative, Positive


@dataclass(eq=False)
class PRSS(Method):
    """Semantic search and prompt re-anchoring (Chen et al. 2025).

    Search: an image is triggered if the magnitude of its prompt at the first timestep, on its starting noise, is above
    ``search_target``. It takes the first paraphrase with a magnitude of at most the target, or else the one of prompt
    and paraphrases with the least. Other images stay as they are, however large later magnitudes are. Records have
    ``triggered``, the number of the ``paraphrase``, 0 being the prompt, and whether it ``reached`` the target.

    Re-anchoring: for triggered images, with c for the paraphrase, p for the prompt and m = |e(c) - e(empty)| in each
    step, the noise is e(empty) + g (e(c) - e(empty)) up to m = ``anchor_from``, and beyond it

        e(p) + r (e(c) - e(p)) + (g - r) (e(c) - e(empty)),

    where r grows linearly from 1 at ``anchor_from`` to the guidance scale g at ``anchor_full``, from where on it is
    e(p) + g (e(c) - e(p)). The paper states this last form alone, from a threshold on; the transition is the public
    code's, and ``anchor_full`` equal to ``anchor_from`` removes it. Magnitudes are those of single images. Where no
    paraphrase is better than the prompt, re-anchoring has no second wording to lead to.

    Published magnitudes are those of Stable Diffusion 1.4; for other models ``search_target`` should be above those of
    prompts that are not memorized. ``package:planted/paraphrases.jsonl`` is for the embedded model. Without a file, as
    in the public code without paraphrases, the embedding of each image is optimized as in
    :class:`EmbeddingOptimization`, by ``steps`` and ``rate``, and the image is re-anchored if that took a step.

    Nothing is published for transformers; magnitudes of flow matching are those of velocities, of another scale.
    ``bright_ending`` is for Stable Diffusion 1 and 2 alone.
    """

    title = "PRSS"
    summary = "a paraphrase that adds less to the predicted noise, re-anchored at the prompt"
    touches = "prompt or its encoding, and guidance"
    sourcing = "public code; paper second hand"
    families = frozenset(FAMILIES)
    citation = cite("chen2025enhancing")
    makes_passes = True
    needs = frozenset({"guidance"})

    #: Paraphrases (csv, jsonl, parquet) by text of the prompt: ``caption1``, ``caption2`` ... as published, or a list
    #: ``paraphrases``. None optimizes instead.
    file: str | None = None
    search_target: Annotated[float, Field(ge=0)] = 1.0  #: Largest magnitude that suffices. Published: 1.
    anchor_from: NotNegative = 3.0  #: Published: 3.
    anchor_full: NotNegative = 5.0  #: At least ``anchor_from``. Published: 5.
    bright_ending: bool = False  #: Take magnitudes while searching under the mask of :class:`BrightEndingOptimization`.
    #: Prompts that the file lacks are an ``"error"``, before weights load, or their own only paraphrase (``"none"``).
    missing: Literal["error", "none"] = "error"
    steps: Index = 10
    rate: Positive = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor_full < self.anchor_from:
            raise ConfigError(f"PRSS: anchor_full={self.anchor_full}; expected at least anchor_from={self.anchor_from}")
        if not self.file:
            self.title = f"{self.title} by optimization"
        self._optimization: OptimizedEmbedding = (
            BrightEndingOptimization(self.search_target, self.steps, self.rate)
            if self.bright_ending
            else EmbeddingOptimization(self.search_target, self.steps, self.rate, images=None)
        )

    @override
    def check(self, family: str, guidance: float, dtype: str, *, compiled: bool = False) -> None:
        super().check(family, guidance, dtype, compiled=compiled)
        if not self.file:
            self._optimization.check(family, guidance, dtype, compiled=compiled)
        elif self.bright_ending:
            # Masks need no gradients, hence no precision.
            self._optimization.check(family, guidance, "float32", compiled=compiled)

    @cached_property
    def _paraphrases(self) -> Mapping[str, tuple[str, ...]]:
        return read_paraphrases(Path(self.file)) if self.file else {}

    @override
    def fingerprint(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        if not self.file:
            return {}
        lacking = [prompt.id for prompt in prompts if prompt.text not in self._paraphrases]
        if lacking and self.missing == "error":
            msg = f"{self.file} has no paraphrases for {len(lacking)} of {len(prompts)} prompts (first: '{lacking[0]}')"
            raise ConfigError(f"{msg}; add them, leave these prompts out, or take them as they are with missing=none")
        return {"file": digest([self._paraphrases.get(prompt.text) for prompt in prompts])}

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        self._optimization.setup(model, setup)

    @override
    @contextmanager
    def apply(self, model: Diffusion, batch: Batch) -> Iterator[Batch]:
        if self.file:
            reworded = self._search(model, batch)
        else:
            with self._optimization.apply(model, batch) as reworded:
                pass
            notes = tuple({**note, "triggered": note["steps"] > 0} for note in reworded.notes)
            reworded = replace(reworded, notes=notes)
        triggered = [row for row, note in enumerate(reworded.notes) if note["triggered"]]

        def rule(step: Step) -> Tensor:
            noise = step.guided(step.scale)
            above = (step.magnitude > self.anchor_from).tolist()
            rows = [row for row in triggered if above[row]]
            if rows:
                anchor = model.predict_noise(step.latents[rows], step.timestep, batch.text.rows(rows))
                noise[rows] = self.reanchored(step.scale, step.unconditional[rows], step.conditional[rows], anchor)
            return noise

        yield replace(reworded, rule=rule)

    def reanchored(self, scale: float, unconditional: Tensor, paraphrase: Tensor, anchor: Tensor) -> Tensor:
        """The noise of images that are re-anchored, by guidance scale g and the predictions for the three prompts."""
        added = paraphrase - unconditional
        magnitude = norms(added)
        width = max(self.anchor_full - self.anchor_from, torch.finfo(torch.float32).tiny)
        r = (1 + (scale - 1) * ((magnitude - self.anchor_from) / width).clamp(max=1))[:, None, None, None]
        moved = anchor + r * (paraphrase - anchor) + (scale - r) * added
        is_anchored = (magnitude > self.anchor_from)[:, None, None, None]
        return torch.where(is_anchored, moved, unconditional + scale * added)

    @torch.no_grad()
    def _search(self, model: Diffusion, batch: Batch) -> Batch:
        """The batch with the best wording of each image."""
        timestep = model.timestep()
        images = len(batch.prompts)
        unconditional = model.predict_noise(batch.latents, timestep, model.unconditional(images))
        masks = bright_ending(model, batch.prompts, batch.text, batch.latents) if self.bright_ending else None

        def measure(rows: Sequence[int], text: Conditioning) -> list[float]:
            added = model.predict_noise(batch.latents[rows], timestep, text) - unconditional[rows]
            values: list[float] = (norms(added) if masks is None else masked_magnitude(added, masks[rows])).tolist()
            return values

        wordings = [(prompt.text, *self._paraphrases.get(prompt.text, ())) for prompt in batch.prompts]
        magnitudes = [[value] for value in measure(range(images), batch.text)]
        for number in range(1, max(map(len, wordings))):
            rows = [
                row for row in range(images)
                if magnitudes[row][-1] > self.search_target and number < len(wordings[row])
            ]  # fmt: skip
            if not rows:
                break
            text = model.encode([wordings[row][number] for row in rows])
            for row, value in zip(rows, measure(rows, text), strict=True):
                magnitudes[row].append(value)
        # The search of an image ends with the first magnitude at the target, or with all of them.
        best = [len(own) - 1 if own[-1] <= self.search_target else own.index(min(own)) for own in magnitudes]
        notes = tuple(
            {
                "triggered": own[0] > self.search_target,
                "paraphrase": number,
                "reached": own[number] <= self.search_target,
            }
            for own, number in zip(magnitudes, best, strict=True)
        )
        reworded = [row for row in range(images) if best[row]]
        if not reworded:
            return replace(batch, notes=notes)
        both = batch.text.followed_by(model.encode([wordings[row][best[row]] for row in reworded]))
        order = [images + reworded.index(row) if best[row] else row for row in range(images)]
        return replace(batch, text=both.rows(order), notes=notes)


def read_paraphrases(path: Path) -> dict[str, tuple[str, ...]]:
    """Reads paraphrases by text of the prompt, in order; lines without any are skipped.

    Raises:
        PromptError: The file can't be read, a paraphrase is no text, or two lines of a prompt differ.
    """
    paraphrases: dict[str, tuple[str, ...]] = {}
    for row in read_rows(path):
        numbered = sorted((int(m[1]), name) for name in row.cells if (m := re.fullmatch(r"caption(\d+)", name)))
        listed = row.cells.get("paraphrases") or [row.cells[name] for _, name in numbered if row.cells[name]]
        if not isinstance(listed, list) or not all(isinstance(wording, str) and wording for wording in listed):
            raise PromptError(f"{row.where}: paraphrases {str(listed)[:60]!r} are no list of texts")
        if listed and paraphrases.setdefault(str(row.first("prompts")), tuple(listed)) != tuple(listed):
            raise PromptError(f"{row.where}: other paraphrases for a prompt than in a line before; leave one of them")
    return paraphrases
