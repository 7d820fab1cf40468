from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference_nemo
from nemo_bench import Calibration, Diffusion
from nemo_bench.errors import ConfigError, ModelError, StoreError
from nemo_bench.localization import (
    activation_moments,
    activation_statistics,
    activations,
    merge_statistics,
    name_layers,
    read_statistics,
    save_moments,
    threshold,
    thresholds,
    write_statistics,
)
from nemo_bench.localization.calibration import Moments, Statistics
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


def published_of(widths: list[int]) -> Statistics:
    numbers = torch.Generator().manual_seed(0)
    return tuple([torch.rand(width, generator=numbers) for width in widths] for _ in range(2))


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4), min_size=2, max_size=6), st.integers(1, 5))
def test_moments_merge_to_those_of_all_rows(parts: list[list[float]], cut: int) -> None:
    cut = min(cut, len(parts) - 1)
    sides = [Moments(), Moments()]
    for number, part in enumerate(parts):
        sides[number >= cut].add(torch.tensor(part, dtype=torch.float64)[:, None])
    sides[0].merge(sides[1])
    values = np.concatenate(parts)
    assert sides[0].count == len(values)
    np.testing.assert_allclose(sides[0].mean.numpy(), [values.mean()], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sides[0].std.numpy(), [values.std(ddof=1)], rtol=1e-6, atol=1e-6)


def test_merging_into_nothing_changes_no_bit() -> None:
    part, whole = Moments(), Moments()
    part.add(torch.rand(7, 33, generator=torch.Generator().manual_seed(0)))
    whole.merge(part)
    assert torch.equal(whole.mean, part.mean)
    assert torch.equal(whole.squares, part.squares)


def test_statistics_of_parts_on_disk_are_those_of_all_prompts(tiny: Diffusion, tmp_path: Path) -> None:
    texts = tiny_texts(11)
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for file, part in zip(files, (texts[:5], texts[5:6], texts[6:]), strict=True):
        save_moments(file, activation_moments(tiny, [part[:2], part[2:]] if part[2:] else [part]))
    mean, std = name_layers(merge_statistics(files), tiny.masks.widths)
    whole_mean, whole_std = activation_statistics(tiny, [texts])
    for layer in whole_mean:
        torch.testing.assert_close(mean[layer], whole_mean[layer])
        torch.testing.assert_close(std[layer], whole_std[layer])
    assert sorted(tmp_path.iterdir()) == files


def test_missing_or_torn_moments_are_an_error_that_names_the_file(tiny: Diffusion, tmp_path: Path) -> None:
    save_moments(tmp_path / "a.safetensors", activation_moments(tiny, [tiny_texts(2)]))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:100])
    for name in ("b", "c"):
        with pytest.raises(StoreError, match=rf"{name}\.safetensors can't be read .* run again"):
            merge_statistics([tmp_path / "a.safetensors", tmp_path / f"{name}.safetensors"])


def test_the_published_form_is_read_as_it_is_and_written_again(tmp_path: Path) -> None:
    widths = [320, 320, 640, 640, 1280, 1280, 1280]
    torch.save(published_of(widths), tmp_path / "published.pt")
    read = read_statistics(tmp_path / "published.pt")
    write_statistics(tmp_path / "written.pt", read)
    content = torch.load(tmp_path / "written.pt", weights_only=True)
    assert type(content) is tuple
    for sides in (read, content):
        for side, expected in zip(sides, published_of(widths), strict=True):
            assert isinstance(side, list)
            assert all(map(torch.equal, side, expected))
    write_statistics(tmp_path / "again.pt", read)
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "written.pt").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_calibration_is_handed_on_in_the_published_form(
    tiny: Diffusion, tiny_calibration: Calibration, tmp_path: Path
) -> None:
    mean, std = ([*part.values()] for part in (tiny_calibration.mean, tiny_calibration.std))
    write_statistics(tmp_path / "statistics.pt", (mean, std))
    again = Calibration.published(tmp_path / "statistics.pt", tiny, 0.428)
    assert (again.threshold, again.prompts) == (0.428, 0)
    assert list(again.mean) == list(tiny_calibration.mean)
    assert all(torch.equal(again.mean[k], v) for k, v in tiny_calibration.mean.items())
    assert all(torch.equal(again.std[k], v) for k, v in tiny_calibration.std.items())


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"mean": torch.ones(3), "std": torch.ones(3)},
        ([torch.ones(3)], [torch.ones(3)], 0.428),
        ([], []),
        ([torch.ones(3)], [torch.ones(4)]),
        ([torch.ones(3), torch.ones(3)], [torch.ones(3)]),
        ([torch.ones(3, 2)], [torch.ones(3, 2)]),
        ([torch.tensor([1.0, float("nan")])], [torch.ones(2)]),
        ([1.0], [2.0]),
        (Path("unsafe"), Path("unsafe")),
    ],
)
def test_a_file_without_statistics_is_an_error(content: object, tmp_path: Path) -> None:
    path = tmp_path / "statistics.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(ModelError, match=r"statistics\.pt: no activation statistics .* one 1-D tensor a value layer"):
        read_statistics(path)


@pytest.mark.parametrize("change", [lambda w: w[:-1], lambda w: [*w, 8], lambda w: w[::-1]])
def test_statistics_of_another_model_are_refused(
    change: Callable[[list[int]], list[int]], tiny: Diffusion, tmp_path: Path
) -> None:
    widths = list(tiny.masks.widths.values())
    given = change(widths)
    write_statistics(tmp_path / "statistics.pt", published_of(given))
    with pytest.raises(ModelError) as error:
        Calibration.published(tmp_path / "statistics.pt", tiny, 0.4)
    assert f"{len(given)} layers with {given} neurons, the model has 7 value layers with {widths}" in str(error.value)


def test_thresholds_are_those_of_pairs_and_of_the_most_alike_pair_of_each_prompt() -> None:
    found = thresholds([[0.1, 0.3], [0.2, 0.6], [0.0, 0.6]])
    # Pairs: mean 0.3, sum of squared deviations 0.32 over 5. Maxima 0.3, 0.6, 0.6: mean 0.5, 0.06 over 2.
    assert found["threshold"] == pytest.approx(0.3 + (0.32 / 5) ** 0.5)
    assert (found["passed_gate"], found["prompts"]) == (2, 3)
    assert found["maxima"]["threshold"] == pytest.approx(0.5 + 0.03**0.5)
    assert found["maxima"]["passed_gate"] == 0


def test_a_gate_of_maxima_needs_a_measured_calibration() -> None:
    given = Calibration({}, {}, 0.428)
    assert given.gate(0.5, "pairs") == 0.5
    with pytest.raises(ConfigError, match="gate=maxima needs"):
        given.gate(0.5, "maxima")
    assert Calibration({}, {}, 0.428, maxima=0.6).gate(0.5, "maxima") == 0.6
