"""Localizers of regions, by hand and against generations."""

from __future__ import annotations

import pytest
import torch

from detector_views import PROMPT, generation, score_of
from linear_noise import LinearNoise
from nemo_bench.config import build, options, region_grid
from nemo_bench.detectors import View, watch
from nemo_bench.detectors.regions import CurvatureDifference, EndAttention, RegionLocalizer, ScoreDifference
from nemo_bench.detectors.regions.curvature_difference import random_signs
from nemo_bench.diffusion import Diffusion
from nemo_bench.errors import ModelError, NotFiniteError
from nemo_bench.methods.bright_ending import bright_ending

LAST = {"number": 3, "timestep": 400}
A, B = [[2.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [4.0, -1.0]]


def noises(view: View, model: LinearNoise) -> View:
    """The view with both predictions, as sampling gives them."""
    text = model.unconditional(len(view.latents))
    halves = {"conditional": view.text, "unconditional": text}
    view.noises = {half: model.predict_noise(view.latents, 400, own) for half, own in halves.items()}
    return view


def test_every_localizer_of_the_package_says_what_it_is() -> None:
    shipped = {c.names["region"]: build(c.settings.region, "region") for c in region_grid([])}
    assert sorted(shipped) == options("region") == ["bright_ending", "curvature_difference", "score_difference"]
    for one in shipped.values():
        assert one.title
        assert one.summary
        assert one.citation.startswith("@")


@pytest.mark.parametrize("probes", [1, 5])
def test_curvature_of_independent_coordinates_is_exact(probes: int) -> None:
    """diag(A - B) is (1, 4) whatever the latents, 5 over channels; of the negative nothing is left."""
    one, other = ([[2.0, 0.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, -1.0]])
    model, latents = LinearNoise(one, other), [[5.0, 2.0], [0.0, 1.0]]
    heat = CurvatureDifference(probes=probes).observe(model.view(latents, **LAST))["heat"]
    assert heat.tolist() == [[[5]], [[5]]]
    heat = CurvatureDifference(probes=probes).observe(LinearNoise(other, one).view(latents, **LAST))["heat"]
    assert heat.tolist() == [[[0]], [[0]]]


def test_curvature_of_one_probe_by_hand() -> None:
    """Of A - B = (1 1; -4 4), v (A - B)^T v is 1 + 4 plus v1 v2 (1 - 4) over both channels."""
    signs = random_signs((2, 1, 1), 1).flatten().tolist()
    assert set(signs) <= {1, -1}
    heat = CurvatureDifference(probes=1).observe(LinearNoise(A, B).view([[5.0, 2.0]], **LAST))["heat"]
    assert heat.tolist() == [[[5 - 3 * signs[0] * signs[1]]]]


def test_score_difference_by_hand() -> None:
    """(A - B) (5, 2) = (7, -12), |.|^2 = 193, over sigma^2 = 0.64."""
    model = LinearNoise(A, B)
    heat = ScoreDifference().observe(noises(model.view([[5.0, 2.0]], **LAST), model))["heat"]
    torch.testing.assert_close(heat, torch.tensor([[[193 / 0.64]]]))


def test_maps_are_those_of_the_last_step_alone() -> None:
    model = LinearNoise(A, B)
    assert CurvatureDifference().observe(model.view([[5.0, 2.0]], number=2, timestep=400)) == {}


def test_end_attention_is_the_mask_of_bright_ending(tiny: Diffusion) -> None:
    latents, text = generation(tiny, 4)
    found = score_of(tiny, EndAttention())
    mask = bright_ending(tiny, [PROMPT] * 4, text, latents)
    torch.testing.assert_close(found.tensors["heat"], mask, rtol=0, atol=1e-4)
    assert found.score == pytest.approx(float(mask.mean()), abs=1e-4)
    images = tiny.generate(text, latents)
    assert found.picture is not None
    torch.testing.assert_close(torch.stack(found.picture.chunk(4, 2)), images, rtol=0, atol=1e-3)


def test_maps_do_not_depend_on_the_rest_of_the_batch(tiny: Diffusion) -> None:
    every: dict[str, RegionLocalizer] = {"curvature": CurvatureDifference(seeds=2), "score": ScoreDifference(seeds=2)}
    together, costs = watch(tiny, every, [PROMPT], batch_size=2)
    for name, one in every.items():
        alone = watch(tiny, {"it": one}, [PROMPT], batch_size=1)[0]["it"][0].tensors["heat"]
        torch.testing.assert_close(together[name][0].tensors["heat"], alone, rtol=1e-2, atol=1e-3)
        assert len({tuple(own.flatten().tolist()) for own in alone}) == 2
    # Sampling makes 2 x 4 passes of either image, the curvature two more and 16 derivatives of those.
    assert costs["score"].row_passes == 2 * 2 * 4
    assert costs["curvature"].row_passes == 2 * 2 * 4 + 2 * 2 * 17


def test_maps_that_are_not_finite_are_said_to_be() -> None:
    heat = torch.tensor([[[float("nan")]]])
    with pytest.raises(NotFiniteError, match="heat maps are not finite"):
        ScoreDifference(seeds=1).score(None, PROMPT, [{"heat": heat}], torch.zeros(1, 3, 1, 1))  # type: ignore[arg-type]


def test_families_are_refused_that_a_localizer_does_not_suit() -> None:
    CurvatureDifference().check("StableDiffusionXLPipeline", 7.5)
    with pytest.raises(ModelError, match="made for StableDiffusionPipeline"):
        EndAttention().check("StableDiffusionXLPipeline", 7.5)
    for one in (CurvatureDifference(), ScoreDifference()):
        with pytest.raises(ModelError, match="watches guided sampling"):
            one.check("StableDiffusionPipeline", 1.0)
        with pytest.raises(ModelError, match="FluxPipeline"):
            one.check("FluxPipeline", 3.5)
