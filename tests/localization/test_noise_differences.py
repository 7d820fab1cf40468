from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

import reference_nemo
import torchmetrics_132
from nemo_bench import Diffusion
from nemo_bench.diffusion import Measure, Similarity
from nemo_bench.localization import (
    PAPER,
    REFERENCE,
    noise_differences,
    pair_similarities,
    pair_values,
    similarity,
)
from tiny import tiny_pipeline, tiny_texts


def test_differences_are_scaled_per_row_and_channel(tiny: Diffusion) -> None:
    text, latents = tiny.encode(tiny_texts(2)), tiny.latents([0, 1])
    differences = noise_differences(tiny, text, latents)
    raw = tiny.predict_noise(latents, tiny.timestep(), text) - latents
    for row in range(2):
        for channel in range(4):
            plane = raw[row, channel]
            expected = (plane - plane.min()) / (plane.max() - plane.min())
            torch.testing.assert_close(differences[row, channel], expected)


def test_similarity_of_equal_rows_is_one_and_rows_are_independent() -> None:
    a = torch.rand(3, 4, 48, 48, generator=torch.Generator().manual_seed(0))
    for settings in (Similarity(1.0, ()), Similarity()):
        torch.testing.assert_close(similarity(a, a, settings), torch.ones(3))
        b = torch.cat([a[:1], 1 - a[1:]])
        values = similarity(a, b, settings)
        assert values[0] > 0.999 > values[1:].max()
        torch.testing.assert_close(similarity(a[1:2], b[1:2], settings), values[1:2])


@pytest.mark.parametrize("side", torchmetrics_132.SIDES)
def test_published_similarity_is_that_of_torchmetrics_1_3_2(side: int) -> None:
    """Numbers of that version itself, which the public scripts pin; torchmetrics_132.py wrote them."""
    expected = json.loads(torchmetrics_132.FILE.read_text())[str(side)]
    a, b = torchmetrics_132.pictures(side)
    ours = {
        "ms_ssim": similarity(a, b, Similarity(), "published"),
        "ssim": similarity(a, b, Similarity(1.0, ()), "published"),
    }
    plain = {"ms_ssim": reference_nemo.ms_ssim(a, b, "published"), "ssim": reference_nemo.ssim(a, b, "published")}
    for name, values in expected.items():
        assert ours[name].tolist() == pytest.approx(values, abs=2e-6)
        assert plain[name].tolist() == pytest.approx(values, abs=1e-5)
    assert (similarity(a, b, Similarity()) - ours["ms_ssim"]).abs().max() > 1e-3


@pytest.mark.parametrize("measure", ["current", "fixed"])
def test_other_similarities_are_those_of_the_torchmetrics_installed(measure: Measure) -> None:
    a, b = torchmetrics_132.pictures(48)
    given = {"fixed": 1.0, "current": None}[measure]
    multi = multiscale_structural_similarity_index_measure(
        a, b, kernel_size=11, sigma=1.5, betas=(0.33, 0.33, 0.33), data_range=given, reduction="none"
    )
    single = structural_similarity_index_measure(a, b, sigma=1.0, data_range=given, reduction="none")
    assert isinstance(single, Tensor)
    torch.testing.assert_close(similarity(a, b, Similarity(), measure), multi)
    torch.testing.assert_close(similarity(a, b, Similarity(1.0, ()), measure), single)
    torch.testing.assert_close(reference_nemo.ms_ssim(a, b, measure), multi, rtol=0, atol=1e-5)
    torch.testing.assert_close(reference_nemo.ssim(a, b, measure), single, rtol=0, atol=1e-5)


def test_raw_velocity_is_not_converted() -> None:
    model = Diffusion(tiny_pipeline(prediction_type="v_prediction"), similarity=Similarity(1.0, ()))
    text, latents = model.encode(tiny_texts(1)), model.latents([0])
    with torch.no_grad():
        velocity = model.unet(latents, 981, encoder_hidden_states=text.text).sample
        raw = noise_differences(model, text, latents, PAPER.changed(velocity="raw"))
        converted = noise_differences(model, text, latents)
    difference = (velocity - latents).flatten(2)
    low, high = difference.amin(2, keepdim=True), difference.amax(2, keepdim=True)
    torch.testing.assert_close(raw.flatten(2), (difference - low) / (high - low))
    assert not torch.allclose(raw, converted, atol=1e-2)


@given(st.integers(2, 6))
def test_pair_similarities_are_a_symmetric_matrix_without_diagonal(count: int) -> None:
    differences = torch.rand(count, 4, 16, 16, generator=torch.Generator().manual_seed(count))
    settings = Similarity(1.0, ())
    matrix = pair_similarities(differences, settings)
    assert torch.equal(matrix, matrix.T)
    assert torch.isneginf(matrix.diagonal()).all()
    values = pair_values(matrix)
    assert len(values) == count * (count - 1) // 2
    torch.testing.assert_close(values[0], similarity(differences[:1], differences[1:2], settings)[0])


def test_the_reference_protocol_takes_the_second_step_and_calibrates_with_swapped_halves(tiny: Diffusion) -> None:
    text, latents = tiny.encode(["red sun", "blue sea"]), tiny.latents([0, 1])
    assert (tiny.timestep(0), tiny.timestep(1)) == (981, 961)

    def scaled(noise: Tensor) -> Tensor:
        difference = noise - latents
        low, high = difference.amin((2, 3), keepdim=True), difference.amax((2, 3), keepdim=True)
        return (difference - low) / (high - low)

    with torch.no_grad():
        conditional = tiny.predict_noise(latents, 961, text)
        unconditional = tiny.predict_noise(latents, 961, tiny.encode(["", ""]))
        plain = noise_differences(tiny, text, latents, REFERENCE)
        guided = noise_differences(tiny, text, latents, REFERENCE, calibrating=True)
        unguided = noise_differences(tiny, text, latents, calibrating=True)
    torch.testing.assert_close(plain, scaled(conditional))
    expected = scaled(conditional + 7 * (unconditional - conditional))
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(guided, plain, atol=1e-2)
    torch.testing.assert_close(unguided, scaled(tiny.predict_noise(latents, 981, text)))
