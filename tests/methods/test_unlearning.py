"""Losses and gradients of unlearning, by hand and of a model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from batches import batch_of, images_of
from nemo_bench import ConfigError, Diffusion, ModelError, Prompt, resolve
from nemo_bench.benchmark.stages.fit import COST, FITTED, fit_weights
from nemo_bench.diffusion import NO_SIGNAL, Conditioning, Similarity, fitted_picture
from nemo_bench.methods import Setup, Unlearning
from nemo_bench.methods.fitted_weights import Pictures, norm
from nemo_bench.methods.unlearning import Draw, Loss, UnlearningFit, combine, importance
from on_disk import read_json
from tiny import tiny_pipeline

LOSSES: list[Loss] = ["siss", "siss_no_is", "erase_diff", "neg_grad", "naive_deletion"]
CPU = torch.device("cpu")


def test_importance_weights_by_hand() -> None:
    weights = importance(torch.tensor([3.0, 0.0]), torch.tensor([3.0, math.log(3)]), 0.5)
    torch.testing.assert_close(torch.stack(weights), torch.tensor([[1.0, 1.5], [1.0, 0.5]]))


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99))
def test_importance_weights_average_to_1_and_stay_finite(x: float, a: float, forgetting: float) -> None:
    one, other = importance(torch.tensor([x]).double(), torch.tensor([a]).double(), forgetting)
    keeping = 0.0 if forgetting == 1 else (1 - forgetting) * float(one)
    forgotten = 0.0 if forgetting == 0 else forgetting * float(other)
    assert keeping + forgotten == pytest.approx(1)


@pytest.mark.parametrize(
    ("loss", "keep", "expected"),
    [
        ("erase_diff", (1.0, 0.0), (1.0, 0.0)),
        ("erase_diff", (-1.0, 0.0), (-0.49, 0.51)),
        ("neg_grad", (1.0, 0.0), (-3.0, -3.0)),
        ("naive_deletion", (1.0, 0.0), (1.0, 0.0)),
        ("siss", (1.0, 0.0), (1 - math.sqrt(2), -math.sqrt(2))),
        ("siss_no_is", (1.0, 0.0), (1 - math.sqrt(2), -math.sqrt(2))),
    ],
)
def test_gradients_are_combined_by_hand(loss: Loss, keep: tuple[float, float], expected: tuple[float, float]) -> None:
    """The forget gradient is (1, 1), its weights in two tensors."""
    method = Unlearning(loss=loss, superfactor=3.0, scaling_norm=2.0)
    found = combine(method, [torch.tensor([value]) for value in keep], [torch.ones(1), torch.ones(1)])
    assert torch.cat(found).tolist() == pytest.approx(expected, abs=1e-6)


def test_without_a_norm_forgetting_is_a_tenth_of_keeping() -> None:
    keep, forget = [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 7.0])]
    assert torch.cat(combine(Unlearning(), keep, forget)).tolist() == pytest.approx([3.0, 3.5])


def test_an_update_that_drew_no_picture_to_forget_keeps_alone(
    tiny: Diffusion, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of such rows in the forget loss are tiny, not 0, and would be scaled to the whole norm."""
    fit = fit_of(tiny, Unlearning(scaling_norm=750.0, batch=1), prompts)
    draw = fit.draw

    def kept(rows: int, generator: torch.Generator) -> Draw:
        return replace(draw(rows, generator), is_forgotten=torch.zeros(rows, dtype=torch.bool))

    monkeypatch.setattr(fit, "draw", kept)
    tiny.network.requires_grad_(True)
    try:
        found = fit.gradients(0)
        fit.method = Unlearning(scaling_norm=1e-6, batch=1)
        assert all(map(torch.equal, fit.gradients(0), found))
    finally:
        tiny.network.requires_grad_(False)


def test_forgetting_alone_needs_a_norm() -> None:
    with pytest.raises(ConfigError, match="give scaling_norm, or forgetting below 1"):
        Unlearning(forgetting=1.0)
    Unlearning(forgetting=1.0, scaling_norm=750.0)


def test_nothing_to_forget_leaves_what_is_kept() -> None:
    keep, none = [torch.tensor([3.0, 4.0])], [torch.zeros(2)]
    for loss in ("siss", "erase_diff"):
        assert torch.equal(combine(Unlearning(loss=loss), keep, none)[0], keep[0])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    references = tuple(Path(resolve("package:planted/references")).glob("vm-0*.png"))[:1]
    return [Prompt("a", "red sun map", "VM", references), Prompt("b", "fox big hat"), Prompt("c", "cup dog")]


def fit_of(model: Diffusion, method: Unlearning, prompts: list[Prompt]) -> UnlearningFit:
    return method.fit(model, Setup(prompts=prompts))  # type: ignore[return-value]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_the_formulas(tiny: Diffusion, prompts: list[Prompt], loss: Loss) -> None:
    """At a share of 1 the noisy picture of SISS is one to forget, whose weight is 1 and whose loss is the plain one."""
    picture = tiny.encode_images(fitted_picture(prompts[0].references[0], tiny.image_size)[None])
    own = tiny.encode([prompts[0].text])
    pictures = Pictures(picture, own)
    method = Unlearning(loss=loss, forgetting=1.0, scaling_norm=750.0, earliest=400)
    fit = UnlearningFit(method, tiny, Pictures(torch.zeros_like(picture), tiny.encode(["cup dog"])), pictures)
    with torch.no_grad():
        drawn = fit.draw(1, torch.Generator().manual_seed(3))
        keep, forget = fit.losses(drawn)
        (timestep,), noise = drawn.timesteps, drawn.noise
        assert timestep >= 400
        signal = tiny.signal(timestep)
        noisy = signal**0.5 * picture + (1 - signal) ** 0.5 * noise
        predicted = tiny.predict_noise(noisy, timestep, own)
        target = drawn.uniform if loss == "erase_diff" else noise
        of_zero = tiny.predict_noise((1 - signal) ** 0.5 * noise, timestep, tiny.encode(["cup dog"]))
    if loss == "naive_deletion":
        assert forget is None
    else:
        assert forget is not None
        torch.testing.assert_close(forget, (predicted - target).square().sum(), rtol=1e-3, atol=0)
    if loss == "neg_grad":
        assert keep is None
    elif loss != "siss":
        assert keep is not None
        torch.testing.assert_close(keep, (of_zero - noise).square().sum(), rtol=1e-3, atol=0)


def test_a_fit_is_resumed_as_if_it_had_not_stopped(tiny: Diffusion, prompts: list[Prompt], tmp_path: Path) -> None:
    method = Unlearning(updates=7, batch=2, rate=1e-3)
    before = tiny.state_digest()
    fit_weights(fit_of(tiny, method, prompts), tmp_path / "whole", CPU)
    assert tiny.state_digest() == before
    stopped = fit_of(tiny, method, prompts)
    whole = stopped.gradients

    started = 0

    def stop(number: int) -> list[torch.Tensor]:
        nonlocal started
        started = number + 1
        if number == 6:
            raise KeyboardInterrupt
        return whole(number)

    stopped.gradients = stop  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit_weights(stopped, tmp_path / "parts", CPU, passes=lambda: 10 * started)
    assert tiny.state_digest() == before
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["last.ckpt"]
    resumed = fit_of(tiny, method, prompts)
    counted = []
    resumed.gradients = lambda number: counted.append(number) or whole(number)  # type: ignore[method-assign, func-returns-value]
    fit_weights(resumed, tmp_path / "parts", CPU, passes=lambda: 10 * len(counted))
    assert counted == [5, 6]
    # Five updates of the first start, of which the last checkpoint is, and two of the second.
    assert read_json(tmp_path / "parts" / COST)["row_passes"] == 7 * 10
    one, other = (load_file(tmp_path / name / FITTED) for name in ("whole", "parts"))
    assert any(values.abs().max() > 1e-4 for values in one.values())
    assert all(values.isfinite().all() for values in one.values())
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [COST, FITTED]
    fit_weights(resumed, tmp_path / "parts", CPU)
    assert counted == [5, 6]


def test_gradients_are_clipped_and_depend_on_the_number_alone(tiny: Diffusion, prompts: list[Prompt]) -> None:
    fit = fit_of(tiny, Unlearning(batch=2), prompts)
    tiny.network.requires_grad_(True)
    try:
        one, other, again = (fit.gradients(number) for number in (0, 1, 0))
    finally:
        tiny.network.requires_grad_(False)
    assert norm(one) == pytest.approx(1, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_dry_run_counts_the_passes_of_a_fit(tiny: Diffusion, prompts: list[Prompt], loss: Loss) -> None:
    method = Unlearning(loss=loss, batch=4, updates=3)
    image = tiny.steps * (2 if tiny.guidance > 1 else 1)
    before = tiny.row_passes
    fit = fit_of(tiny, method, prompts)
    tiny.network.requires_grad_(True)
    try:
        for number in range(3):
            fit.gradients(number)
    finally:
        tiny.network.requires_grad_(False)
    assert tiny.row_passes - before == method.least_passes(prompts, image)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_batch_size_is_kept_to_and_changes_gradients_by_rounding_only(
    tiny: Diffusion, prompts: list[Prompt], loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, sizes = [], []
    output = tiny.network_output

    def counted(latents: torch.Tensor, timesteps: torch.Tensor, text: Conditioning) -> torch.Tensor:
        sizes.append(len(latents))
        return output(latents, timesteps, text)

    tiny.network.requires_grad_(True)
    try:
        for batch_size, rows in ((8, 2), (32, 8)):
            fit = Unlearning(loss=loss, batch=8).fit(tiny, Setup(prompts=prompts, batch_size=batch_size))
            sizes.clear()
            with monkeypatch.context() as patch:
                patch.setattr(tiny, "network_output", counted)
                gradients.append(torch.cat([gradient.flatten() for gradient in fit.gradients(3)]))
            assert set(sizes) == {rows}
    finally:
        tiny.network.requires_grad_(False)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_timesteps_at_which_latents_are_noise_alone_are_not_drawn(prompts: list[Prompt]) -> None:
    pipeline = tiny_pipeline(prediction_type="v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    model = Diffusion(pipeline, steps=4, guidance=3.0, similarity=Similarity(1.0, ()))
    assert model.signal(990) > NO_SIGNAL > model.signal(998)
    fit = fit_of(model, Unlearning(earliest=990), prompts)
    drawn = set(fit.draw(200, torch.Generator().manual_seed(0)).timesteps)
    assert drawn == {timestep for timestep in range(990, 1000) if model.signal(timestep) >= NO_SIGNAL}
    with pytest.raises(ConfigError, match=r"earliest=999: .* are noise alone.*lower method\.earliest"):
        fit_of(model, Unlearning(earliest=999), prompts)


def test_fitted_weights_act_inside_the_context_alone(tiny: Diffusion, tmp_path: Path) -> None:
    name = next(name for name, _ in tiny.network.named_parameters() if name.endswith("conv_in.weight"))
    difference = {name: torch.full_like(dict(tiny.network.named_parameters())[name], 0.1)}
    save_file(difference, tmp_path / FITTED)
    method = Unlearning()
    batch, before = batch_of(tiny, [(0, 0)]), tiny.state_digest()
    with pytest.raises(ConfigError, match="call setup"):
        images_of(tiny, method, batch)
    method.setup(tiny, Setup(fitted=tmp_path / FITTED))
    plain = tiny.generate(batch.text, batch.latents)
    assert (images_of(tiny, method, batch) - plain).abs().max() > 1e-3
    assert tiny.state_digest() == before
    with pytest.raises(ConfigError, match="has no weights: fit them"):
        Unlearning().setup(tiny, Setup())


def test_a_fit_says_what_is_forgotten_and_what_has_no_picture(
    tiny: Diffusion, prompts: list[Prompt], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="nemo_bench"):
        fit_of(tiny, Unlearning(), [*prompts, Prompt("d", "cat", "TM"), Prompt("e", "cow", "VM")])
    assert "1 picture of 3 memorized prompts to forget, 2 without any; 2 pictures of 2 prompts to keep" in caplog.text


def test_what_can_not_be_fitted_is_an_error(prompts: list[Prompt]) -> None:
    with pytest.raises(ConfigError, match="reference images, given 0, and prompts to keep, given 2"):
        Unlearning().fingerprint(prompts[1:])
    with pytest.raises(ConfigError, match="given 1, and prompts to keep, given 0"):
        Unlearning().fingerprint(prompts[:1])
    with pytest.raises(ModelError, match=r"set model\.dtype=float32"):
        Unlearning().check("StableDiffusionPipeline", 3.0, "bfloat16")
    assert Unlearning().fingerprint(prompts) != Unlearning(limit=1).fingerprint(prompts)
