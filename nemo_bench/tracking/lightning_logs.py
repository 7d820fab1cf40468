"""CSV files and TensorBoard, by Lightning's own loggers; earlier logs of a cell are replaced."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Sequence

import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from nemo_bench.config import LoggerSettings
from nemo_bench.errors import TrackingError
from nemo_bench.tracking.logged import LoggedCell

log = logging.getLogger(__name__)


def log_csv(cells: Sequence[LoggedCell], settings: LoggerSettings, again: bool) -> None:
    """Writes ``csv/metrics.csv``, the row of the leaderboard, and ``csv/hparams.yaml``, the config."""
    for cell in cells:
        shutil.rmtree(cell.folder / "csv", ignore_errors=True)
        logger = CSVLogger(cell.folder, name="csv", version="")
        logger.log_hyperparams(cell.config)
        logger.log_metrics({**cell.row}, step=0)
        logger.finalize("success")
    log.info("CSV: %s/*/csv/metrics.csv", cells[0].folder.parent)


def log_tensorboard(cells: Sequence[LoggedCell], settings: LoggerSettings, again: bool) -> None:
    """Writes ``tensorboard/``: the row as scalars, config and means as hyper-parameters, neurons, pictures of prompts.

    Raises:
        TrackingError: TensorBoard is not installed.
    """
    if not importlib.util.find_spec("tensorboard"):
        raise TrackingError("TensorBoard is not installed: pip install 'nemo-bench[tensorboard]'")
    for cell in cells:
        shutil.rmtree(cell.folder / "tensorboard", ignore_errors=True)
        logger = TensorBoardLogger(cell.folder, name="tensorboard", version="")
        logger.log_metrics({key: value for key, value in cell.row.items() if key not in cell.means}, step=0)
        logger.log_hyperparams(cell.config, cell.means, step=0)
        writer, results = logger.experiment, cell.results
        counts = [results.outcomes[prompt.id].neurons.count for prompt in results.prompts]
        writer.add_histogram("neurons per prompt", np.array(counts), 0)
        for prompt in results.prompts[: settings.thumbnails]:
            writer.add_text(f"{prompt.id}/text", prompt.text, 0)
            for name, picture in cell.pictures(prompt).items():
                writer.add_image(f"{prompt.id}/{name}", np.asarray(picture), 0, dataformats="HWC")
        logger.finalize("success")
    log.info("TensorBoard: tensorboard --logdir %s", cells[0].folder.parent)
