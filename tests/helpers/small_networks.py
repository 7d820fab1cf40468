"""Small networks with the interfaces of the published ones, with weights drawn here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from nemo_bench.metrics import SSCD, OpenClip

CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {},
}


def picture(seed: int, size: tuple[int, int] = (300, 400)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


class Descriptor(nn.Module):
    """Averages over a grid and a random projection."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        torch.manual_seed(dimensions)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.projection = nn.Linear(48, dimensions)

    def forward(self, pixels: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.pool(pixels).flatten(1))
        return projected


def descriptor(folder: Path, dimensions: int) -> tuple[Path, Descriptor]:
    """A TorchScript file and the module in it."""
    path, module = folder / f"descriptor{dimensions}.pt", Descriptor(dimensions).eval()
    torch.jit.script(module).save(str(path))
    return path, module


def sscd(folder: Path) -> SSCD:
    return SSCD(file=str(descriptor(folder, 512)[0]))


def clip(folder: Path) -> OpenClip:
    """A folder of open_clip with weights."""
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP))
    weights = open_clip.create_model(f"local-dir:{folder}").state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors")
    return OpenClip(f"local-dir:{folder}")
