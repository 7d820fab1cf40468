"""NeMo-C: neurons of all memorized prompts of a cluster, switched off for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ConfigError, NotFiniteError
from nemo_bench.methods.base import Setup
from nemo_bench.methods.derived_neurons import DerivedNeurons
from nemo_bench.records.citations import cite
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.io import batched
from nemo_bench.records.ranges import Count, Index

ITERATIONS = 500  # Of k-means at most, as in the public code.
Features = NDArray[np.float64]


@dataclass(eq=False)
class ClusterNeurons(DerivedNeurons):
    """Blocks the union of the source's neurons over all memorized prompts of a cluster (Di et al. 2026, NeMo-C).

    Encoded prompts, all tokens and channels side by side, are clustered by k-means, begun by k-means++ with a seed. A
    prompt that was not among them, such as a general one, goes to the nearest centre. Unions are large: the published
    ones have up to 46% of all neurons, so what other images lose has to be reported beside what is gained. The
    published files, which can't be computed again, are read by :class:`SavedNeurons`. An older public script clusters
    by TF-IDF instead; it is left out. There are fewer clusters than asked for where there are fewer memorized prompts.

    Args:
        source: The method whose neurons are united.
    """

    title = "NeMo by clusters (NeMo-C)"
    summary = "neurons of all memorized prompts alike to a prompt, switched off together"
    sourcing = "public code; paper second hand"
    citation = cite("di2026demystifying")
    pools = True

    clusters: Count = 12
    seed: Index = 1  #: Of k-means and of the draw.
    #: Control: groups of the same sizes drawn by chance, which says whether likeness matters.
    random: bool = False
    _centres: Features | None = field(default=None, init=False)
    _unions: list[Neurons] = field(default_factory=list, init=False)
    _groups: dict[str, int] = field(default_factory=dict, init=False)

    @override
    def setup(self, model: Diffusion, setup: Setup) -> None:
        super().setup(model, setup)
        texts = {prompt.id: prompt.text for prompt in setup.source_prompts}
        names = [name for name in self._memorized if name in texts]
        if not names:
            self._centres = None
            return
        features = self._features(model, [texts[name] for name in names])
        self._centres, labels = k_means(features, min(self.clusters, len(names)), self.seed)
        if self.random:
            labels = np.random.default_rng(self.seed).permutation(labels)
        self._groups = dict(zip(names, labels.tolist(), strict=True))
        self._unions = [
            reduce(or_, (self._localizations[name].neurons for name in names if self._groups[name] == group), Neurons())
            for group in range(len(self._centres))
        ]

    def _features(self, model: Diffusion, texts: Sequence[str]) -> Features:
        encoded = [model.encode(part).text.flatten(1).double().cpu() for part in batched(texts, self.batch_size)]
        return torch.cat(encoded).numpy()

    @override
    def localize(self, model: Diffusion, prompt: Prompt, latents: Tensor | None = None) -> Localization:
        if self._centres is None:
            if self._localizations:
                msg = f"there are no neurons to unite: {self.source.title} failed for all memorized prompts"
                raise NotFiniteError(msg)
            raise ConfigError("ClusterNeurons: call setup with the localizations and prompts of the source first")
        group = self._groups.get(prompt.id)
        if group is None:
            group = int(squared_distances(self._features(model, [prompt.text]), self._centres).argmin())
        return self._with_gate(self._unions[group], prompt)


def k_means(features: Features, clusters: int, seed: int) -> tuple[Features, NDArray[np.int64]]:
    """Clusters rows by Lloyd's algorithm from centres drawn by k-means++.

    Args:
        features: (rows, features).
        clusters: At most as many as there are rows.
        seed: Of the draw.

    Returns:
        The centres, (clusters, features), and the number of the nearest centre of each row, (rows,).
    """
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(features)))]
    while len(chosen) < clusters:
        nearest = squared_distances(features, features[chosen]).min(1)
        nearest[chosen] = 0
        free = np.setdiff1d(np.arange(len(features)), chosen)
        total = nearest.sum()
        chosen.append(int(rng.choice(len(features), p=nearest / total) if total > 0 else free[0]))
    centres = features[chosen]
    labels = squared_distances(features, centres).argmin(1)
    for _ in range(ITERATIONS):
        # A centre that lost all of its rows stays where it is.
        centres = np.stack(
            [features[labels == c].mean(0) if (labels == c).any() else centres[c] for c in range(clusters)]
        )
        moved = squared_distances(features, centres).argmin(1)
        if (moved == labels).all():
            break
        labels = moved
    return centres, labels


def squared_distances(one: Features, other: Features) -> Features:
    """Squared distances of rows, (rows of one, rows of the other)."""
    return np.stack([((one - row) ** 2).sum(1) for row in other], 1)
