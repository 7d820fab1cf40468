"""How much the images of a prompt differ from each other."""

from __future__ import annotations

from torch import Tensor

from nemo_bench.metrics.base import BenchMetric


class Diversity(BenchMetric):
    """One minus the mean pairwise cosine of the image embeddings of a prompt's seeds."""

    title = "Diversity"
    description = "one minus mean pairwise cosine similarity of open_clip image embeddings among the seeds of a prompt"
    citation = "pairwise form as D_SSCD in Hintersdorf et al. 2024, section 4"
    needs = frozenset({"embeddings"})
    per_image = False
    higher_is_better = True
    lower, upper = 0.0, 2.0

    def score(self, embeddings: Tensor) -> Tensor:  # type: ignore[override]
        """(1,) value in [0, 2]; empty for a single image."""
        count = len(embeddings)
        if count < 2:
            return embeddings.new_empty(0)
        cosines = embeddings @ embeddings.T
        return (1 - (cosines.sum() - cosines.trace()) / (count * (count - 1))).reshape(1)
