"""What a training shows while it runs: time left, losses on fixed pictures, and sample sheets."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from nemo_bench.planted.truth import GUIDANCE, STEPS

log = logging.getLogger(__name__)

FIRST, LONGEST = 10.0, 600.0
"""Seconds before the first line, and at most between two: each takes as long as all before it."""
SHEET = 1_000
"""Steps between two sample sheets."""


class TimeLeft(L.Callback):
    """A line now and then where there is no terminal for Lightning's bar: steps, seconds a step and time left."""

    def __init__(self, name: str) -> None:
        self.name = name

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._first, self._next = time.monotonic(), trainer.global_step, FIRST

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        seconds, done = time.monotonic() - self._start, trainer.global_step - self._first
        if sys.stderr.isatty() or seconds < self._next:
            return
        each = seconds / done
        left = timedelta(seconds=round(each * (trainer.max_steps - trainer.global_step)))
        clock, step = time.strftime("%H:%M:%S"), f"{trainer.global_step:,} of {trainer.max_steps:,} steps"
        log.info("%s training %s: %s, %.1f s each, %s left", clock, self.name, step, each, left)
        self._next = seconds + min(seconds, LONGEST)


class Sampler:
    """Draws a sheet of the same captions and noise every :data:`SHEET` steps.

    Sheets are files in a folder, and go to TensorBoard and Weights & Biases where those log.

    Args:
        pipeline: Shares the network that is trained.
        network: That network.
        texts: Captions of the sheet, one image each.
        folder: Folder of the sheets, ``step-NNNNN.png``.
        options: Further arguments of the pipeline.
    """

    def __init__(
        self, pipeline: Any, network: nn.Module, texts: Sequence[str], folder: Path, options: Mapping[str, Any]
    ) -> None:
        self.pipeline, self.network, self.texts, self.folder = pipeline, network, list(texts), folder
        self.options = options
        pipeline.set_progress_bar_config(disable=True)

    def __call__(self, step: int, loggers: Sequence[Any]) -> None:
        """Draws the sheet of a step, if there is one."""
        if step % SHEET:
            return
        noise = [torch.Generator().manual_seed(row) for row in range(len(self.texts))]
        self.pipeline.to(next(self.network.parameters()).device)
        images = self.pipeline(
            self.texts,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=noise,
            output_type="np",
            **self.options,
        ).images
        rows = [np.concatenate(list(row), 1) for row in np.array_split((images * 255).round().astype(np.uint8), 2)]
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet = np.concatenate(rows)
        Image.fromarray(sheet).save(self.folder / f"step-{step:05d}.png")
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", sheet, step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("samples", [Image.fromarray(sheet)], step=None, caption=["; ".join(self.texts)])


class Examination:
    """Losses of the denoiser on fixed pictures, timesteps and noise, and a sample sheet.

    Args:
        error: The loss of latents and text embeddings, by timesteps and noise.
        sets: Latents and embeddings by name, N rows each.
        timesteps: Number of timesteps of the model.
        sampler: Draws the sheets; None for no sheets.
    """

    def __init__(
        self,
        error: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        sets: Mapping[str, tuple[Tensor, Tensor]],
        timesteps: int,
        sampler: Sampler | None = None,
    ) -> None:
        self.error, self.sets, self.timesteps, self.sampler = error, sets, timesteps, sampler

    @torch.no_grad()
    def __call__(self, module: L.LightningModule) -> dict[str, Tensor]:
        """The losses by name."""
        if self.sampler:
            self.sampler(module.global_step, module.loggers)
        return {name: self._error(*pair, module.device) for name, pair in self.sets.items()}

    def _error(self, latents: Tensor, text: Tensor, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(latents.shape, generator=generator)
        # Evenly spread over the rows in random order, so that few of them stand for all timesteps.
        places = torch.randperm(len(latents), generator=generator)
        t = ((places + 0.5) / len(latents) * self.timesteps).long()
        return self.error(*(part.to(device) for part in (latents, text, t, noise)))


def close(loggers: Sequence[Any]) -> None:
    """Ends the runs of Weights & Biases, so that all of them is written."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
