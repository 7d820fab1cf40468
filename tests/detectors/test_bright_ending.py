"""Bright Ending, by hand and against plain generations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detector_views import PROMPT, generation, score_of, view_of
from nemo_bench.detectors import (
    BrightEnding,
)
from nemo_bench.detectors.bright_ending import picture
from nemo_bench.diffusion import Diffusion, Step
from nemo_bench.methods.bright_ending import bright_ending


def test_mask_is_the_attention_to_the_end_token_in_the_last_step(tiny: Diffusion) -> None:
    names = [f"down_blocks.0.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1)]
    detector, last = BrightEnding(), tiny.steps - 1
    assert (list(detector.layers(tiny, last)), list(detector.layers(tiny, last - 1))) == (names, [])
    side = tiny.latent_shape[1]
    maps = {name: torch.rand(2, side * side, 16) for name in names}
    view = view_of(tiny, tiny.latents([0, 1]), number=last, lengths=[5, 16], maps=maps)
    mask = detector.observe(view)["mask"]
    expected = (maps[names[0]] + maps[names[1]]) / 2
    for row, end in enumerate((4, 15)):
        torch.testing.assert_close(mask[row], expected[row, :, end].view(side, side))


def test_bright_ending_of_some_steps_scores_those_and_pictures_its_mask(tiny: Diffusion) -> None:
    whole, part = score_of(tiny, BrightEnding(seeds=2)), score_of(tiny, BrightEnding(seeds=2, steps=1))
    assert part.details["by_step"] == pytest.approx(whole.details["by_step"][:1], rel=1e-2)
    assert len(whole.details["by_step"]) == tiny.steps
    assert whole.score == pytest.approx(sum(whole.details["by_step"]) / tiny.steps, rel=1e-3)
    height, width = (side * tiny.pipeline.vae_scale_factor for side in tiny.latent_shape[1:])
    assert whole.picture is not None
    assert whole.picture.shape == (3, 2 * height, 2 * width)
    latents, text = generation(tiny, 2)
    images = tiny.generate(text, latents)
    torch.testing.assert_close(whole.picture[:, :height, width:], images[1], rtol=0, atol=1e-3)


def test_bright_ending_masks_the_difference_of_every_step(tiny: Diffusion) -> None:
    latents, text = generation(tiny, 2)
    mask = bright_ending(tiny, [PROMPT] * 2, text, latents)
    added: list[Tensor] = []

    def keep(step: Step) -> Tensor:
        added.append(step.difference)
        return step.guided(step.scale)

    tiny.generate(text, latents, rule=keep)
    by_step = [float(sum((d[i] * mask[i]).square().sum().sqrt() / mask[i].mean() for i in range(2)) / 2) for d in added]
    found = score_of(tiny, BrightEnding(seeds=2))
    assert found.details["by_step"] == pytest.approx(by_step, rel=1e-3)
    assert found.details["mask_mean"] == pytest.approx(float(mask.mean()), rel=1e-3)


def test_pictured_mask_is_scaled_from_darkest_to_brightest() -> None:
    mask = torch.tensor([[[0.1, 0.3]]])
    drawn = picture(torch.zeros(1, 3, 2, 4), mask)
    assert drawn[0, 2:].tolist() == [[0, 0, 1, 1]] * 2
