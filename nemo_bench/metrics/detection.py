"""How well a score tells memorized prompts from others; larger scores stand for memorized ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

from nemo_bench.errors import ModelError

RESAMPLES = 2000
POINTS = 200
"""Largest number of points of a curve that is written down."""
FALSE_POSITIVES = 0.01
"""The false positive rate at which the true positive rate is given."""


def detection(memorized: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Measures of a detector.

    Args:
        memorized: Scores of memorized prompts, at least one.
        other: Scores of other prompts, at least one.

    Returns:
        ``auc``, area under the ROC curve, with ``auc_low`` and ``auc_high``, its 95% bootstrap interval over prompts of
        either sort; ``average_precision``; ``tpr_at_1_fpr_below``, the true positive rate at the last point of the
        curve with fewer than 1% false positives (Wen et al. 2024); ``tpr_at_1_fpr_nearest``, what the public code of
        Ren et al. (2024) makes of it, at the first of the points nearest to 1%, see :func:`_at_nearest`;
        ``best_accuracy`` over all thresholds, with either sort counting half; ``memorized`` and ``other``, the numbers
        of prompts; ``curve``, the ROC curve as pairs of false and true positive rate from (0, 0) to (1, 1): its
        corners, at most 200 of them.

    Raises:
        ModelError: A score is no finite number.
    """
    scores, labels = np.array([*memorized, *other]), torch.tensor([1] * len(memorized) + [0] * len(other))
    if not np.isfinite(scores).all():
        msg = f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite, and can't be put in order"
        raise ModelError(f"{msg}; score these prompts again with model.dtype=float32 or bfloat16")
    # Their order alone counts, and torchmetrics takes scores outside of [0, 1] for logits, which it rounds together.
    ranks = torch.from_numpy(np.unique(scores, return_inverse=True)[1] / len(scores))
    fpr, tpr, _ = binary_roc(ranks, labels)
    low, high = _interval(np.asarray(memorized), np.asarray(other))
    return {
        "auc": float(binary_auroc(ranks, labels)),
        "auc_low": low,
        "auc_high": high,
        "average_precision": float(binary_average_precision(ranks, labels)),
        "tpr_at_1_fpr_below": float(tpr[fpr < FALSE_POSITIVES][-1]),
        "tpr_at_1_fpr_nearest": _at_nearest(np.asarray(memorized), np.asarray(other)),
        "best_accuracy": float((tpr + 1 - fpr).max() / 2),
        "memorized": len(memorized),
        "other": len(other),
        "curve": _corners(torch.stack([fpr, tpr], 1).tolist()),
    }


def _at_nearest(memorized: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """True positive rate at the first of the points nearest to 1% false positives, of the points scikit-learn keeps.

    The public code of Ren et al. (2024), ``tpr[argmin(abs(fpr - 0.01))]`` of ``roc_curve``, takes the lower end where
    the curve goes up at that rate. No false positive at all gives the point (0, 0), hence 0: so it is of up to 50 other
    prompts. scikit-learn leaves out points between their neighbours in equal steps before it adds (0, 0).
    """
    thresholds = np.unique([*memorized, *other])[::-1]
    above = [len(those) - np.searchsorted(np.sort(those), thresholds) for those in (other, memorized)]
    turns = np.any([np.diff(counts, 2) for counts in above], axis=0)
    kept = np.concatenate([[True], turns, [True]])[-len(thresholds) :]
    fpr, tpr = (np.concatenate([[0], counts[kept]]) / counts[-1] for counts in above)
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


def _interval(memorized: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> tuple[float, float]:
    """95% percentile bootstrap interval of the area; the same scores always give the same interval."""
    # The area is the share of pairs in the right order; drawing prompts again weighs rows and columns of that table.
    right = np.sign(memorized[:, None] - other[None, :]) / 2 + 0.5
    numbers = np.random.default_rng(0)
    rows, columns = (
        numbers.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in (len(memorized), len(other))
    )
    low, high = np.quantile(((rows @ right) * columns).sum(1), [0.025, 0.975])
    return float(low), float(high)
