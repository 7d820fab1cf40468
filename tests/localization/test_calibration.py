from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference_nemo
from nemo_bench import Calibration, Diffusion
from nemo_bench.localization import activation_statistics, activations, threshold
from nemo_bench.localization.calibration import Moments
from tiny import tiny_texts


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=2, max_size=6),
    st.floats(-1e6, 1e6),
)
def test_moments_do_not_depend_on_the_batches(batches: list[list[float]], offset: float) -> None:
    moments = Moments()
    for batch in batches:
        moments.add(torch.tensor(batch, dtype=torch.float64)[:, None] + offset)
    values = np.concatenate([np.array(batch) for batch in batches]) + offset
    np.testing.assert_allclose(moments.mean.numpy(), [values.mean()], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(moments.std.numpy(), [values.std(ddof=1)], rtol=1e-6, atol=1e-6)


def test_statistics_agree_with_the_plain_implementation(tiny: Diffusion) -> None:
    texts = tiny_texts(12)
    mean, std = activation_statistics(tiny, [texts[:5], texts[5:]])
    means, stds = reference_nemo.activation_statistics(tiny.pipeline, texts)
    assert list(mean) == list(means)
    for layer in mean:
        torch.testing.assert_close(mean[layer], means[layer].float())
        torch.testing.assert_close(std[layer], stds[layer].float())


def test_activations_need_no_unet_pass(tiny: Diffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the UNet ran")

    monkeypatch.setattr(tiny.unet, "forward", refuse)
    values = activations(tiny, tiny.encode(tiny_texts(3)))
    assert [v.shape for v in values.values()] == [(3, w) for w in tiny.masks.widths.values()]


def test_threshold_is_mean_plus_unbiased_deviation() -> None:
    values = [0.1, 0.2, 0.4]
    assert threshold(values) == pytest.approx(np.mean(values) + np.std(values, ddof=1))


def test_saving_keeps_everything(tiny_calibration: Calibration, tmp_path: Path) -> None:
    tiny_calibration.save(tmp_path / "calibration.safetensors")
    again = Calibration.load(tmp_path / "calibration.safetensors")
    assert (again.threshold, again.prompts) == (tiny_calibration.threshold, tiny_calibration.prompts)
    assert list(again.mean) == list(tiny_calibration.mean)
    assert all(torch.equal(again.std[k], v) for k, v in tiny_calibration.std.items())
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.safetensors"]
