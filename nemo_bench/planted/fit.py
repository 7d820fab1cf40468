"""One fit of a training: batches drawn at random, checkpoints, and what is logged."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from nemo_bench.planted.watch import TimeLeft

log = logging.getLogger(__name__)

EPOCH = 200
"""Steps between two checkpoints."""
Draw = Callable[[np.random.Generator], Any]
Loss = Callable[[Any], dict[str, Tensor]]


class Fit(L.LightningModule):
    """One fit: AdamW with warm-up and cosine decay over batches drawn at random.

    ``loss`` gives the ``loss`` of a batch, and other values to log; ``lr`` is the highest learning rate; ``examine``
    gives figures of the averaged network, at every checkpoint.
    """

    def __init__(
        self,
        network: nn.Module,
        draw: Draw,
        loss: Loss,
        *,
        name: str,
        steps: int,
        lr: float,
        seed: int,
        examine: Callable[[L.LightningModule], dict[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.examine = examine
        self.network = network
        self.draw = draw
        self.loss = loss
        self.steps = steps
        self.lr = lr
        self.seed = seed

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        steps: Any = range(self.global_step, self.global_step + EPOCH)
        return DataLoader(steps, batch_size=None, collate_fn=self.batch)

    def batch(self, step: Any) -> Any:
        """The batch of a step; it depends on the seed and the step alone."""
        return self.draw(np.random.default_rng([self.seed, step]))

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Seeds the noise of the step, so that a resumed fit continues as if it had not been interrupted.
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values = self.loss(batch)
        self.log_dict({f"{self.name}/{key}": value for key, value in values.items()}, prog_bar=True)
        return values["loss"]

    @override
    def val_dataloader(self) -> list[int]:
        """One batch, whose content ``examine`` does not need."""
        return [0]

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.examine
        self.log_dict({f"{self.name}/{key}": value for key, value in self.examine(self).items()}, batch_size=1)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        warm_up = min(1.0, (step + 1) / min(150, self.steps // 10 + 1))
        decay = 0.5 * (1 + np.cos(np.pi * min(1.0, step / self.steps)))
        return float(warm_up * (0.02 + 0.98 * decay))


@dataclass(frozen=True)
class Fits:
    """Where the fits of a training keep their files, run and log."""

    folder: Path
    accelerator: str  #: Lightning's name of the device kind.
    loggers: Sequence[Logger]

    def run(
        self,
        fit: Fit,
        part: nn.Module,
        *callbacks: Callback,
        file: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Trains a network unless the weights of its part that is kept are in their file, and loads them into that.

        A fit starts from the last checkpoint in the folder of its name, if there is one.
        """
        file = file or self.folder / f"{fit.name}.safetensors"
        if not file.exists():
            last = self.folder / fit.name / "last.ckpt"
            saver = ModelCheckpoint(last.parent, filename=last.stem, every_n_epochs=1, enable_version_counter=False)
            trainer = L.Trainer(
                max_steps=fit.steps,
                max_epochs=-1,
                accelerator=self.accelerator,
                devices=1,
                gradient_clip_val=1.0,
                reload_dataloaders_every_n_epochs=1,
                callbacks=[saver, TimeLeft(fit.name), *callbacks],
                logger=list(self.loggers),
                enable_model_summary=False,
                enable_progress_bar=sys.stderr.isatty(),
                log_every_n_steps=10,
                num_sanity_val_steps=0,
                limit_val_batches=1.0 if fit.examine else 0,
            )
            log.info("training %s: %d steps", fit.name, fit.steps)
            trainer.fit(fit, ckpt_path=last if last.exists() else None, weights_only=True)
            save_tensors(file, part.to(dtype).state_dict())
        part.load_state_dict(load_file(file))
        part.eval().requires_grad_(False)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors under a temporary name and renames the file, so that an existing file is complete."""
    part = path.with_suffix(".part")
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, part)
    part.replace(path)
