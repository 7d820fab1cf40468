"""What all stages share: a predict loop that writes records and returns nothing."""

from __future__ import annotations

import re
import resource
import sys
import time
from abc import ABC, abstractmethod
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from nemo_bench.records.data import Prompt, Record
from nemo_bench.records.io import digest
from nemo_bench.records.store import Store

UNLOCALIZED = "its prompt has no neurons: localizing it failed"
"""Why there are no images of a prompt."""
CHUNK = 256
"""Prompts or pictures that make one record; a constant, so that sums are rounded alike in every run."""


class Stage(L.LightningModule, ABC):
    """A predict loop over tasks; each batch ends with its records on disk.

    Args:
        store: Where records go.
        name: Name of the stage.
    """

    def __init__(self, store: Store, name: str) -> None:
        super().__init__()
        self.store, self.name = store, name
        self.write = store.writer(name)

    def predict_step(self, tasks: Any, batch_idx: int) -> None:
        """Handles one batch and writes its records."""
        start = time.perf_counter()
        records = self.handle(tasks)
        each = (time.perf_counter() - start) / len(tasks)
        measured = {"seconds": round(each, 4), "peak_memory_mb": peak_memory(self.device), "device": self.device.type}
        for record in records:
            record["cost"] = {**record.get("cost", {}), **measured}
        self.write(records)

    def on_predict_start(self) -> None:
        """Counts the GPU's memory from here."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @abstractmethod
    def handle(self, tasks: Any) -> list[Record]:
        """Computes the records of a batch."""


def peak_memory(device: torch.device) -> int:
    """Megabytes: on a GPU the most allocated in this stage, else the largest resident set of this process so far."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def slices(rows: int, size: int) -> list[slice]:
    """Rows 0 to ``rows`` in parts of at most ``size``."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def file_name(prompt: Prompt) -> str:
    """A file name for a prompt: its id, where that is one, else the id's harmless part and a hash.

    Ids with capital letters have a hash too, since some file systems take names that differ in case for the same; no
    name begins with a dot, which hides a file.
    """
    plain = re.sub(r"[^a-z0-9._-]+", "-", prompt.id.lower())[:60].lstrip(".")
    return plain if plain == prompt.id else f"{plain}-{digest([prompt.id], 8)}"


def to_image(image: Tensor) -> Image.Image:
    """A picture of (3, H, W) values in [0, 1]."""
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
