from __future__ import annotations

import pytest
import torch

from batches import batch_of
from nemo_bench import Diffusion
from nemo_bench.diffusion import Conditioning, Step
from nemo_bench.diffusion.schedule import VariancePreserving
from nemo_bench.methods import AdjustedNoise, Batch, OptimizedNoise
from tiny import tiny_pipeline


class Cubes:
    """Stands in for a model in which the prompt adds the cubes of the latents to the noise."""

    dtype = torch.float32

    schedule = VariancePreserving({})

    def text_noise(self, latents: torch.Tensor, timestep: int, text: Conditioning) -> torch.Tensor:
        return latents**3


def numbers(batch: Batch, values: list[list[float]]) -> Batch:
    return Batch(batch.prompts, batch.text, torch.tensor(values)[:, :, None, None], batch.seeds, batch.neurons)


def test_rounds_are_those_of_the_paper(tiny: Diffusion) -> None:
    # d = (1, 0), u = (2, 0): x - 0.5 ((3^3, 0) - (1, 0)) = (-12, 0); rows have norms of their own.
    batch = numbers(batch_of(tiny, [(0, 0), (1, 0)]), [[1.0, 0.0], [0.0, 2.0]])
    with AdjustedNoise(1, radius=2.0, rate=0.5).apply(Cubes(), batch) as changed:  # type: ignore[arg-type]
        torch.testing.assert_close(changed.latents.flatten(1), torch.tensor([[-12.0, 0.0], [0.0, -26.0]]))
    # Once more with a small rate: 1 - 0.01 * 26 = 0.74, then 0.74 - 0.01 (2.74^3 - 0.74^3).
    with AdjustedNoise(2, radius=2.0, rate=0.01).apply(Cubes(), batch) as changed:  # type: ignore[arg-type]
        assert float(changed.latents[0, 0]) == pytest.approx(0.74 - 0.01 * (2.74**3 - 0.74**3))


def test_guidance_starts_at_its_timestep(tiny: Diffusion) -> None:
    zero = torch.zeros(1, 1, 1, 1)
    batch = numbers(batch_of(tiny, [(0, 0)]), [[1.0]])
    with AdjustedNoise(0).apply(Cubes(), batch) as changed:  # type: ignore[arg-type]
        assert changed.rule
    found = [float(changed.rule(Step(i, t, 7.0, zero, zero, zero + 1))) for i, t in enumerate((981, 901, 881, 1))]
    assert found == [0, 0, 7, 7]


def test_a_round_costs_four_passes(tiny: Diffusion) -> None:
    batch, before = batch_of(tiny, [(0, 0), (1, 0)]), tiny.row_passes
    with AdjustedNoise(3).apply(tiny, batch):
        assert tiny.row_passes - before == 2 * 4 * 3


def test_steps_on_the_noise_are_torchs_own(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0)])
    leaf = batch.latents.clone().requires_grad_()
    optimizer = torch.optim.AdamW([leaf], lr=0.01)
    for _ in range(3):
        both = torch.cat([tiny.unconditional(1).text, batch.text.text])
        unconditional, conditional = tiny.unet(leaf.expand(2, -1, -1, -1), 981, both).sample
        optimizer.zero_grad()
        (conditional - unconditional).norm().backward()
        optimizer.step()
    before = tiny.row_passes
    with OptimizedNoise(0.0, steps=3).apply(tiny, batch) as changed:
        torch.testing.assert_close(changed.latents, leaf.detach(), rtol=0, atol=1e-3)
        assert changed.notes == ({"steps": 3, "reached": False},)
    assert tiny.row_passes - before == 3 * (2 + 2)


def test_gradient_matches_finite_differences(tiny: Diffusion) -> None:
    batch = batch_of(tiny, [(0, 0)])
    leaf = batch.latents.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tiny.text_noise(leaf, 981, batch.text).norm(), [leaf])
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (tiny.text_noise(leaf + s * 0.1 * direction, 981, batch.text).norm() for s in (1, -1))
    assert float((ahead - behind) / 0.2) == pytest.approx(float(gradient.norm()), rel=0.03)


def test_differences_can_be_those_of_velocities() -> None:
    model = Diffusion(tiny_pipeline(0, "v_prediction"))
    batch = batch_of(model, [(0, 0)])
    both = torch.cat([model.unconditional(1).text, batch.text.text])

    def added(latents: torch.Tensor) -> torch.Tensor:
        unconditional, conditional = model.unet(latents.expand(2, -1, -1, -1), 981, both).sample
        return (conditional - unconditional)[None]

    with torch.no_grad():
        here = added(batch.latents)
        expected = batch.latents - 0.7 * (added(batch.latents + 3 * here / here.norm()) - here)
    with AdjustedNoise(1, radius=3.0, of="prediction").apply(model, batch) as changed:
        torch.testing.assert_close(changed.latents, expected, rtol=0, atol=1e-3)
    with AdjustedNoise(1, radius=3.0).apply(model, batch) as smaller:
        # Noise is sqrt(abar) times velocity.
        moved = (changed.latents - batch.latents) * model.signal(981) ** 0.5
        torch.testing.assert_close(smaller.latents - batch.latents, moved, rtol=0, atol=1e-4)
    norm = float(here.norm())
    for target, reached in ((norm * 1.01, True), (norm * 0.99, False)):
        with OptimizedNoise(target, steps=1, of="prediction").apply(model, batch) as found:
            assert found.notes[0]["reached"] == reached


def test_each_image_ends_at_its_own_target(planted: Diffusion) -> None:
    texts = ["the golden harbor podcast for nine silent stars", "new stories from a midnight garden, why rings by four"]
    batch = batch_of(planted, [(0, 0), (1, 0)], texts)
    before = planted.text_noise(batch.latents, planted.timestep(), batch.text).flatten(1).norm(dim=1)
    target = 0.97 * float(before.max())
    with OptimizedNoise(target, steps=40, rate=0.02).apply(planted, batch) as changed:
        after = planted.text_noise(changed.latents, planted.timestep(), batch.text).flatten(1).norm(dim=1)
        assert (after <= target * 1.0001).all()
        assert all(note["reached"] for note in changed.notes)
        for row in range(2):
            with OptimizedNoise(target, steps=40, rate=0.02).apply(planted, batch.rows([row])) as alone:
                assert alone.notes[0] == changed.notes[row]
                torch.testing.assert_close(alone.latents, changed.latents[[row]], rtol=0, atol=1e-2)
