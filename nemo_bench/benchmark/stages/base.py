"""What all stages share: a predict loop that writes records and returns nothing."""

from __future__ import annotations

import logging
import re
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from nemo_bench.benchmark.processes import stop_at_signals
from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ModelError, first_line
from nemo_bench.methods import Method
from nemo_bench.records.data import Neurons, Prompt
from nemo_bench.records.io import batched, digest, replacing
from nemo_bench.records.schema import Cost, Record
from nemo_bench.records.store import Store

log = logging.getLogger(__name__)

UNLOCALIZED = "its prompt has no neurons: localizing it failed"
"""Why there are no images of a prompt."""
CHUNK = 256
"""Prompts or pictures that make one record; a constant, so that sums are rounded alike in every run."""


class Stage(L.LightningModule):
    """A predict loop over tasks; each batch ends with its records on disk.

    A batch that does not fit the memory of the GPU is halved, and so are all after it; results change by rounding only.

    Args:
        handle: Computes the records of a batch, given the stage and the batch.
        kind: Class of the records.
        store: Where they go; None where ``handle`` writes them.
        model: The model, where one is needed.
        method: Gives the mitigation, set up for a number of rows; the first call counts to the first task.
        neurons: Localized neurons by prompt id; images of other prompts fail.
        batch_size: Rows in a UNet pass at most.
        done: Ids of tasks that are done, and in a batch only so that the others are computed as in an undisturbed run.
        assisting: Whether another run owns the cell, and records as well.
    """

    def __init__(
        self,
        handle: Callable[[Stage, Any], Sequence[Record]],
        kind: type[Record],
        store: Store | None,
        *,
        model: Any = None,
        method: Any = None,
        neurons: Mapping[str, Neurons] | None = None,
        batch_size: int = 1,
        done: Collection[str] = (),
        assisting: bool = False,
    ) -> None:
        super().__init__()
        self.handle = handle
        self.name = kind.stage
        self.write = store.writer(kind) if store else None
        self.store: Store = store  # type: ignore[assignment] # who asks for it has given one, as of all that follows
        self.model: Diffusion = model
        self._method: Callable[[int], Method] = method
        self.neurons = neurons or {}
        self.batch_size = batch_size
        self.done = done
        self.assisting = assisting
        #: Records of the last batch.
        self.written: Sequence[Record] = ()
        self._most: int | None = None  # tasks at once, where all of a batch did not fit

    def method(self) -> Method:
        """The mitigation, set up, for passes of as many rows as fit."""
        method = self._method(self.batch_size)
        method.batch_size = self.batch_size
        return method

    @override
    def on_predict_start(self) -> None:
        stop_at_signals()  # Lightning's own handler, which would predict on, is there by now
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @override
    def predict_step(self, tasks: Any, batch_idx: int) -> None:
        start = time.perf_counter()
        records = self.written = self._fitting(tasks)
        if self.write is None:
            return
        measured = {
            "seconds": round((time.perf_counter() - start) / len(tasks), 4),
            "peak_memory_mb": peak_memory(self.device),
            "device": self.device.type,
        }
        costs = [(record.cost or Cost()).model_copy(update=measured) for record in records]
        self.write(record.model_copy(update={"cost": cost}) for record, cost in zip(records, costs, strict=True))

    def _fitting(self, tasks: Any) -> list[Record]:
        """The records of a batch, of which as many tasks are taken at once as fit the memory of the GPU."""
        records: list[Record] = []
        rest, most, rows = tasks, self._most, self.batch_size
        while rest:
            part = rest[: self._most] if self._most else rest
            try:
                records += self.handle(self, part)
            except torch.OutOfMemoryError as error:
                if len(part) == self.batch_size == 1:
                    msg = (
                        f"{self.name}: not even one row at a time fits the memory of the GPU "
                        f"({first_line(error)}); batch_size can't help. Take model.dtype=float16 or bfloat16, a GPU "
                        "with more memory, or end what else is on it (nvidia-smi shows it)"
                    )
                    raise ModelError(msg) from error
                if len(part) > 1:
                    self._most = -(-len(part) // 2)
                else:
                    self.batch_size = -(-self.batch_size // 2)
            else:
                rest = rest[len(part) :]
        if (most, rows) != (self._most, self.batch_size):
            log.warning(
                "%s: with batch_size=%d a batch does not fit the memory of the GPU; it goes on with %d of %d at once%s",
                self.name, rows, self._most or 1, len(tasks),
                f" and batch_size={self.batch_size}" if self.batch_size < rows else "",
            )  # fmt: skip
        return records


class Chunk(NamedTuple):
    """What makes one record, such as at most :data:`CHUNK` texts or pictures."""

    id: str
    items: tuple[Any, ...]

    @classmethod
    def from_prompts(cls, prompts: Sequence[Prompt]) -> list[Chunk]:
        """Chunks of the texts of some prompts, in their order; ids depend on the prompts' ids alone."""
        return [cls(digest([p.id for p in part]), tuple(p.text for p in part)) for part in batched(prompts, CHUNK)]

    @classmethod
    def from_files(cls, files: Sequence[Path]) -> list[Chunk]:
        """Chunks of some pictures, in their order."""
        parts = enumerate(batched(files, CHUNK))
        return [cls(digest([number, [path.name for path in part]]), tuple(part)) for number, part in parts]


def peak_memory(device: torch.device) -> int:
    """Megabytes: on a GPU the most allocated in this stage, else the largest resident set of this process so far."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def file_name(prompt: Prompt) -> str:
    """A file name for a prompt: its id, where that is one, else the id's harmless part and a hash.

    Ids with capital letters have a hash too, since some file systems take names that differ in case for the same; no
    name begins with a dot, which hides a file.
    """
    plain = re.sub(r"[^a-z0-9._-]+", "-", prompt.id.lower())[:60].lstrip(".")
    return plain if plain == prompt.id else f"{plain}-{digest([prompt.id], 8)}"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by name, whole, to a file of safetensors."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as part:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)


def to_image(image: Tensor) -> Image.Image:
    """A picture of (3, H, W) values in [0, 1]."""
    return to_images(image[None])[0]


def to_images(images: Tensor) -> list[Image.Image]:
    """Pictures of (N, 3, H, W) values in [0, 1], in one transfer from the device."""
    return [Image.fromarray(pixels) for pixels in images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]
