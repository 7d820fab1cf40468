"""A stand-in for a model whose predicted noise is linear in the latents, for values computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from nemo_bench.detectors import View
from nemo_bench.diffusion import Conditioning
from nemo_bench.diffusion.schedule import VariancePreserving


class FixedSignal(VariancePreserving):
    """A schedule in which latents of every timestep hold a signal of 0.36, and noise of 0.8."""

    def __init__(self) -> None:
        super().__init__({})

    @override
    def signal(self, timestep: float) -> float:
        return 0.36


@dataclass
class LinearNoise:
    """Predicts A x for prompts and B x for the empty one, of latents x of n elements; the signal is 0.36, sigma 0.8."""

    own: Sequence[Sequence[float]]  #: A, n x n.
    empty: Sequence[Sequence[float]]  #: B, n x n.
    guidance: float = 3.0
    steps: int = 4

    device = torch.device("cpu")
    schedule = FixedSignal()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return len(self.own), 1, 1

    def unconditional(self, rows: int) -> Conditioning:
        return Conditioning(torch.zeros(rows, 1, 1))

    def timestep(self, step: int = 0) -> int:
        return 1000 - 20 * step

    def signal(self, timestep: int) -> float:
        return 0.36

    def predict_noise(self, latents: Tensor, timestep: int, text: Conditioning) -> Tensor:
        matrices = torch.where(text.text > 0, torch.tensor(self.own), torch.tensor(self.empty))
        return (matrices @ latents.flatten(1)[:, :, None])[..., None]

    def view(self, latents: Sequence[Sequence[float]], **options: Any) -> View:
        """A step of prompts from latents, one row each."""
        rows = len(latents)
        return View(
            model=self,  # type: ignore[arg-type]
            text=Conditioning(torch.ones(rows, 1, 1)),
            latents=torch.tensor(latents)[:, :, None, None],
            seeds=range(rows),
            lengths=[3] * rows,
            **{"timestep": 1000, **options},
        )
