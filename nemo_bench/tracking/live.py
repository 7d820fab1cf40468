"""Live tracking: what a run does, from its first minute, in every logger that is asked for.

Each logger has a thread of its own, which the run never waits for: what it can't take is left out.
"""

from __future__ import annotations

import copy
import json
import logging
import pkgutil
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from nemo_bench.config import LoggerSettings
from nemo_bench.errors import first_line
from nemo_bench.records.schema import DetectionRecord, ImageRecord, Progress, ScoreRecord
from nemo_bench.records.store import read_cell_prompts, thumbnail
from nemo_bench.tracking import sweep_trial
from nemo_bench.tracking.logged import BegunCell, LoggedCell, detection_row, next_step

LOGGERS = {
    "wandb": "wandb_runs:WandbLog",
    "csv": "lightning_logs:CsvLog",
    "tensorboard": "lightning_logs:TensorBoardLog",
}
"""A :class:`CellLog` by its name in the settings; imported when needed."""
SHORTEST, LONGEST = 2.0, 60.0
"""Seconds between two figures of a stage: a hundredth of the cell's time so far, within these."""
PICTURES = 16
"""Pictures of the first sample sheet."""
STOPPED = 10.0
"""Most seconds that a run which is stopped waits for its loggers."""
_WAITING = 32
_LOOKED_AT = (ImageRecord.stage, ScoreRecord.stage, DetectionRecord.stage)
_BOX = (256, 256)

log = logging.getLogger(__name__)


class CellLog(Protocol):
    """What a logger does; it is made once a run, shows one cell after the other, and is copied where several are open.

    Args:
        settings: Settings of all loggers.
        trial: The only cell that a W&B sweep agent waits for; None without an agent.
    """

    def __init__(self, settings: LoggerSettings, trial: str | None = None) -> None: ...

    def begin(self, cell: BegunCell) -> None:
        """Begins the log of a cell, or goes on with it."""

    def log(self, figures: Mapping[str, float | str], step: int) -> None:
        """Adds figures; steps grow."""

    def show(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        """Adds a sheet of pictures, each with its caption."""

    def finish(self, cell: LoggedCell, step: int) -> None:
        """Adds the results of the cell, and ends its log."""

    def conclude(self, row: Mapping[str, float], step: int) -> None:
        """Adds the numbers of a detector that is finished, and ends its log."""

    def stop(self) -> None:
        """Ends the log of a cell that is not finished."""

    def close(self, folder: Path) -> None:
        """Says where the logs of a run are, given its folder."""


class Live:
    """The live logs of a run's cells, one after the other, or those together whose passes are shared.

    At the end it waits for what loggers still have to do.

    None of it raises an error: whatever fails is a line of the log, and ``nemo-bench track`` tries again.

    Args:
        settings: Which loggers, and their settings.
        methods: Name of the method, or detector, by name of the cell.

    Raises:
        ConfigError: More than one cell could be the trial of a W&B sweep agent.
    """

    def __init__(self, settings: LoggerSettings, methods: Mapping[str, str]) -> None:
        trial = sweep_trial(methods) if settings.wandb else None
        self.settings = settings
        waiting = max(_WAITING, 4 * len(methods))
        self._outlets = [_Outlet(name, settings, trial, waiting) for name in LOGGERS if getattr(settings, name)]
        self._records: list[_Records] = []
        self._stage = ""
        self._begun = self._due = 0.0

    def __enter__(self) -> Live:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        patience = self.settings.timeout if kind is None else min(STOPPED, self.settings.timeout)
        for outlet in self._outlets:
            outlet.close(patience)

    def begin(self, *folders: Path) -> None:
        """Begins with some cells, given their folders, once their starts are noted there."""
        if not self._outlets:
            return
        self.give_up()
        self._stage = ""
        self._begun = time.monotonic()
        for folder in folders:
            with _harmless():
                cell = BegunCell.read(folder)
                self._records.append(_Records(cell))
                for outlet in self._outlets:
                    outlet.put("begin", cell)
        self._log({"stage": "begin"})

    def note(self, progress: Progress) -> None:
        """Logs how far the stage of the cells is, if it is new, done, or was not logged for some time."""
        now = time.monotonic()
        is_due = progress.stage != self._stage or progress.done >= progress.total or now >= self._due
        if not self._records or not is_due:
            return
        self._stage = progress.stage
        self._due = now + min(LONGEST, max(SHORTEST, (now - self._begun) / 100))
        self._log(_rates(progress))

    def end(self) -> None:
        """Logs the results of the cells, which are finished by now, and ends their logs."""
        ended, self._records = self._records, []
        for records in ended:
            with _harmless():
                if records.is_memorized is not None:
                    row = detection_row(records.folder)
                    self._put("conclude", records.folder, row, next_step(records.folder, records.count))
                    continue
                cell = LoggedCell.read(records.folder)
                _ = cell.digest  # reads records, which is not for other threads
                self._put("finish", records.folder, cell, next_step(records.folder, records.count))

    def give_up(self) -> None:
        """Ends the logs of cells that failed."""
        given_up, self._records = self._records, []
        for records in given_up:
            self._put("stop", records.folder)

    def _log(self, figures: Mapping[str, float | str]) -> None:
        """Logs figures of all cells, and with them what the records of each say."""
        for records in self._records:
            with _harmless():
                shown = {f"live/{key}": value for key, value in {**figures, **records.figures()}.items()}
                self._tell("log", records.folder, shown, next_step(records.folder, records.count))
                if self.settings.thumbnails and (pictures := records.take_samples()):
                    self._tell("show", records.folder, pictures, next_step(records.folder, records.count))

    def _put(self, *message: Any) -> None:
        for outlet in self._outlets:
            outlet.put(*message)

    def _tell(self, *message: Any) -> None:
        for outlet in self._outlets:
            outlet.offer(*message)


def _rates(progress: Progress) -> dict[str, float | str]:
    figures: dict[str, float | str] = {
        "stage": progress.stage,
        "done": progress.done,
        "total": progress.total,
        "records_per_second": progress.rate,
    }
    if progress.stage == ImageRecord.stage:
        figures["images_per_second"] = progress.rate
    if progress.row_passes and progress.seconds:
        figures["row_passes_per_second"] = progress.row_passes / progress.seconds
    if progress.left is not None:
        figures["seconds_left"] = progress.left
    return figures


@contextmanager
def _harmless() -> Iterator[None]:
    """Makes whatever fails a line of the log: tracking must not stop a run."""
    try:
        yield
    except Exception as error:
        log.warning("live tracking: %s", first_line(error))


class _Records:
    """What the records of a cell say so far, of all processes; each look reads only what was written since the last.

    Args:
        cell: The cell.

    Attributes:
        folder: Its folder.
        is_memorized: Of a detector, whether prompts are memorized, by id; None of any other cell.
    """

    def __init__(self, cell: BegunCell) -> None:
        self.folder = cell.folder
        self.is_memorized: dict[str, bool] | None = None
        if cell.spec.task == "detect":
            prompts = read_cell_prompts(cell.folder, cell.spec)
            self.is_memorized = {prompt.id: bool(prompt.kind) for prompt in prompts}
        self._clear()
        self._samples: dict[str, Path] | None = {}

    def _clear(self) -> None:
        self.count = 0
        self._failed = 0
        self._sums: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()
        self._read: dict[Path, tuple[bytes, int]] = {}
        self._detected: dict[bool, list[float]] = {True: [], False: []}

    def figures(self) -> dict[str, float]:
        """Records, those that failed, and over the scores so far the mean of every metric, of a detector the AUC."""
        files = sorted((self.folder / "records").glob("*.jsonl"))
        if any(not self._is_same(file) for file in self._read):  # scores were forgotten, to be computed again
            self._clear()
        for file in files:
            self._read_on(file)
        means = {f"mean/{key}": self._sums[key] / number for key, number in self._numbers.items()}
        if self.is_memorized is None:
            return {"records": self.count, "failed_images": self._failed, **means}
        figures = {"records": self.count, "failed_prompts": self._failed, **means}
        memorized, other = self._detected[True], self._detected[False]
        return {**figures, "auc": auc(memorized, other)} if memorized and other else figures

    def take_samples(self) -> dict[str, Path]:
        """Files of the first pictures by caption, once there are some; none afterwards."""
        samples = self._samples or {}
        if samples:
            self._samples = None
        return samples

    def _is_same(self, file: Path) -> bool:
        """Whether a file goes on as it was read; another one may have its name and be longer."""
        first, _ = self._read[file]
        try:
            with file.open("rb") as opened:
                return opened.readline() == first
        except FileNotFoundError:
            return False

    def _read_on(self, file: Path) -> None:
        first, place = self._read.get(file, (b"", 0))
        with file.open("rb") as opened:
            opened.seek(place)
            for line in opened:
                if not line.endswith(b"\n"):
                    break
                first = first or line
                place += len(line)
                self.count += 1
                if file.name.partition(".")[0] in _LOOKED_AT:
                    with suppress(ValueError):  # a damaged line, which whoever needs its record says
                        self._add(json.loads(line))
        if place:
            self._read[file] = (first, place)

    def _add(self, record: Mapping[str, Any]) -> None:
        scores = record.get("scores") or {}
        if self.is_memorized is not None and record.get("score") is not None:
            scores = {"score": record["score"]}
            self._detected[self.is_memorized[record["prompt"]]].append(record["score"])
        self._sums.update(scores)
        self._numbers.update(scores.keys())
        is_counted = "seed" in record or self.is_memorized is not None
        if is_counted and isinstance(record.get("failed"), str):  # of scores, it is by metric
            self._failed += 1
        if record.get("image") and self._samples is not None and len(self._samples) < PICTURES:
            caption = f"{record['prompt']}, seed {record['seed']}" if "seed" in record else record["prompt"]
            self._samples[caption] = self.folder / record["image"]


def auc(memorized: Sequence[float], other: Sequence[float]) -> float:
    """Share of pairs of a memorized and another prompt in which the former has the larger score; equal ones count half.

    Both are of at least one prompt.
    """
    ordered = np.sort(other)
    below = np.searchsorted(ordered, memorized, "left") + np.searchsorted(ordered, memorized, "right")
    return float(below.mean()) / 2 / len(ordered)


class _Outlet:
    """A logger in a thread of its own, which takes what it is given in turn.

    Args:
        name: Name of the logger.
        settings: Settings of all loggers.
        trial: See :class:`CellLog`.
        waiting: Messages that may wait.
    """

    def __init__(self, name: str, settings: LoggerSettings, trial: str | None, waiting: int) -> None:
        self.name = name
        self.settings = settings
        self.trial = trial
        self._messages: queue.Queue[tuple[Any, ...]] = queue.Queue(waiting)
        self._thread: threading.Thread | None = None
        self._logger: CellLog | None = None
        self._open: dict[Path, CellLog] = {}
        self._cell: BegunCell | None = None
        self._is_closing = False
        self._is_given_up = False
        self._succeeded = 0.0
        self._said: set[str] = set()

    def offer(self, *message: Any) -> None:
        """Gives a message that may be left out; half of the queue is kept for those that may not."""
        if self._messages.qsize() < self._messages.maxsize // 2:
            self.put(*message)

    def put(self, *message: Any) -> None:
        """Gives a message: name of a method, and what it is called with."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"{self.name} logger", daemon=True)
            self._thread.start()
        try:
            self._messages.put_nowait(message)
        except queue.Full:
            self._warn("it is behind by several cells")

    def close(self, patience: float) -> None:
        """Waits until all is done, and no longer than ``patience`` seconds for each thing."""
        if self._thread is None:
            return
        self._is_closing = True
        self._succeeded = time.monotonic()
        with suppress(queue.Full):
            self._messages.put(("close",), timeout=patience)
        while self._thread.is_alive() and time.monotonic() < self._succeeded + patience:
            self._thread.join(0.1)
        if self._thread.is_alive():
            self._warn(f"it did not end within {patience:g} s")
            self._is_given_up = True

    def _work(self) -> None:
        while True:
            name, *values = self._messages.get()
            try:
                getattr(self, f"_{name}")(*values)
            except Exception as error:  # whatever a logger raises
                self._warn(" ".join(str(error).split()) or type(error).__name__)
                if self._is_closing:
                    return
            else:
                self._succeeded = time.monotonic()
            if name == "close":
                return

    def _begin(self, cell: BegunCell) -> None:
        self._cell = cell
        if self._logger is None:
            kind = pkgutil.resolve_name(f"nemo_bench.tracking.{LOGGERS[self.name]}")
            self._logger = kind(self.settings, self.trial)
        logger = copy.copy(self._logger) if self._open else self._logger
        logger.begin(cell)
        self._open[cell.folder] = logger

    def _log(self, folder: Path, figures: Mapping[str, float | str], step: int) -> None:
        if logger := self._open.get(folder):
            logger.log(figures, step)

    def _show(self, folder: Path, files: Mapping[str, Path], step: int) -> None:
        made = {caption: thumbnail(file, _BOX) for caption, file in files.items()}
        pictures = {caption: picture[0] for caption, picture in made.items() if picture}
        if pictures and (logger := self._open.get(folder)):
            logger.show(pictures, step)

    def _finish(self, folder: Path, cell: LoggedCell, step: int) -> None:
        if logger := self._open.pop(folder, None):
            logger.finish(cell, step)

    def _conclude(self, folder: Path, row: Mapping[str, float], step: int) -> None:
        if logger := self._open.pop(folder, None):
            logger.conclude(row, step)

    def _stop(self, folder: Path) -> None:
        if logger := self._open.pop(folder, None):
            logger.stop()

    def _close(self) -> None:
        for folder in [*self._open]:
            self._stop(folder)
        if self._logger and self._cell:
            self._logger.close(self._cell.folder.parent)

    def _warn(self, why: str) -> None:
        """Says once what failed; nothing any more once nobody waits for it."""
        if why in self._said or self._is_given_up:
            return
        self._said.add(why)
        hint = ""
        if self._cell:
            hint = "; the results are untouched"
            if self._cell.spec.task != "detect":
                hint += f", nemo-bench track {self._cell.folder.parent} tries again"
        log.warning("%s failed: %s%s", self.name, why, hint)
