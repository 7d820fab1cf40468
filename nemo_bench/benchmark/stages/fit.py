"""Weights of a network, fitted before anything is generated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader
from typing_extensions import override

from nemo_bench.benchmark.progress import ProgressReport
from nemo_bench.methods import Fit
from nemo_bench.records.io import replacing, write_json
from nemo_bench.records.schema import Cost

FITTED = "weights.safetensors"
"""Name of the file of what a fit changed."""
COST = "fit.json"
"""Name of the file of what a fit took."""
EVERY = 5
"""Updates between two checkpoints."""


class WeightFit(L.LightningModule):
    """A fit as Lightning runs it, a checkpoint every :data:`EVERY` updates.

    Args:
        fit: The fit.
        passes: UNet passes of one sample so far, of the fit in this process.
    """

    def __init__(self, fit: Fit, passes: Callable[[], int]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = fit.network
        self.updates = fit
        self._passes = passes
        self._begun = time.perf_counter()
        self._before = {"passes": 0, "seconds": 0.0}  # of starts before this one

    @property
    def cost(self) -> Cost:
        """What it took so far, over all starts."""
        seconds = self._before["seconds"] + time.perf_counter() - self._begun
        return Cost(row_passes=self._before["passes"] + self._passes(), seconds=round(seconds, 4))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        cost = self.cost
        checkpoint["cost"] = {"passes": cost.row_passes, "seconds": cost.seconds}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._before = checkpoint.get("cost", self._before)

    @override
    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(EVERY), batch_size=None)  # type: ignore[arg-type] # a range is a sequence

    @override
    def configure_optimizers(self) -> AdamW:
        return AdamW(self.network.parameters(), lr=self.updates.rate)

    @override
    def training_step(self, batch: int, batch_idx: int) -> None:
        gradients = self.updates.gradients(self.global_step)
        for weight, gradient in zip(self.network.parameters(), gradients, strict=True):
            weight.grad = gradient
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr] # there is one
        optimizer.zero_grad()  # type: ignore[union-attr]


class FitProgress(L.Callback):
    """Shows how many updates of a fit are done, and the time left.

    Args:
        progress: What shows it.
        name: Name of no other stage of the run.
        label: The method.
        updates: Number of updates.
    """

    def __init__(self, progress: ProgressReport, name: str, label: str, updates: int) -> None:
        self.progress = progress
        self.name = name
        self.label = label
        self.total = updates

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.progress.begin(self.name, "fit", self.label, trainer.global_step, self.total)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        self.progress.add([], 1, is_main=True)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.progress.end()


def fit_weights(
    fit: Fit,
    folder: Path,
    device: torch.device,
    callbacks: Sequence[L.Callback] = (),
    passes: Callable[[], int] = lambda: 0,
) -> None:
    """Fits weights, from the last checkpoint in a folder if there is one, and saves there what they changed by.

    What it took is saved beside them, in :data:`COST`.

    The network itself is as it was afterwards. Nothing is done where the file is there already.

    Args:
        fit: The fit.
        folder: For the checkpoint, and :data:`FITTED`.
        device: Where to compute.
        callbacks: Of Lightning's trainer.
        passes: UNet passes of one sample so far, of the fit in this process.
    """
    if (folder / FITTED).is_file():
        return
    network = fit.network
    original = {name: weight.detach().cpu().clone() for name, weight in network.named_parameters()}
    last = folder / "last.ckpt"
    saver = ModelCheckpoint(folder, filename=last.stem, every_n_epochs=1, enable_version_counter=False)
    try:
        network.requires_grad_(True)
        trainer = L.Trainer(
            max_steps=fit.updates,
            max_epochs=-1,
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            callbacks=[saver, *callbacks],
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            reload_dataloaders_every_n_epochs=1,
            num_sanity_val_steps=0,
        )
        module = WeightFit(fit, passes)
        trainer.fit(module, ckpt_path=last if last.is_file() else None, weights_only=True)
        changed = {name: _difference(weight, original[name]) for name, weight in network.named_parameters()}
        write_json(folder / COST, module.cost)
        with replacing(folder / FITTED) as part:
            save_file(changed, part)
        last.unlink(missing_ok=True)
    finally:
        network.requires_grad_(False)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                weight.data.copy_(original[name])
                weight.grad = None
        network.eval().to(device)


def _difference(weight: Tensor, original: Tensor) -> Tensor:
    return (weight.detach().cpu() - original).contiguous()
