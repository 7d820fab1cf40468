from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench import Calibration, ConfigError, Diffusion, Localization, Neurons, Prompt
from nemo_bench.config import build, grid, options
from nemo_bench.methods import Batch, Method, NeMo, NoMitigation, RandomNeurons
from tiny import tiny_texts


def batch_of(model: Diffusion, neurons: tuple[Neurons, ...]) -> Batch:
    texts = tiny_texts(len(neurons))
    prompts = tuple(Prompt(str(i), text) for i, text in enumerate(texts))
    return Batch(prompts, model.encode(texts), model.latents(range(len(neurons))), tuple(range(len(neurons))), neurons)


def images(model: Diffusion, method: Method, batch: Batch) -> torch.Tensor:
    with method.apply(model, batch) as changed:
        return changed.generate_checked(model).images


@pytest.mark.parametrize("method", [NoMitigation(), NeMo(), RandomNeurons(NeMo())])
def test_every_method_leaves_the_model_as_it_was(tiny: Diffusion, method: Method) -> None:
    layer = next(iter(tiny.value_layers))
    batch = batch_of(tiny, (Neurons({layer: [0, 1, 2]}), Neurons()))
    before, plain = tiny.state_digest(), tiny.generate(batch.text, batch.latents)
    images(tiny, method, batch)
    assert tiny.state_digest() == before
    assert torch.equal(tiny.generate(batch.text, batch.latents), plain)


def test_without_neurons_nemo_changes_nothing(tiny: Diffusion) -> None:
    batch = batch_of(tiny, (Neurons(), Neurons()))
    assert torch.equal(images(tiny, NeMo(), batch), images(tiny, NoMitigation(), batch))


def test_a_factor_of_one_changes_nothing(tiny: Diffusion) -> None:
    layer = next(iter(tiny.value_layers))
    batch = batch_of(tiny, (Neurons({layer: range(8)}),))
    assert torch.equal(images(tiny, NeMo(factor=1.0), batch), images(tiny, NoMitigation(), batch))
    assert not torch.equal(images(tiny, NeMo(factor=0.0), batch), images(tiny, NoMitigation(), batch))


def test_initial_and_refined_neurons(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    prompt, latents = Prompt("a", tiny_texts(1)[0]), tiny.latents(range(4))
    found = {}
    for kind in ("refined", "initial"):
        method = NeMo(neurons=kind)  # type: ignore[arg-type]
        method.calibration = tiny_calibration
        found[kind] = method.localize(tiny, prompt, latents)
    assert found["initial"].neurons == found["initial"].initial == found["refined"].initial
    assert not (found["refined"].neurons - found["initial"].neurons)
    assert found["refined"].neurons.count < found["initial"].neurons.count


def test_nemo_without_calibration_says_what_to_do(tiny: Diffusion) -> None:
    with pytest.raises(ConfigError, match="calibrate"):
        NeMo().localize(tiny, Prompt("a", "red sun"), tiny.latents([0, 1]))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"theta": 1.0}, "theta"),
        ({"theta_step": 0.0}, "theta"),
        ({"theta_min": -1.0}, "theta"),
        ({"threshold": 1.5}, "threshold"),
        ({"refine_threshold": -2.0}, "refine_threshold"),
        ({"relative": 0.0}, "relative"),
        ({"outliers": False, "top_k": False}, "candidates"),
    ],
)
def test_nemo_refuses_settings_that_make_no_sense(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        NeMo(**wrong)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_neurons_match_the_count_per_layer_and_avoid_the_source(tiny: Diffusion, data: st.DataObject) -> None:
    widths = tiny.masks.widths
    found = Neurons(
        {name: data.draw(st.lists(st.integers(0, width - 1), max_size=width)) for name, width in widths.items()}
    )
    method, prompt = RandomNeurons(NeMo(), seed=3), Prompt(data.draw(st.text(max_size=5)), "x")
    method.fit({prompt.id: Localization(neurons=found)}, widths)
    drawn = method.localize(tiny, prompt, tiny.latents([0, 1])).neurons
    assert drawn.count == min(found.count, sum(widths.values()) - found.count)
    assert (drawn - found).count == drawn.count
    for name, width in widths.items():
        taken = len(found.get(name, ()))
        if 2 * taken <= width:
            assert len(drawn.get(name, ())) >= taken
    assert drawn == method.localize(tiny, prompt, tiny.latents([0, 1])).neurons


@pytest.mark.parametrize("name", options("method"))
def test_every_method_has_what_its_card_says(name: str) -> None:
    method = build(grid([f"method={name}"])[0].settings.method, "method")
    assert all((method.title, method.summary, method.touches, method.sourcing))
    assert method.citation or method.sourcing in ("a control", "what the file holds")
