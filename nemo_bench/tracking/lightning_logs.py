"""CSV files and TensorBoard, by Lightning's own loggers."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from nemo_bench.config import LoggerSettings
from nemo_bench.errors import TrackingError
from nemo_bench.records.io import digest
from nemo_bench.tracking.logged import BegunCell, LoggedCell

log = logging.getLogger(__name__)


def log_csv(cells: Sequence[LoggedCell], settings: LoggerSettings, again: bool) -> None:
    """Writes :class:`CsvLog` of finished cells anew: the row of the leaderboard alone."""
    _log_anew("csv", CsvLog(settings), cells)


def log_tensorboard(cells: Sequence[LoggedCell], settings: LoggerSettings, again: bool) -> None:
    """Writes :class:`TensorBoardLog` of finished cells anew, without live figures.

    Raises:
        TrackingError: TensorBoard is not installed.
    """
    _log_anew("tensorboard", TensorBoardLog(settings), cells)


def _log_anew(name: str, logger: CsvLog | TensorBoardLog, cells: Sequence[LoggedCell]) -> None:
    for cell in cells:
        shutil.rmtree(cell.folder / name, ignore_errors=True)
        logger.begin(cell.begun)
        logger.finish(cell, 0)
    logger.close(cells[0].folder.parent)


class CsvLog:
    """``csv/metrics.csv``, live figures and then the row of the leaderboard, and ``csv/hparams.yaml``, the config.

    See :class:`nemo_bench.tracking.live.CellLog` for its methods.
    """

    def __init__(self, settings: LoggerSettings, trial: str | None = None) -> None:
        self._logger: CSVLogger

    def begin(self, cell: BegunCell) -> None:
        """Goes on with the rows that are there, which Lightning's logger would delete."""
        file = cell.folder / "csv" / "metrics.csv"
        rows: list[dict[str, str]] = []
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as opened:
                rows = [row for row in csv.DictReader(opened) if (row.get("step") or "").isdigit()]
        shutil.rmtree(file.parent, ignore_errors=True)
        self._logger = CSVLogger(cell.folder, name="csv", version="")
        self._logger.log_hyperparams(cell.config)
        for row in rows:
            self.log({key: value for key, value in row.items() if key != "step" and value}, int(row["step"]))

    def log(self, figures: Mapping[str, float | str], step: int) -> None:
        """Adds a row."""
        self._logger.log_metrics(dict(figures), step)  # type: ignore[arg-type] # words are written as well
        self._logger.save()

    def show(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        """There are no pictures in a table."""

    def finish(self, cell: LoggedCell, step: int) -> None:
        """Adds the row of the leaderboard."""
        self.log(cell.row, step)

    def conclude(self, row: Mapping[str, float], step: int) -> None:
        """Adds the numbers."""
        self.log(row, step)

    def stop(self) -> None:
        """All rows are written."""

    def close(self, folder: Path) -> None:
        """Says where the files are."""
        log.info("CSV: %s/*/csv/metrics.csv", folder)


class TensorBoardLog:
    """``tensorboard/``: live figures; at the end the row as scalars, hyper-parameters, neurons, pictures of prompts.

    See :class:`nemo_bench.tracking.live.CellLog` for its methods.

    Raises:
        TrackingError: TensorBoard is not installed.
    """

    def __init__(self, settings: LoggerSettings, trial: str | None = None) -> None:
        _require_tensorboard()
        self.thumbnails = settings.thumbnails
        self._logger: TensorBoardLogger

    def begin(self, cell: BegunCell) -> None:
        """Shows the config as text; as hyper-parameters it comes with the results."""
        self._logger = TensorBoardLogger(cell.folder, name="tensorboard", version="")
        self._logger.experiment.add_text("config", f"```json\n{json.dumps(cell.config, indent=2)}\n```", 0)
        self._logger.experiment.flush()

    def log(self, figures: Mapping[str, float | str], step: int) -> None:
        """Numbers are scalars, words are texts."""
        for key, value in figures.items():
            if isinstance(value, str):
                self._logger.experiment.add_text(key, value, step)
            else:
                self._logger.experiment.add_scalar(key, value, step)
        self._logger.experiment.flush()

    def show(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        """One sheet of all pictures, which are equal in size."""
        sheet = np.stack([np.asarray(picture) for picture in pictures.values()])
        self._logger.experiment.add_images("live/samples", sheet, step, dataformats="NHWC")

    def finish(self, cell: LoggedCell, step: int) -> None:
        """Logs what there is of a finished cell."""
        logger, results = self._logger, cell.results
        logger.log_metrics({key: value for key, value in cell.row.items() if key not in cell.means}, step)
        logger.log_hyperparams(cell.begun.config, cell.means, step)
        writer = logger.experiment
        counts = [results.outcomes[prompt.id].neurons.count for prompt in results.prompts]
        writer.add_histogram("neurons per prompt", np.array(counts), step)
        for prompt in results.prompts[: self.thumbnails]:
            writer.add_text(f"{prompt.id}/text", prompt.text, step)
            for name, picture in cell.pictures(prompt).items():
                writer.add_image(f"{prompt.id}/{name}", np.asarray(picture), step, dataformats="HWC")
        logger.finalize("success")

    def conclude(self, row: Mapping[str, float], step: int) -> None:
        """Adds the numbers as scalars."""
        self.log(row, step)
        self._logger.finalize("success")

    def stop(self) -> None:
        """Closes the file."""
        self._logger.finalize("stopped")

    def close(self, folder: Path) -> None:
        """Says how to look at it."""
        log.info("TensorBoard: tensorboard --logdir %s", folder)


def training_csv(settings: LoggerSettings, folder: Path, config: Mapping[str, Any]) -> Logger:
    """Lightning's CSV logger of a training, in a new folder: it would delete the rows before a resume."""
    starts = sum(1 for _ in (folder / "csv").glob("start-*"))
    return CSVLogger(folder, name="csv", version=f"start-{starts + 1}")


def training_tensorboard(settings: LoggerSettings, folder: Path, config: Mapping[str, Any]) -> Logger:
    """Lightning's TensorBoard logger of a training.

    Raises:
        TrackingError: TensorBoard is not installed.
    """
    _require_tensorboard()
    return TensorBoardLogger(folder, name="tensorboard", version="")


def training_wandb(settings: LoggerSettings, folder: Path, config: Mapping[str, Any]) -> Logger:
    """Lightning's W&B logger of a training, whose run goes on when the training is resumed.

    Raises:
        TrackingError: The run is to be online, and there is no key.
    """
    from nemo_bench.tracking.wandb_runs import mode_of

    mode, why = mode_of(settings.mode)
    log.info("W&B: %s, %s", mode, why)
    return WandbLogger(
        name=folder.name[:64],
        save_dir=folder,
        id=digest([str(folder.resolve()), dict(config)]),
        resume="allow",
        project=settings.project,
        entity=settings.entity,
        mode=mode,
        job_type="training",
        settings={"console": "off", "silent": True},
    )


def _require_tensorboard() -> None:
    if not importlib.util.find_spec("tensorboard"):
        raise TrackingError("TensorBoard is not installed: pip install 'nemo-bench[tensorboard]'")
