"""What every localizer keeps to, and hand-computed cases of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typing_extensions import override

from nemo_bench import Diffusion, Prompt, resolve
from nemo_bench.config import build, grid, options
from nemo_bench.errors import ConfigError, NotFiniteError
from nemo_bench.localization import Calibration
from nemo_bench.localization.localizers import (
    Activation,
    HardConcrete,
    Inputs,
    IntegratedGradients,
    Localizer,
    OutlierScore,
    RandomOrder,
    Slimming,
    ZeroOut,
    ranks,
)
from nemo_bench.localization.localizers.hard_concrete import chance_of_any, hard_concrete, start_of
from nemo_bench.localization.objectives import Magnitude, NoiseDifference, Objective, Replay
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Neurons
from nemo_bench.records.io import write_json
from nemo_bench.records.truth import Truth

PICTURES = tuple(Path(resolve("package:planted/references")).glob("vm-0[12].png"))
PROMPT = Prompt("a", "red sun map", "VM", PICTURES)
SMALL = {"samples": 1, "steps": 3, "theta_min": 4.0}
"""Settings under which every localizer is quick, where it has them."""


def localizer(name: str, tiny: Diffusion, folder: Path, **settings: Any) -> Localizer:
    """A localizer as its file sets it, but small."""
    truth = folder / "truth.json"
    first = next(iter(tiny.masks.widths))
    write_json(truth, Truth(schema=1, neurons={PROMPT.id: Neurons({first: [1, 5]})}))
    (choice,) = grid([f"localizer={name}", f"model.truth={truth}", "method=none"])
    node = choice.settings.localizer
    changes = {**{key: value for key, value in SMALL.items() if key in node}, **settings}
    found: Localizer = build({**node, **changes}, "localizer")
    return found


def inputs(model: Diffusion, calibration: Calibration, batch_size: int = 32, count: int | None = None) -> Inputs:
    latents = model.latents(seeds_of(PROMPT, "localize", range(2)))
    return Inputs(latents=latents, calibration=calibration, batch_size=batch_size, count=count)


@pytest.mark.parametrize("name", options("localizer"))
def test_every_localizer_keeps_to_the_contract(
    tiny: Diffusion, tiny_calibration: Calibration, tmp_path: Path, name: str
) -> None:
    own = localizer(name, tiny, tmp_path)
    digest, before = tiny.state_digest(), tiny.row_passes
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in tiny.modules())
    own.setup(tiny, 32)
    found = own.localize(tiny, PROMPT, inputs(tiny, tiny_calibration))
    assert found.row_passes == tiny.row_passes - before
    assert tiny.state_digest() == digest
    assert hooks == sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in tiny.modules())
    assert {layer: len(values) for layer, values in found.scores.items()} == tiny.masks.widths
    assert all(np.isfinite(values).all() for values in found.scores.values())
    tiny.masks.check(found.neurons)
    again = localizer(name, tiny, tmp_path).localize(tiny, PROMPT, inputs(tiny, tiny_calibration, 13))
    assert again.neurons == found.neurons
    for layer, values in found.scores.items():
        assert again.scores[layer] == pytest.approx(values, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("activation", 0),
        ("outlier_score", 0),
        ("random_order", 0),
        ("truth", 0),
        # 80 neurons, besides a pass with nothing off.
        ("zero_out", 1 + 80),
        # Seven layers and 3 points, forward and backward.
        ("integrated_gradients", 7 * 3 * 2),
        ("slimming", 3 * 2),
        ("hard_concrete", 3 * 2),
    ],
)
def test_passes_are_those_of_the_paper(
    tiny: Diffusion, tiny_calibration: Calibration, tmp_path: Path, name: str, passes: int
) -> None:
    own = localizer(name, tiny, tmp_path)
    found = own.localize(tiny, PROMPT, inputs(tiny, tiny_calibration))
    assert sum(tiny.masks.widths.values()) == 80
    assert found.row_passes == passes
    assert own.makes_passes == (passes > 0)
    assert min(passes, 1) <= own.least_passes({}) <= passes
    assert own.least_passes(tiny.masks.widths) == passes


def test_a_set_has_the_size_asked_for(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    def size(own: Localizer, count: int | None) -> Neurons:
        return own.localize(tiny, PROMPT, inputs(tiny, tiny_calibration, count=count)).neurons

    assert size(RandomOrder(), 7).count == 7
    assert size(RandomOrder(number=5), 7).count == 5
    by_share = size(RandomOrder(share=0.25), None)
    assert {layer: len(ids) for layer, ids in by_share.items()} == {
        layer: width // 4 for layer, width in tiny.masks.widths.items()
    }
    assert all(len(ids) == 1 for ids in size(RandomOrder(share=0.0), None).values())


class Toy(Objective):
    """A loss of the factors of one layer alone, whose slope is known."""

    power = 1

    @override
    def prepare(self, prompt: Prompt) -> None:
        self.layer, width = next(iter(self.model.masks.widths.items()))
        self.weights = torch.arange(1.0, width + 1)
        projection = self.model.value_layers[self.layer]
        self.plain = projection(self.text.text)[0, 1].detach()

    @override
    def losses(self, draws: Sequence[int]) -> Tensor:
        text = self.rows(len(draws)).text
        values = self.model.value_layers[self.layer](text)[:, 1]
        nothing = sum(0 * layer(text).sum((1, 2)) for layer in self.model.value_layers.values())
        return nothing - ((values / self.plain) ** self.power * self.weights).sum(1)


class Square(Toy):
    power = 2


@pytest.mark.parametrize("kind", [Toy, Square])
def test_integrated_gradients_add_up_to_what_a_layer_gives(tiny: Diffusion, kind: type[Toy]) -> None:
    # For sum(c m) the slope is c; for sum(c m^2) its mean over the path from 0 to 1 is c as well.
    objective = kind(tiny, PROMPT, 2, 32)
    scores = IntegratedGradients(steps=5).attribute(objective, PROMPT)
    assert scores[objective.layer].tolist() == pytest.approx(objective.weights.tolist(), rel=1e-4)
    others = [values for layer, values in scores.items() if layer != objective.layer]
    assert all(not values.any() for values in others)


def test_zero_out_is_the_rise_of_the_loss(tiny: Diffusion) -> None:
    objective = Toy(tiny, PROMPT, 2, 5)
    scores = ZeroOut().attribute(objective, PROMPT)
    assert scores[objective.layer].tolist() == pytest.approx(objective.weights.tolist(), rel=1e-4)
    assert all(not values.any() for layer, values in scores.items() if layer != objective.layer)


@pytest.mark.parametrize("kind", [Slimming, HardConcrete])
def test_pruning_keeps_the_neurons_that_the_loss_needs(tiny: Diffusion, kind: type[Slimming | HardConcrete]) -> None:
    objective = Toy(tiny, PROMPT, 1, 32)
    found = kind(steps=60, rate=0.1, weight=100.0).attribute(objective, PROMPT)
    scores = {layer: values.detach() for layer, values in found.items()}
    needed, others = scores[objective.layer], [v for layer, v in scores.items() if layer != objective.layer]
    assert needed[-4:].min() > max(values.max() for values in others) + 0.2


def test_hard_concrete_numbers_of_the_paper() -> None:
    half, zero = torch.tensor(0.5), torch.tensor(0.0)
    assert float(hard_concrete(zero, half, 1.0)) == pytest.approx(0.5)
    assert float(chance_of_any(zero, 1.0)) == pytest.approx(1 / (1 + math.exp(-2.398)), abs=1e-4)
    assert round(float(chance_of_any(zero, 1.0)), 3) == 0.917
    assert start_of(0.5) == pytest.approx(0.0)
    assert start_of(0.9) == pytest.approx(math.log(5))
    assert float(hard_concrete(zero, torch.tensor(1e-4), 0.33)) == 0
    assert float(hard_concrete(zero, torch.tensor(1 - 1e-4), 0.33)) == 1


def test_activation_is_weighted_by_output_vectors(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    given_inputs = inputs(tiny, tiny_calibration)
    weighted, plain = (Activation(weighted=w).score(tiny, PROMPT, given_inputs) for w in (True, False))
    layer = next(iter(tiny.masks.widths))
    output = tiny.unet.get_submodule(layer.replace("to_v", "to_out.0")).weight
    expected = tiny.value_layers[layer](tiny.encode([PROMPT.text]).text)[0].abs().mean(0)
    assert torch.allclose(plain[layer], expected)
    assert torch.allclose(weighted[layer], expected * torch.stack([column.norm() for column in output.T]))


def test_outlier_scores_are_deviations_from_general_prompts(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    scores = OutlierScore().score(tiny, PROMPT, inputs(tiny, tiny_calibration))
    layer = list(tiny.masks.widths)[2]
    active = Activation(weighted=False).score(tiny, PROMPT, inputs(tiny, tiny_calibration))[layer]
    expected = (active[3] - tiny_calibration.mean[layer][3]).abs() / tiny_calibration.std[layer][3]
    assert float(scores[layer][3]) == pytest.approx(float(expected))


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=12), st.integers(1, 3))
def test_ranks_order_all_neurons_by_score(values: list[float], width: int) -> None:
    scores = {"b": np.float32(values[:width]), "a": np.float32(values[width:])}
    places = ranks(scores, "prompt")
    assert {layer: len(own) for layer, own in places.items()} == {"a": len(values) - width, "b": width}
    pairs = sorted(
        (place, score) for layer in scores for place, score in zip(places[layer], scores[layer], strict=True)
    )
    assert [place for place, _ in pairs] == list(range(len(values)))
    assert [score for _, score in pairs] == sorted((float(v) for v in np.float32(values)), reverse=True)
    reordered = ranks({"a": scores["a"], "b": scores["b"]}, "prompt")
    assert all(np.array_equal(reordered[layer], places[layer]) for layer in places)


def test_equal_scores_prefer_no_layer() -> None:
    scores = {"a": np.zeros(50, np.float32), "b": np.zeros(50, np.float32)}
    first = [int((ranks(scores, f"prompt {number}")["a"] < 10).sum()) for number in range(40)]
    assert 4 < np.mean(first) < 6
    assert len(set(first)) > 1


def test_objectives_have_the_same_draws_whatever_is_off(tiny: Diffusion) -> None:
    everything = Neurons({layer: range(width) for layer, width in tiny.masks.widths.items()})
    for kind in (Replay, Magnitude, NoiseDifference):
        objective, again = (kind(tiny, PROMPT, 3, 2) for _ in range(2))
        with torch.no_grad():
            on = objective.losses([0, 1, 2])
            assert torch.allclose(on, again.losses([0, 1, 2]))
            assert torch.allclose(on[[2, 0]], objective.losses([2, 0]), atol=1e-5)
            with tiny.block(everything):
                off = objective.losses([0, 1, 2])
        assert (off - on).abs().min() > 1e-3
        if kind is NoiseDifference:  # of the others a model that has learnt nothing knows nothing
            assert (off > on).all()


def test_replay_looks_at_the_noisier_half(tiny: Diffusion) -> None:
    steps = Replay(tiny, PROMPT, 4, 32).timesteps.tolist()
    assert steps == [562, 687, 812, 937]


def test_replay_needs_a_training_image(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    with pytest.raises(NotFiniteError, match="objective=magnitude"):
        ZeroOut(samples=1).localize(tiny, PROMPT._replace(references=()), inputs(tiny, tiny_calibration))


def test_scores_of_general_prompts_are_subtracted(
    tiny: Diffusion, tiny_calibration: Calibration, tmp_path: Path
) -> None:
    file = tmp_path / "general.jsonl"
    file.write_text('{"id": "g", "text": "big hat cup"}\n{"id": "h", "text": "dog ice jam"}\n')
    small: dict[str, Any] = {"objective": "magnitude", "samples": 1, "general": str(file)}
    own, plain = ZeroOut(**small, center=1), ZeroOut(**small, center=0)
    own.setup(tiny, 32)
    given_inputs = inputs(tiny, tiny_calibration)
    general = plain.score(tiny, Prompt("g", "big hat cup"), given_inputs)
    before = plain.score(tiny, PROMPT, given_inputs)
    for layer, values in own.score(tiny, PROMPT, given_inputs).items():
        assert torch.allclose(values, before[layer] - general[layer], atol=1e-6)
    assert own.fingerprint([PROMPT]) != ZeroOut(**small, center=2).fingerprint([PROMPT])
    assert plain.fingerprint([PROMPT]) == {"general": None}


def test_settings_that_can_not_work_are_explained(tiny: Diffusion) -> None:
    with pytest.raises(ConfigError, match="noise_difference is as low as it can be"):
        Slimming(objective="noise_difference")
    with pytest.raises(ConfigError, match=r"prompts\.calibration"):
        ZeroOut(objective="magnitude").fingerprint([])
    with pytest.raises(ConfigError, match="share=2"):
        RandomOrder(share=2.0)
