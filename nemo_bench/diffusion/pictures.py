"""Pictures in the form in which a model was trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nemo_bench.records.images import open_image


def fitted_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture as training saw it, (3, H, W), float32, in [0, 1]: its middle, brought to width and height ``size``."""
    fitted = ImageOps.fit(open_image(path), size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255
