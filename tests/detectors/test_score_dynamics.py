from __future__ import annotations

import pytest
import torch

from detector_views import PROMPT, generation, score_of
from nemo_bench import ModelError
from nemo_bench.detectors import ScoreDynamics
from nemo_bench.diffusion import Diffusion, Step
from tiny import tiny_pipeline


def test_score_is_the_squared_change_and_the_mean_over_images(tiny: Diffusion) -> None:
    before, after = torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1)
    after[0, 0], after[0, 1], after[1, 3] = 3, 4, 1
    observed = [{}, {"noise": before}, {"noise": after}]
    assert ScoreDynamics().score(tiny, PROMPT, observed, None).score == 13
    assert ScoreDynamics().score(tiny, PROMPT, [{}, {"noise": after}, {"noise": after}], None).score == 0


@pytest.mark.parametrize("first", [0, 1])
def test_steps_are_those_of_guided_sampling(tiny: Diffusion, first: int) -> None:
    steps: list[Step] = []

    def keep(step: Step) -> torch.Tensor:
        steps.append(step)
        return step.guided(step.scale)

    latents, text = generation(tiny, 2)
    tiny.generate(text, latents, rule=keep)
    change = steps[first + 1].conditional - steps[first].conditional
    expected = float(change.flatten(1).norm(dim=1).square().mean())
    assert score_of(tiny, ScoreDynamics(seeds=2, first=first)).score == pytest.approx(expected, rel=1e-3)


def test_too_few_steps_are_an_error_before_any_pass() -> None:
    model = Diffusion(tiny_pipeline(), steps=2, guidance=3.0)
    with pytest.raises(ModelError, match=r"compares steps 2 and 3, given model.steps=2; set first to 0"):
        score_of(model, ScoreDynamics())
    assert model.row_passes == 0
