"""Features of pictures, for metrics of whole sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_bench.benchmark.stages.base import Chunk, Stage
from nemo_bench.metrics import BenchMetric, Network, SetMetric
from nemo_bench.records.images import open_image
from nemo_bench.records.io import digest, replacing
from nemo_bench.records.schema import ChunkRecord


def embed_real(stage: Stage, tasks: Sequence[Chunk], space: Network) -> list[ChunkRecord]:
    """Takes the features of the real pictures of a folder."""
    records = []
    for chunk in tasks:
        pictures = [open_image(path) for path in chunk.items]
        features = space.embed(pictures, pictures[0].size, stage.device)
        file = f"features/{chunk.id}.safetensors"
        save_features(stage.store.folder / file, {"real": features})
        records.append(ChunkRecord(id=chunk.id, file=file, count=len(chunk.items)))
    return records


def set_spaces(metrics: Iterable[BenchMetric]) -> dict[str, Network]:
    """The networks whose features metrics of whole sets need, by the name they are kept under."""
    return {digest(m.space.fingerprint()): m.space for m in metrics if isinstance(m, SetMetric)}


def save_features(path: Path, features: Mapping[str, Tensor]) -> None:
    """Writes features by name, (N, D) each, whole."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as part:
        save_file({name: tensor.cpu().contiguous() for name, tensor in features.items()}, part)


def read_features(paths: Iterable[Path], name: str) -> Tensor:
    """Features of several files in their order, (N, D), without rows that are not finite."""
    features = torch.cat([load_file(path)[name] for path in paths])
    return features[features.isfinite().all(1)]
