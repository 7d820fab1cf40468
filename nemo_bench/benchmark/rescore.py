"""Scoring existing images: those of a run, or external images; no diffusion model is loaded."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nemo_bench.benchmark.pending import track_cells, write_pages
from nemo_bench.benchmark.plan import Cell, check_metrics, has_current_scores, make_spec, pair, read_listed
from nemo_bench.benchmark.processes import is_main
from nemo_bench.benchmark.run import fetch_weights, log_file, report_damaged, take_to_table
from nemo_bench.benchmark.runner import Runner, note_start, open_folder
from nemo_bench.config import RunSettings
from nemo_bench.config.composition import CellConfig, one, rescore
from nemo_bench.config.listing import about_method
from nemo_bench.errors import ConfigError, StoreError, counted
from nemo_bench.prompts import check_references
from nemo_bench.prompts.external import changed_images, check_images, mapped_images, named_images
from nemo_bench.prompts.tasks import Task
from nemo_bench.records.data import Prompt
from nemo_bench.records.images import ImageFile, open_image
from nemo_bench.records.io import check_folder, digest, prompts_digest, write_json
from nemo_bench.records.lease import Leases
from nemo_bench.records.schema import ImageRecord, LocalizationRecord, MemorizationRecord, ScoreRecord
from nemo_bench.records.store import (
    Store,
    missing_records,
    read_cell_prompts,
    read_run,
    read_settings,
    read_spec,
    remake,
)
from nemo_bench.tracking.live import Live

log = logging.getLogger(__name__)

OTHER_MODEL = "unnamed"
"""Name of the model of external images that is none of conf/model."""


def score(cells: Sequence[Cell], command: str, *, progress: bool = True) -> Path:
    """Scores what is pending of some cells, to table and report in the folder of the run.

    ``command`` is what the user typed, for the records.
    """
    folder = cells[0].store.folder.parent
    settings = cells[0].config.settings
    live = Live(settings.logger, {cell.id: str(cell.spec.method) for cell in cells})
    runner = Runner(settings.trainer, progress=progress)
    runner.progress.listeners.append(live.note)
    runner.start()
    with log_file(folder):
        if is_main():
            for cell in cells:
                fetch_weights(cell)
            report_damaged(cells)
        unchanged = []
        with live:
            for cell in cells:
                with runner.holding(cell.store.folder):
                    if is_main():
                        note_start(cell, command, runner)
                        if has_current_scores(cell):
                            unchanged.append(cell)
                        else:
                            live.begin(cell.store.folder)
                    take_to_table(cell, runner)
                    if is_main():
                        live.end()
        if is_main():
            # Another command of this name may have taken them off the list while they were not finished.
            with runner.leases.owning(folder):
                open_folder(folder, cells)
                results = write_pages(folder)
            if unchanged:
                track_cells(results, unchanged)
    return folder


def cells_of(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    conf: Path | None = None,
    mapping: Path | None = None,
    progress: bool = True,
) -> list[Cell]:
    """The cells of existing images, checked for everything that can be wrong; no weights are loaded.

    Of a run, all cells that have their images; else one cell, after the one without mitigation that it is compared
    with, if there is one. Overrides of a run or cell are those of :data:`nemo_bench.config.SCORING`; of external images
    those of a run, with at least ``model`` and ``prompts``, and any name as ``method``, ``none`` for images without
    mitigation, which others of the same run are then compared with. External images are named ``img_0000_00.jpg``
    (:func:`nemo_bench.prompts.external.named_images`) or by a list, ``mapping``
    (:func:`nemo_bench.prompts.external.mapped_images`).

    Raises:
        NemoBenchError: Anything is wrong with settings, images or prompts.
    """
    check_folder(folder)
    if mapping is None and (folder / "run.json").is_file():
        cells = _of_run(folder, overrides, conf)
    elif mapping is None and (folder / "spec.json").is_file():
        cells = _with_unmitigated(reread(folder, overrides, conf), conf)
    else:
        cells = _with_unmitigated(_of_images(folder, mapping, overrides, conf, progress=progress), conf)
    check_metrics([cell.config.settings for cell in cells], [(cell.prompts, _image_size(cell)) for cell in cells])
    return cells


def _image_size(cell: Cell) -> tuple[int, int] | None:
    """Width and height of a run's images by one of them; None where none can be read, and of external images."""
    if cell.spec.task != "benchmark":
        return None
    files = (cell.store.folder / r.image for r in cell.store.records(ImageRecord).values() if r.image)
    with suppress(StoreError, StopIteration):
        return open_image(next(files)).size
    return None


def _of_run(folder: Path, overrides: Sequence[str], conf: Path | None) -> list[Cell]:
    names = [name for name in read_run(folder).cells if (folder / name).is_dir()]
    lacking = {name: reason for name in names if (reason := _missing(folder / name))}
    if len(lacking) == len(names):
        listed = "; ".join(f"{name}: {reason}" for name, reason in lacking.items()) or "run.json lists none"
        raise StoreError(f"{folder}: no cell has all its images; give the command of the run again ({listed})")
    if is_main():
        for name, reason in lacking.items():
            log.warning("%s: left out, %s", name, reason)
    known: dict[str, RunSettings] = {}
    cells = [_reread(folder / name, overrides, conf, known) for name in names if name not in lacking]
    latest_first = sorted(cells, key=lambda c: (c.store.folder / "generate.done").stat().st_mtime_ns, reverse=True)
    pair(latest_first, folder)
    own = {cell.store for cell in cells}
    for cell in cells:
        cell.unmitigated = cell.unmitigated if cell.unmitigated in own else None
    return cells


def _missing(cell: Path) -> str:
    """Why a cell can't be scored again; empty where it can."""
    if not Store(cell).is_done(ImageRecord):
        return "not all images are there; give the command of the run again to go on"
    spec = read_spec(cell)
    before_scores = (LocalizationRecord, MemorizationRecord, ImageRecord)
    if reason := missing_records(cell, spec, read_cell_prompts(cell, spec), before_scores):
        return reason
    with suppress(FileNotFoundError):  # said of each cell where it is read
        if changed := changed_images(cell, Store(cell).records(ImageRecord).values()):
            what = f"{counted(len(changed), 'image')} not as scored, such as {changed[0]}"
            return f"{what}; score their folder again, for a cell of its own, or put the former images back"
    return ""


def _with_unmitigated(cell: Cell, conf: Path | None) -> list[Cell]:
    """The cell, and before it the latest one of its run without mitigation, to be scored alike, if there is one."""
    pair([cell], cell.store.folder.parent)
    if cell.unmitigated is None:
        return [cell]
    other = reread(cell.unmitigated.folder, (), conf)
    other.config.settings.metrics = cell.config.settings.metrics
    return [other, cell]


def reread(folder: Path, overrides: Sequence[str], conf: Path | None) -> Cell:
    """A cell whose images are there, from what it wrote down, with overrides of :data:`nemo_bench.config.SCORING`.

    Raises:
        NemoBenchError: Its images are not all there, or an override is wrong.
    """
    if read_spec(folder).detector is not None:
        raise StoreError(f"{folder} was made by a detector and holds no images; name the cell of a method")
    if reason := _missing(folder):
        raise StoreError(f"{folder}: {reason}")
    return _reread(folder, overrides, conf, {})


def _reread(folder: Path, overrides: Sequence[str], conf: Path | None, known: dict[str, RunSettings]) -> Cell:
    """A cell of which nothing is missing; ``known`` is shared by those of the same overrides."""
    spec, store = read_spec(folder), Store(folder)
    prompts = read_cell_prompts(folder, spec)
    names = {"model": spec.model, "method": str(spec.method), "prompts": spec.prompts}
    config = rescore(overrides, names, read_settings(folder), conf, known)
    settings = config.settings
    settings.root, settings.name = str(folder.parent.parent), folder.parent.name
    if any(str(word).startswith("prompts.references=") for word in overrides):
        prompts = _with_references(folder, prompts, config)
    missing = [str(path) for p in prompts for path in (*p.references, *p.damaged_references) if not path.is_file()]
    if missing:
        msg = f"{folder}: {counted(len(missing), 'reference image')} gone, such as {missing[0]}"
        raise StoreError(f"{msg}; put them back, or name a folder of fetched ones with prompts.references")
    prompts = check_references(str(folder), prompts)
    images = {r.id: r.image for r in store.records(ImageRecord).values() if r.image is not None}
    if lost := [image for image in images.values() if not (folder / image).is_file()]:
        msg = f"{folder}: {counted(len(lost), 'image')} gone, such as {lost[0]}"
        raise StoreError(f"{msg}; {remake(folder)}")
    if cut := store.pending_ids(ImageRecord, images):
        msg = f"{folder}: {counted(len(cut), 'image')} cut or not as recorded, such as {images[cut[0]]}"
        raise StoreError(f"{msg}; {remake(folder)}")
    return Cell(config=config, prompts=prompts, spec=spec, store=store)


def _with_references(folder: Path, prompts: Sequence[Prompt], config: CellConfig) -> list[Prompt]:
    """The prompts with the reference images that they have now."""
    read = {prompt.id: prompt for prompt in read_listed(config.settings.prompts)}
    if any(prompt.id not in read or read[prompt.id].text != prompt.text for prompt in prompts):
        files = ", ".join(config.settings.prompts.files)
        raise StoreError(f"{folder} was made from other prompts than {files} holds now; leave prompts.references out")
    return [read[prompt.id] for prompt in prompts]


def _of_images(
    folder: Path,
    mapping: Path | None,
    overrides: Sequence[str],
    conf: Path | None,
    *,
    progress: bool,
) -> Cell:
    """A cell of images made by other code; its records point to them."""
    method = next((word.partition("=")[2] for word in overrides if word.startswith("method=")), folder.resolve().name)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", method):
        raise ConfigError(f"method={method}: expected letters, digits, '.', '_' and '-' only; give method=NAME")
    keys = {word.partition("=")[0] for word in overrides}
    is_named = "model" in keys
    if not (is_named or {"model.clip", "model.clip_pretrained"} <= keys) or not keys & {"prompts", "prompts.files"}:
        msg = f"{folder} holds no run, so its images are external: name their model, which decides the CLIP model"
        raise ConfigError(
            f"{msg} they are judged by, and their prompts: model=sd14 prompts.files=[list.csv]. Of another model name "
            "CLIP alone: model.clip=ViT-L-14 model.clip_pretrained=FILE"
        )
    config = one([*(word for word in overrides if not word.startswith("method=")), "method=none"], conf)
    settings = config.settings
    check_metrics([settings])
    prompts = read_listed(config.settings.prompts)
    found = mapped_images(mapping, folder, prompts) if mapping else named_images(folder, prompts)
    contents = check_images(folder, found, decode=is_main(), progress=progress and is_main())
    settings.method, title, citation = about_method(method, conf)
    counts = Counter(task.prompt.id for task, _ in found)
    settings.seeds = max(counts.values())
    _report_sizes(contents, len(prompts) - len(counts))
    model = config.names["model"] if is_named else OTHER_MODEL
    listed = config.names["prompts"] if "prompts" in keys else Path(settings.prompts.files[0]).stem
    config = CellConfig({"model": model, "method": method, "prompts": listed}, settings)
    digests = {
        "prompts": prompts_digest(prompts),
        "images": digest(sorted([task.id, has.sha256] for (task, _), has in zip(found, contents, strict=True))),
    }
    identity = {"model": {"name": model}, "method": settings.method, **digests}
    citations = {title: citation}
    spec = make_spec(config, "external", [ImageRecord, ScoreRecord], identity, citations, title=title, digests=digests)
    run = Path(settings.root) / settings.name
    cell = Cell(config=config, prompts=prompts, spec=spec, store=Store(run / spec.cell))
    if is_main():
        leases = Leases()
        with leases.owning(run):
            open_folder(run, [cell])
        cell.store.open(spec)
        with leases.owning(cell.store.folder):
            _record_images(cell.store, found, contents)
    return cell


def _report_sizes(contents: Sequence[ImageFile], without: int) -> None:
    """Says what is scored in another way than may be expected."""
    if not is_main():
        return
    if without:
        log.warning("%s without an image: counted, but without a part in any number", counted(without, "prompt"))
    sizes = Counter(content.size for content in contents if content.size).most_common()
    if len(sizes) > 1:
        shown = ", ".join(f"{count} of {size[0]}x{size[1]}" for size, count in sizes[:3])
        what = f"images of {len(sizes)} sizes ({shown})"
        log.warning("%s: metrics of pixels bring all to the first; they are counted", what)


def _record_images(store: Store, found: Sequence[tuple[Task, str]], contents: Sequence[ImageFile]) -> None:
    """Records external images where they are, and what is in them."""
    ids = [task.id for task, _ in found]
    write_json(store.folder / "layers.json", {})
    if store.is_done(ImageRecord) and not store.pending_ids(ImageRecord, ids):
        return
    store.forget(ImageRecord)
    store.writer(ImageRecord)(
        ImageRecord(
            id=task.id,
            prompt=task.prompt.id,
            seed=task.seed,
            image=str(Path(path).resolve()),
            sha256=content.sha256,
            size=content.size,
            written=Path(path).stat().st_mtime_ns,
        )
        for (task, path), content in zip(found, contents, strict=True)
    )
    store.finish(ImageRecord, ids)
