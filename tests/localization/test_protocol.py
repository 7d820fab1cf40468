from __future__ import annotations

import torch

from nemo_bench import Diffusion
from nemo_bench.localization import PAPER, REFERENCE


def test_reference_protocol_shares_its_noise(tiny: Diffusion) -> None:
    assert torch.equal(REFERENCE.latents(tiny, [5, 6]), REFERENCE.latents(tiny, [7, 8]))
    expected = torch.randn((2, *tiny.latent_shape), generator=torch.Generator().manual_seed(1))
    assert torch.equal(REFERENCE.latents(tiny, [5, 6]), expected)
    assert not torch.equal(PAPER.latents(tiny, [5, 6]), PAPER.latents(tiny, [7, 8]))
