"""Norms of steps, by hand and of a model."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch

from batches import batch_of, images_of
from nemo_bench import ConfigError, Diffusion, Prompt
from nemo_bench.diffusion import Conditioning, Step
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods import Setup, UpdateNorms
from nemo_bench.methods.update_norms import Correction, Moments, step_norms, within
from tiny import tiny_texts

GENERAL = [Prompt(f"g{number}", text) for number, text in enumerate(tiny_texts(12)[8:])]


def latents_of(*values: float) -> torch.Tensor:
    """One image of one pixel."""
    return torch.tensor(values)[None, :, None, None]


def test_norms_within_the_band_stay_and_others_go_to_its_end() -> None:
    values = torch.cat([latents_of(3.0, 4.0), latents_of(0.0, 1.0), latents_of(0.3, 0.4), latents_of(0.0, 0.0)])
    found = within(values, torch.tensor(2.0), torch.tensor(3 * 0.5)).flatten(1)
    torch.testing.assert_close(found, torch.tensor([[2.1, 2.8], [0.0, 1.0], [0.3, 0.4], [0.0, 0.0]]))
    torch.testing.assert_close(within(latents_of(0.0, 2.0), torch.tensor(1.0), torch.tensor(9.0)), latents_of(0.0, 2.0))


class Sampler:
    """Stands in for a model: halves of one pixel at latents of a known norm, ten steps."""

    steps, training_timesteps = 10, 1000

    def __init__(self, clean_norm: float) -> None:
        self.clean_norm = clean_norm

    def timesteps(self) -> list[int]:
        return [*range(900, -1, -100)]

    def signal(self, timestep: int) -> float:
        return 0.36 if timestep > 500 else 0.64

    def unconditional(self, rows: int) -> Conditioning:
        return Conditioning(torch.zeros(rows, 1, 1))

    def predict_noise(self, latents: torch.Tensor, timestep: int, text: Conditioning) -> torch.Tensor:
        """The noise whose clean latents are (clean norm, 0)."""
        signal = self.signal(timestep)
        return (latents - signal**0.5 * latents_of(self.clean_norm, 0.0)) / (1 - signal) ** 0.5


MOMENTS = Moments(*((torch.full((10,), mean), torch.full((10,), 1.0)) for mean in (2.0, 1.0, 3.0)))
"""Means of |x'|, of the update and of c, of standard deviation 1."""


@pytest.mark.parametrize(
    ("clean_norm", "number", "kind"),
    [
        (5.0, 1, "none"),  # 2 deviations of the clean norm
        (7.0, 1, "mild"),
        (7.0, 2, "mild"),  # but later than the first fifth
        (50.0, 2, "strong"),
    ],
)
def test_kinds_and_corrections_by_hand(clean_norm: float, number: int, kind: str) -> None:
    """From x = 0 noise e = -30 leads to x' = 0.6 e - (0.8 / 0.6) 0.8 e = 14."""
    model: Any = Sampler(clean_norm)
    rule = Correction(UpdateNorms(), MOMENTS, model, Conditioning(torch.ones(1, 1, 1)))
    step = Step(number, 600, 1.0, latents_of(0.0, 0.0), latents_of(-30.0, 0.0), latents_of(-30.0, 0.0))
    noise = rule(step)
    reached = (1 - 0.64) ** 0.5 * -30 - (0.64 / 0.36) ** 0.5 * 0.8 * -30
    assert reached == pytest.approx(14)
    expected = reached  # 13 deviations of the update
    if kind == "strong" or (kind == "mild" and number < 2):
        expected += 0.8 * (3 - clean_norm)
    if kind == "strong":
        expected = min(max(expected, -4), 4)  # update within 1 +- 3, then x' within 2 +- 3
    assert dict(rule.notes[0]) == {"kind": kind, "corrected_steps": int(expected != reached)}
    again = 0.6 * float(noise[0, 0]) - (0.64 / 0.36) ** 0.5 * 0.8 * float(noise[0, 0])
    assert again == pytest.approx(expected, rel=1e-5)
    assert float(noise[0, 1]) == pytest.approx(0.0, abs=1e-6)


def test_a_usual_update_makes_no_pass_and_no_change() -> None:
    rule = Correction(UpdateNorms(), MOMENTS, Sampler(math.nan), Conditioning(torch.ones(1, 1, 1)))  # type: ignore[arg-type]
    step = Step(0, 600, 1.0, latents_of(0.0, 0.0), latents_of(-6.0, 0.0), latents_of(-6.0, 0.0))
    assert torch.equal(rule(step), step.conditional)


def test_norms_of_steps_are_those_of_sampling(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    steps: list[Step] = []

    def keep(step: Step) -> torch.Tensor:
        steps.append(step)
        return step.guided(step.scale)

    tiny.generate(batch.text, batch.latents, rule=keep)
    size, update, clean = step_norms(tiny, batch.text, batch.latents)
    for number in range(3):
        now, after = steps[number], steps[number + 1]
        signal = tiny.signal(after.timestep)
        predicted = (after.latents - (1 - signal) ** 0.5 * after.guided(tiny.guidance)) / signal**0.5
        for found, values in ((size, after.latents), (update, after.latents - now.latents), (clean, predicted)):
            torch.testing.assert_close(found[:, number], values.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clean[:, 3], size[:, 3])


def test_a_corrected_step_leads_where_it_should(tiny: Diffusion) -> None:
    """With a band of nothing every step that is corrected ends at the mean norm of general prompts."""
    method = UpdateNorms(flag=1e-6, strong=1e-6, band=0.0)
    method.setup(tiny, Setup(prompts=GENERAL))
    assert method.moments
    batch = batch_of(tiny, [(0, 0), (1, 0)])
    seen: list[torch.Tensor] = []
    with method.apply(tiny, batch) as changed:
        rule = changed.rule
        assert rule

        def watched(step: Step) -> torch.Tensor:
            seen.append(step.latents.flatten(1).norm(dim=1))
            return rule(step)

        tiny.generate(changed.text, changed.latents, rule=watched)
    for number, sizes in enumerate(seen[1:]):
        torch.testing.assert_close(sizes, method.moments.latents[0][number].expand(2), rtol=1e-3, atol=1e-3)
    assert [dict(note) for note in changed.notes] == [{"kind": "strong", "corrected_steps": 4}] * 2


def test_a_general_image_that_is_not_finite_is_an_error(tiny: Diffusion) -> None:
    """With it the moments would be nan, and no image unusual."""
    broken = Diffusion(copy.deepcopy(tiny.pipeline), steps=2)
    broken.network.conv_out.bias.data[0] = math.inf
    with pytest.raises(NotFiniteError, match="norms of general prompts are not finite"):
        UpdateNorms().setup(broken, Setup(prompts=GENERAL))


def test_general_prompts_are_those_not_marked_and_few_are_warned_of(
    tiny: Diffusion, caplog: pytest.LogCaptureFixture
) -> None:
    method = UpdateNorms()
    with pytest.raises(ConfigError, match="needs general prompts, and 1 of those given are not marked"):
        method.fingerprint([Prompt("a", "red", "VM"), Prompt("b", "fox")])
    with caplog.at_level(logging.WARNING):
        method.setup(tiny, Setup(prompts=[Prompt("a", "red", "VM"), *GENERAL]))
    assert "4 general prompts give rough limits" in caplog.text
    assert UpdateNorms(limit=2).fingerprint(GENERAL) == UpdateNorms().fingerprint(GENERAL[:2])
    batch = batch_of(tiny, [(0, 0)])
    with pytest.raises(ConfigError, match="call setup"):
        images_of(tiny, UpdateNorms(), batch)
