from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nemo_bench import Diffusion
from nemo_bench.diffusion import Similarity
from nemo_bench.localization import REFERENCE, noise_differences, pair_similarities, pair_values, similarity
from tiny import tiny_texts


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


def test_the_published_window_is_eleven_wide() -> None:
    assert Similarity().kernel == 11


@given(st.integers(2, 6))
def test_pairs(count: int) -> None:
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
