"""CSV files and TensorBoard, by Lightning's own loggers."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from nemo_bench.errors import TrackingError
from nemo_bench.tracking.content import Entry


def write_csv(entry: Entry) -> None:
    """Writes ``csv/metrics.csv``, the row of the leaderboard, and ``csv/hparams.yaml``, the config.

    Args:
        entry: The cell; what was written of it before is replaced.
    """
    shutil.rmtree(entry.folder / "csv", ignore_errors=True)
    logger = CSVLogger(entry.folder, name="csv", version="")
    logger.log_hyperparams(entry.config)
    logger.log_metrics({**entry.row}, step=0)
    logger.finalize("success")


def write_tensorboard(entry: Entry, thumbnails: int) -> None:
    """Writes ``tensorboard/``: the row as scalars, config and means as hyper-parameters, neurons, pictures of prompts.

    Args:
        entry: The cell; what was written of it before is replaced.
        thumbnails: Number of prompts shown with pictures.

    Raises:
        TrackingError: TensorBoard is not installed.
    """
    if not importlib.util.find_spec("tensorboard"):
        raise TrackingError("TensorBoard is not installed: pip install 'nemo-bench[tensorboard]'")
    shutil.rmtree(entry.folder / "tensorboard", ignore_errors=True)
    logger = TensorBoardLogger(entry.folder, name="tensorboard", version="")
    logger.log_metrics({key: value for key, value in entry.row.items() if key not in entry.means}, step=0)
    logger.log_hyperparams(entry.config, entry.means, step=0)
    writer, cell = logger.experiment, entry.cell
    writer.add_histogram("neurons per prompt", np.array([cell.outcomes[p.id].neurons.count for p in cell.prompts]), 0)
    for prompt in cell.prompts[:thumbnails]:
        writer.add_text(f"{prompt.id}/text", prompt.text, 0)
        for name, picture in entry.pictures(prompt).items():
            writer.add_image(f"{prompt.id}/{name}", np.asarray(picture), 0, dataformats="HWC")
    logger.finalize("success")
