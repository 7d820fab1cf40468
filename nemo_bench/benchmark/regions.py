"""Localizers of regions against masks of what is memorized: what ``nemo-bench regions`` does.

Each localizer is a detector, whose cell keeps the images and heat maps of its prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from nemo_bench.benchmark import detect as detection
from nemo_bench.benchmark.dry_run import passes_of_image
from nemo_bench.benchmark.pending import task_ids
from nemo_bench.benchmark.plan import Cell, source_of
from nemo_bench.benchmark.processes import is_main
from nemo_bench.benchmark.stages.base import file_name, to_image
from nemo_bench.config import CellConfig, resolve
from nemo_bench.detectors.regions import RegionLocalizer
from nemo_bench.diffusion.pictures import fitted_picture
from nemo_bench.errors import ConfigError
from nemo_bench.metrics.regions import (
    THRESHOLDS,
    Counts,
    average_precision,
    enlarged,
    fitted_to_others,
    masked_distance,
    span,
    split_iou,
)
from nemo_bench.records.data import Prompt
from nemo_bench.records.images import open_image
from nemo_bench.records.io import digest, is_whole, read_file
from nemo_bench.records.lease import Leases
from nemo_bench.records.masks import check_size, masks_digest, read_masks
from nemo_bench.records.results import DetectorResults, load_detections
from nemo_bench.records.schema import DetectionRecord, RegionImage, RegionPrompt, RegionRow, RegionSet, RegionTable
from nemo_bench.records.store import Store, read_scores
from nemo_bench.report.regions import FILES, write_regions

SHOWS = 0.15
"""Root mean squared pixel difference below which an image counts as a training image (Carlini et al. 2023)."""
PICTURED = {"partial": 8, "VM": 2, "general": 2}
"""Prompts with a sheet of pictures, by group."""
_TILE = 160  # Largest side of a picture in a sheet, in pixels.
_COLUMNS = 4  # Images in a sheet.
_GAP = 2

Mask = NDArray[np.bool_]


def plan(configs: Sequence[CellConfig]) -> list[tuple[Cell, dict[str, Mask]]]:
    """Makes the cells of :func:`nemo_bench.config.region_grid`, each with masks by prompt id; no weights are loaded.

    Raises:
        NemoBenchError: Settings are wrong, or masks or a model are missing or not as they should be.
    """
    for config in configs:
        if config.settings.prompts.masks is None:
            files = ", ".join(config.settings.prompts.files)
            raise ConfigError(f"{files}: which regions are memorized is not known; give prompts.masks=DIR")
    _check_masks(configs)
    cells = []
    for cell in detection.plan([_as_detector(config) for config in configs]):
        settings = cell.config.settings
        folder = Path(resolve(str(settings.prompts.masks)))
        cells.append((cell, read_masks(folder, cell.prompts, source_of(settings.model).image_size)))
    return cells


def _check_masks(configs: Sequence[CellConfig]) -> None:
    """Raises ConfigError where the same heat maps are to be compared with several folders of masks."""
    folders: dict[str, set[str]] = {}
    for config in configs:
        prompts = replace(config.settings.prompts, masks=None)
        folders.setdefault(repr(replace(config.settings, prompts=prompts)), set()).add(
            str(config.settings.prompts.masks)
        )
    for several in (sorted(own) for own in folders.values() if len(own) > 1):
        raise ConfigError(
            f"prompts.masks={','.join(several)}: a run compares heat maps with one folder of masks; give one, or the "
            "others in commands with another name=..., which share nothing"
        )


def _as_detector(config: CellConfig) -> CellConfig:
    names = {group: name for group, name in config.names.items() if group != "region"}
    settings = replace(config.settings, detector=config.settings.region, region=None)
    return replace(config, names={**names, "detector": config.names["region"]}, settings=settings)


def localize_regions(cells: Sequence[tuple[Cell, Mapping[str, Mask]]], command: str, *, progress: bool = True) -> Path:
    """Runs what is pending of some cells, to ``regions.{html,md,csv,json}`` in the folder of the run.

    ``command`` is what the user typed, for the records.

    Raises:
        NemoBenchError: See :func:`plan`; also where a results folder belongs to something else.
    """
    folder = detection.detect([cell for cell, _ in cells], command, progress=progress)
    if is_main():
        leases = Leases()
        results = {found.folder.name: found for found in load_detections(folder)}
        scored = {}
        for cell, masks in cells:
            with leases.owning(cell.store.folder):  # its sheets are written
                scored[cell.id] = score(results[cell.id], masks)
        with leases.owning(folder):
            rows = {row.cell: row for row in _rows_before(folder) if row.cell in results} | scored
            named = [row.model_copy(update={"label": results[name].label}) for name, row in rows.items()]
            write_regions(folder, RegionTable(name=folder.name, rows=named))
    return folder


def _rows_before(folder: Path) -> list[RegionRow]:
    """What commands before this one wrote, as far as it can be read and says of which masks it is."""
    path = folder / FILES[0]
    if not is_whole(path, RegionTable):
        return []
    return [row for row in read_file(path, RegionTable).rows if row.masks]


def forecast(cells: Sequence[tuple[Cell, Mapping[str, Mask]]]) -> dict[str, Any]:
    """What :func:`localize_regions` would do: ``nemo-bench regions --dry-run``.

    Returns:
        ``weights``: by source, ``there``, or ``fetched`` from the hub at the first use. ``cells``: of each its name,
        number of ``prompts``, of ``masks``, of memorized prompts ``without_mask``, of prompts that are ``pending``, and
        ``passes``, UNet passes of one sample that its maps take beside sampling. ``sampling``: passes of sampling,
        which localizers of one model and the same prompts share. ``passes``: all of these.
    """
    rows: list[dict[str, Any]] = []
    sampling: dict[str, list[tuple[set[str], int, int]]] = {}
    weights = {}
    for cell, masks in cells:
        localizer, model = cell.detector, cell.config.settings.model
        assert isinstance(localizer, RegionLocalizer)
        pending = set(cell.store.pending_ids(DetectionRecord, task_ids(cell, DetectionRecord)))
        key = digest([cell.spec.settings[name] for name in ("model", "prompts")])
        sampling.setdefault(key, []).append((pending, localizer.seeds, passes_of_image(model)))
        source = source_of(model)
        weights[source.path] = "there" if source.is_downloaded else "fetched"
        rows.append(
            {
                "cell": cell.id,
                "prompts": len(cell.prompts),
                "masks": len(masks),
                "without_mask": sum(p.kind not in (None, "VM") and p.id not in masks for p in cell.prompts),
                "pending": len(pending),
                "passes": len(pending) * localizer.seeds * localizer.own_passes,
            }
        )
    shared = 0
    for group in sampling.values():
        together = set().union(*(pending for pending, _, _ in group))
        seeds = max((seeds for pending, seeds, _ in group if pending), default=0)
        shared += len(together) * seeds * group[0][2]
    passes = shared + sum(row["passes"] for row in rows)
    return {"weights": weights, "cells": rows, "sampling": shared, "passes": passes}


@dataclass(frozen=True)
class _Maps:
    """The heat maps of a cell, on one scale, and the images that they belong to; files are read when asked for."""

    cell: DetectorResults
    truth: Mapping[str, Mask]  #: By prompt id.
    low: float = 0.0
    high: float = 1.0

    def images(self, prompt: Prompt) -> Tensor:
        """The images of a prompt, (N, 3, height, width) in [0, 1]."""
        record = self.cell.records[prompt.id]
        strip = torch.from_numpy(np.array(open_image(self.cell.folder / str(record.image)))).permute(2, 0, 1) / 255
        found = torch.stack(strip.chunk(self.cell.summary.counts["seeds"], 2))
        check_size(f"the mask of '{prompt.id}'", self.truth[prompt.id], (found.shape[3], found.shape[2]))
        return found

    def heat(self, prompt: Prompt) -> NDArray[np.float64]:
        """The maps of a prompt, (N, height, width) of its images."""
        tensors = read_scores(self.cell.folder / str(self.cell.records[prompt.id].file))
        maps = enlarged(torch.from_numpy(tensors["heat"]), self.truth[prompt.id].shape)
        return (maps - self.low) / ((self.high - self.low) or 1.0)

    def scaled(self, prompts: Sequence[Prompt]) -> _Maps:
        """The same, scaled so that the values of these prompts are from 0 to 1."""
        low, high = span(self.heat(prompt) for prompt in prompts)
        return replace(self, low=low, high=high)


@dataclass(frozen=True)
class _Scored:
    """The images of a prompt, compared with the truth."""

    prompt: Prompt
    counts: list[Counts]
    distances: list[float | None]
    precisions: list[float | None]

    @classmethod
    def of(cls, maps: _Maps, prompt: Prompt) -> _Scored:
        truth = maps.truth[prompt.id]
        heat, images = maps.heat(prompt), maps.images(prompt)
        distances: list[float | None] = [None] * len(images)
        if truth.any() and prompt.references:
            size = (truth.shape[1], truth.shape[0])
            references = torch.stack([fitted_picture(path, size) for path in prompt.references])
            distances = [masked_distance(image, references, truth) for image in images]
        is_partial = truth.any() and not truth.all()
        precisions = [average_precision(each, truth) if is_partial else None for each in heat]
        return cls(prompt, [Counts.of(each, truth) for each in heat], distances, precisions)

    @property
    def is_partial(self) -> bool:
        """Whether it is memorized in part."""
        return 0 < self.counts[0].share < 1

    @property
    def shown(self) -> list[bool]:
        """Which images count: all but those that are unlike the training images, where there are such."""
        return [distance is None or distance < SHOWS for distance in self.distances]

    @property
    def counting(self) -> list[Counts]:
        """The counts of those images."""
        return [own for own, shown in zip(self.counts, self.shown, strict=True) if shown]

    @property
    def unchecked(self) -> int:
        """Images of a memorized prompt without training images: whether they show what is memorized is not known."""
        return sum(distance is None for distance in self.distances) if self.counts[0].size else 0

    def result(self, at: int | None, sheet: str | None) -> RegionPrompt:
        """What the table holds of it, at the threshold of an index."""
        images = [
            RegionImage(
                seed=seed,
                distance=self.distances[seed],
                counts=shown,
                iou=float(self.counts[seed].iou[at]) if shown and at is not None else None,
                average_precision=self.precisions[seed] if shown else None,
            )
            for seed, shown in enumerate(self.shown)
        ]
        prompt = self.prompt
        return RegionPrompt(
            prompt=prompt.id,
            group=prompt.group,
            share=self.counts[0].share,
            threshold=None if at is None else float(THRESHOLDS[at]),
            images=images,
            sheet=sheet,
        )


def score(cell: DetectorResults, masks: Mapping[str, Mask]) -> RegionRow:
    """Scores the heat maps of a finished cell against masks by prompt id, and pictures some of them.

    Of a verbatim prompt without mask all is memorized, of a prompt that is not memorized nothing. Images of memorized
    prompts count if their distance to a training image, where the mask is white, is below :data:`SHOWS`, or if there is
    no training image. Single images are marked at the threshold that is best for the half of the prompts that theirs
    is not in.

    Raises:
        PromptError: A mask has another size than the images.
    """
    truth = _truth(cell, masks)
    prompts = [p for p in cell.prompts if p.id in truth and cell.records[p.id].score is not None]
    maps = _Maps(cell, truth)
    scored: list[_Scored] = []
    if prompts:
        maps = maps.scaled(prompts)
        scored = [_Scored.of(maps, prompt) for prompt in prompts]
    sets: dict[Literal["partial", "all"], RegionSet] = {}
    if partial := _set([each for each in scored if each.is_partial]):
        sets["partial"] = partial
    if every := _set(scored):
        sets["all"] = every
    threshold = every.threshold if every else 1.0
    best = int(np.searchsorted(THRESHOLDS, threshold))
    counting = [each for each in scored if each.counting]
    fitted = fitted_to_others([each.counting for each in counting])
    at = {each.prompt.id: place for each, place in zip(counting, fitted or [], strict=bool(fitted))}
    pictured = _pictured(scored)
    spec = cell.spec
    return RegionRow(
        cell=spec.cell,
        label=cell.label,
        model=spec.model,
        localizer=spec.detector or "",
        prompts=spec.prompts,
        sets=sets,
        masks=masks_digest(masks),
        unchecked=sum(each.unchecked for each in scored),
        left_out=sum(not shown for each in scored for shown in each.shown),
        unknown=sum(prompt.id not in truth for prompt in cell.prompts),
        failed=cell.failed,
        threshold=threshold,
        cost=cell.summary.cost,
        settings=spec.settings["detector"],
        results=[
            each.result(
                place := at.get(each.prompt.id),
                _sheet(maps, each, THRESHOLDS[best if place is None else place]) if each in pictured else None,
            )
            for each in scored
        ],
        citations=spec.citations,
    )


def _truth(cell: DetectorResults, masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """What is memorized by prompt id, without prompts of which that is not known."""
    strip = next((cell.folder / record.image for record in cell.records.values() if record.image), None)
    if strip is None:
        return {**masks}
    width, height = open_image(strip).size
    shape = height, width // cell.summary.counts["seeds"]
    whole = {None: np.zeros(shape, np.bool_), "VM": np.ones(shape, np.bool_)}
    return {**masks} | {p.id: whole[p.kind] for p in cell.prompts if p.kind in whole and p.id not in masks}


def _set(scored: Sequence[_Scored]) -> RegionSet | None:
    """The numbers over some prompts; None where none has an image that counts."""
    scored = [each for each in scored if each.counting]
    images = [own for each in scored for own in each.counting]
    if not images:
        return None
    total = Counts.total(images)
    best = total.best
    precisions = [
        precision
        for each in scored
        for precision, shown in zip(each.precisions, each.shown, strict=True)
        if shown and precision is not None
    ]
    return RegionSet(
        prompts=len(scored),
        images=len(images),
        share=total.share,
        iou=split_iou([each.counting for each in scored]),
        best_iou=float(total.iou[best]),
        threshold=float(THRESHOLDS[best]),
        rest_iou=float(total.rest_iou[best]),
        average_precision=fmean(precisions) if precisions else None,
    )


def _pictured(scored: Sequence[_Scored]) -> list[_Scored]:
    """The first prompts of each group."""
    groups: dict[str, list[_Scored]] = {}
    for each in scored:
        groups.setdefault("partial" if each.is_partial else each.prompt.group, []).append(each)
    return [each for group, own in groups.items() for each in own[: PICTURED.get(group, 0)]]


def _sheet(maps: _Maps, scored: _Scored, threshold: float) -> str:
    """Saves a picture of a prompt, a column an image: images, heat maps, marked pixels, truth; gives its name."""
    prompt = scored.prompt
    images, heat = maps.images(prompt)[:_COLUMNS], maps.heat(prompt)[:_COLUMNS]
    truth = np.broadcast_to(maps.truth[prompt.id], heat.shape)
    rows = [
        images,
        *(torch.from_numpy(np.array(each, np.float32))[:, None] for each in (heat, heat > threshold, truth)),
    ]
    side = max(images.shape[2:])
    shown = [row.expand(-1, 3, -1, -1) for row in rows]
    if side > _TILE:
        shown = [interpolate(row, scale_factor=_TILE / side, mode="area") for row in shown]
    sheet = make_grid(torch.cat(shown), nrow=len(images), padding=_GAP, pad_value=0.5)
    store = Store(maps.cell.folder)
    (store.folder / "sheets").mkdir(exist_ok=True)
    return store.save_image(f"sheets/{file_name(prompt)}.png", to_image(sheet))
