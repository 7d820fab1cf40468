"""How well a score tells memorized prompts from others; larger scores stand for memorized ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_bench.errors import ModelError

RESAMPLES = 2000
POINTS = 200
"""Largest number of points of a curve that is written down."""
FALSE_POSITIVES = 0.01
"""The false positive rate at which the true positive rate is given."""


def detection(memorized: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Measures of a detector, from scores of memorized prompts and of others, at least one of each.

    Returns:
        ``auc``, area under the ROC curve, with ``auc_low`` and ``auc_high``, its 95% bootstrap interval over prompts
        of either sort; ``average_precision``; ``tpr_at_1_fpr_below``, the true positive rate at the last point of the
        curve with fewer than 1% false positives (Wen et al. 2024); ``tpr_at_1_fpr_nearest``, at the highest of those
        whose rate of false positives is nearest to 1%; ``tpr_at_1_fpr_first``, at the lowest of those that
        scikit-learn's ``roc_curve`` keeps, as in the code of Ren et al. 2024, Jeon et al. 2025, and Asthana and
        Belagiannis 2026: 0 with fewer than 50 other prompts;
        ``best_accuracy`` over all thresholds, with either sort counting half; ``memorized`` and ``other``, the
        numbers of prompts; ``curve``, the ROC curve as pairs of false and true positive rate from (0, 0) to (1, 1):
        its corners, at most 200 of them.

    Raises:
        ModelError: A score is no finite number.
    """
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

    scores, labels = np.array([*memorized, *other]), torch.tensor([1] * len(memorized) + [0] * len(other))
    if not np.isfinite(scores).all():
        msg = f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite, and can't be put in order"
        raise ModelError(f"{msg}; score these prompts again with model.dtype=float32 or bfloat16")
    # Their order alone counts, and torchmetrics takes scores outside of [0, 1] for logits, which it rounds together.
    ranks = torch.from_numpy(np.unique(scores, return_inverse=True)[1] / len(scores))
    fpr, tpr, _ = binary_roc(ranks, labels)
    nearest = fpr[(fpr - FALSE_POSITIVES).abs().argmin()]
    low, high = _interval(np.asarray(memorized), np.asarray(other))
    return {
        "auc": float(binary_auroc(ranks, labels)),
        "auc_low": low,
        "auc_high": high,
        "average_precision": float(binary_average_precision(ranks, labels)),
        "tpr_at_1_fpr_below": float(tpr[fpr < FALSE_POSITIVES][-1]),
        "tpr_at_1_fpr_nearest": float(tpr[fpr == nearest][-1]),
        "tpr_at_1_fpr_first": _first_nearest(scores, labels.numpy()),
        "best_accuracy": float((tpr + 1 - fpr).max() / 2),
        "memorized": len(memorized),
        "other": len(other),
        "curve": _corners(torch.stack([fpr, tpr], 1).tolist()),
    }


def best_threshold(memorized: Sequence[float], other: Sequence[float]) -> float:
    """The threshold above which scores count as memorized, with the largest difference of true and false positive rate.

    It is that of Youden (1950), halfway between two scores; of several the highest, below all scores if none is better.

    Example:
        >>> best_threshold([1.0, 0.75], [0.25, 0.5])
        0.625
    """
    own, others = np.sort(memorized), np.sort(other)
    scores = np.unique([*memorized, *other])
    lower = np.array([np.nextafter(scores[0], -np.inf), *scores[:-1]])
    # Two neighbouring numbers have nothing between them.
    middle = np.clip(lower + (scores - lower) / 2, lower, np.nextafter(scores, -np.inf))
    hits, mistakes = (1 - np.searchsorted(of, middle, "right") / len(of) for of in (own, others))
    gain = (hits - mistakes).round(12)
    return float(middle[len(gain) - 1 - gain[::-1].argmax()])


def rates(memorized: Sequence[float], other: Sequence[float], threshold: float) -> tuple[float, float]:
    """True and false positive rate where scores above a threshold count as memorized."""
    hits, mistakes = (float((np.asarray(of) > threshold).mean()) for of in (memorized, other))
    return hits, mistakes


def _first_nearest(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """True positive rate at the first of the points nearest to 1% false positives that scikit-learn keeps.

    It leaves out points that are halfway, by both counts, between their neighbours, but for the first and the last;
    then it puts (0, 0) before them.
    """
    limits = np.unique(scores)[::-1]
    hits, mistakes = (np.array([(scores[labels == kind] >= t).sum() for t in limits]) for kind in (1, 0))
    turns = (np.diff(hits, 2) != 0) | (np.diff(mistakes, 2) != 0)
    kept = np.r_[True, turns, True] if len(limits) > 2 else np.full(len(limits), fill_value=True)
    tpr, fpr = (np.r_[0, counts[kept]] / counts[-1] for counts in (hits, mistakes))
    return float(tpr[np.abs(fpr - FALSE_POSITIVES).argmin()])


def _corners(points: list[list[float]]) -> list[list[float]]:
    """The points where a curve changes its direction, its ends among them; evenly thinned where they are too many."""
    inner = [
        here
        for before, here, after in zip(points, points[1:], points[2:], strict=False)
        if not any(before[axis] == here[axis] == after[axis] for axis in (0, 1))
    ]
    corners = [points[0], *inner, points[-1]]
    chosen = np.linspace(0, len(corners) - 1, min(len(corners), POINTS)).round().astype(int)
    return [[round(rate, 6) for rate in corners[i]] for i in chosen]


def _interval(memorized: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    """95% percentile bootstrap interval of the area; the same scores always give the same interval."""
    # The area is the share of pairs in the right order; drawing prompts again weighs rows and columns of that table.
    right = np.sign(memorized[:, None] - other[None, :]) / 2 + 0.5
    numbers = np.random.default_rng(0)
    rows, columns = (
        numbers.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in (len(memorized), len(other))
    )
    low, high = np.quantile(((rows @ right) * columns).sum(1), [0.025, 0.975])
    return float(low), float(high)
