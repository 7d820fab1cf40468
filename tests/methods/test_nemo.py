from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from batches import batch_of, images_of
from nemo_bench import Calibration, ConfigError, Diffusion, Neurons, Prompt
from nemo_bench.methods import Batch, Method, NeMo, NoMitigation, RandomNeurons, Setup
from tiny import tiny_texts


def blocked(model: Diffusion, *neurons: Neurons) -> Batch:
    """An image for each set of neurons."""
    return replace(batch_of(model, [(number, 0) for number in range(len(neurons))]), neurons=neurons)


@pytest.mark.parametrize("method", [NoMitigation(), NeMo(), RandomNeurons(NeMo())])
def test_blocking_leaves_the_model_as_it_was(tiny: Diffusion, method: Method) -> None:
    layer = next(iter(tiny.value_layers))
    batch = blocked(tiny, Neurons({layer: [0, 1, 2]}), Neurons())
    before, plain = tiny.state_digest(), tiny.generate(batch.text, batch.latents)
    images_of(tiny, method, batch)
    assert tiny.state_digest() == before
    assert torch.equal(tiny.generate(batch.text, batch.latents), plain)


def test_without_neurons_images_stay_the_same(tiny: Diffusion) -> None:
    batch = blocked(tiny, Neurons(), Neurons())
    assert torch.equal(images_of(tiny, NeMo(), batch), images_of(tiny, NoMitigation(), batch))


def test_only_a_factor_of_one_leaves_images_the_same(tiny: Diffusion) -> None:
    batch = blocked(tiny, Neurons({next(iter(tiny.value_layers)): range(8)}))
    plain = images_of(tiny, NoMitigation(), batch)
    assert torch.equal(images_of(tiny, NeMo(factor=1.0), batch), plain)
    assert not torch.equal(images_of(tiny, NeMo(factor=0.0), batch), plain)


def test_refined_neurons_are_part_of_the_initial_ones(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    refined, initial = NeMo(neurons="refined"), NeMo(neurons="initial")
    results = []
    for method in (refined, initial):
        method.setup(tiny, Setup(calibration=tiny_calibration))
        results.append(method.localize(tiny, Prompt("a", tiny_texts(1)[0]), tiny.latents(range(4))))
    assert results[1].neurons == results[1].initial == results[0].initial
    assert not (results[0].neurons - results[1].neurons)
    assert results[0].neurons.count < results[1].neurons.count


def test_localizing_without_calibration_is_an_error(tiny: Diffusion) -> None:
    with pytest.raises(ConfigError, match="calibrate"):
        NeMo().localize(tiny, Prompt("a", "red sun"), tiny.latents([0, 1]))


def test_arguments_that_exclude_each_other_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"theta=1\.0; expected more than theta_min=1\.0"):
        NeMo(theta=1.0)
    with pytest.raises(ConfigError, match="NeMo needs candidates"):
        NeMo(outliers=False, top_k=False)
