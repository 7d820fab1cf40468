"""Writes torchmetrics_132.json: similarities by torchmetrics 1.3.2, the version that NeMo's public scripts pin.

    pip install --no-deps --target FOLDER torchmetrics==1.3.2
    PYTHONPATH=FOLDER python tests/helpers/torchmetrics_132.py

Without a data range, with the window and scales of the scripts and with the single scale of small latents.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

FILE = Path(__file__).with_suffix(".json")
SIDES = (48, 64, 96)


def pictures(side: int) -> tuple[Tensor, Tensor]:
    """Two batches (3, 4, side, side) in [0, 1], alike from much to little, made of whole numbers alone.

    Their ranges differ from row to row and between the batches, so that it matters what the range is taken from.
    """
    numbers = torch.arange(3 * 4 * side * side).view(3, 4, side, side)
    rows = torch.arange(3).view(3, 1, 1, 1)
    waves = (numbers * 37 % (5 * side)) / (5 * side)
    noise = (numbers * 7919 % 10007) / 10007
    first = waves * (3 - rows) / 3
    return first, (first * (8 - 3 * rows) + noise * 3 * rows) / 9


def main() -> None:
    if torchmetrics.__version__ != "1.3.2":
        raise SystemExit(f"needs torchmetrics 1.3.2, found {torchmetrics.__version__}")
    found = {}
    for side in SIDES:
        a, b = pictures(side)
        multi = multiscale_structural_similarity_index_measure(
            a, b, kernel_size=11, sigma=1.5, betas=(0.33, 0.33, 0.33), normalize="relu", reduction="none"
        )
        single = structural_similarity_index_measure(a, b, sigma=1.0, reduction="none")
        assert isinstance(single, Tensor)
        found[str(side)] = {"ms_ssim": multi.tolist(), "ssim": single.tolist()}
    FILE.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
