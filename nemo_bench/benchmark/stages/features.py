"""Features of pictures, for metrics of whole sets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_bench.benchmark.stages.base import CHUNK, Stage
from nemo_bench.metrics import BenchMetric, Network, SetMetric
from nemo_bench.records.data import Record
from nemo_bench.records.images import open_image
from nemo_bench.records.io import digest
from nemo_bench.records.store import Store


class FolderChunk(NamedTuple):
    """Real pictures whose features are taken together.

    Attributes:
        id: Record id.
        files: The pictures, at most :data:`CHUNK`.
    """

    id: str
    files: tuple[Path, ...]

    @classmethod
    def split(cls, files: Sequence[Path]) -> list[FolderChunk]:
        """Chunks of some pictures, in their order."""
        parts = [tuple(files[i : i + CHUNK]) for i in range(0, len(files), CHUNK)]
        return [cls(digest([number, [path.name for path in part]]), part) for number, part in enumerate(parts)]

    @property
    def file(self) -> str:
        """Where its features lie, in the folder of the store."""
        return f"features/{self.id}.safetensors"


class FeatureStage(Stage):
    """Features of the real pictures of a folder, for metrics of whole sets.

    Args:
        space: The network.
        store: Where files and records go.
    """

    def __init__(self, space: Network, store: Store) -> None:
        super().__init__(store, "features")
        self.space = space

    def handle(self, tasks: Sequence[FolderChunk]) -> list[Record]:
        """Features of each chunk."""
        for chunk in tasks:
            pictures = [open_image(path) for path in chunk.files]
            features = self.space.embed(pictures, pictures[0].size, self.device)
            save_features(self.store.folder / chunk.file, {"real": features})
        return [{"id": chunk.id, "file": chunk.file, "pictures": len(chunk.files)} for chunk in tasks]


def set_spaces(metrics: Iterable[BenchMetric]) -> dict[str, Network]:
    """The networks whose features metrics of whole sets need, by the name they are kept under."""
    return {digest(m.space.fingerprint()): m.space for m in metrics if isinstance(m, SetMetric)}


def save_features(path: Path, features: Mapping[str, Tensor]) -> None:
    """Writes features under a temporary name, then renames the file."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file({name: tensor.cpu().contiguous() for name, tensor in features.items()}, part)
    part.replace(path)


def read_features(paths: Iterable[Path], name: str) -> Tensor:
    """Features of several files in their order, (N, D); those that are not finite are left out."""
    features = torch.cat([load_file(path)[name] for path in paths])
    return features[features.isfinite().all(1)]
