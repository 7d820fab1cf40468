"""Memorization sinks: what is off in each mode, by how much the rest is scaled, and what files are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from batches import batch_of, images_of
from nemo_bench import ConfigError, Diffusion, ModelError, Neurons, Prompt
from nemo_bench.methods import NoMitigation, Sinks

OWN, OTHER, STRANGER = Prompt("vm-01", "red sun map"), Prompt("vm-02", "fox"), Prompt("general-01", "hat")


@pytest.fixture
def training(tmp_path: Path, tiny: Diffusion) -> Path:
    """The folder of a training whose captions have disjoint sinks in two layers."""
    first, *_, last = tiny.value_layers
    pool = {first: [4, 5, 6, 7], last: [6, 7]}
    neurons = {"vm-01": {first: [4, 7], last: [6]}, "vm-02": {first: [6], last: [7]}}
    write(tmp_path, pool=pool, neurons=neurons)
    return tmp_path


def write(folder: Path, **content: Any) -> None:
    (folder / "isolation.json").write_text(json.dumps({"variant": "sinks", "neurons": {}, **content}))


def off(model: Diffusion, prompt: Prompt, folder: Path, **options: Any) -> Neurons:
    return Sinks(str(folder), **options).localize(model, prompt).neurons


def test_modes_by_hand(tiny: Diffusion, training: Path) -> None:
    first, *_, last = tiny.value_layers
    pool = Neurons({first: [4, 5, 6, 7], last: [6, 7]})
    for prompt in (OWN, OTHER, STRANGER):
        assert off(tiny, prompt, training) == off(tiny, prompt, training, mode="all") == pool
    assert off(tiny, OWN, training, mode="own") == Neurons({first: [5, 6], last: [7]})
    assert off(tiny, OTHER, training, mode="own") == Neurons({first: [4, 5, 7], last: [6]})
    assert off(tiny, STRANGER, training, mode="own") == off(tiny, STRANGER, training, mode="random") == pool


def test_control_has_own_sinks_on_and_as_many_others_off(tiny: Diffusion, training: Path) -> None:
    first, *_, last = tiny.value_layers
    own, control = (off(tiny, OWN, training, mode=mode) for mode in ("own", "random"))
    drawn = control - own
    assert own - control == Neurons()
    assert {layer: len(ids) for layer, ids in drawn.items()} == {first: 2, last: 1}
    assert max(drawn[first]) < 4
    assert max(drawn[last]) < 6
    assert off(tiny, OWN, training / "isolation.json", mode="random") == control


def test_dropping_is_blocking_the_pool(tiny: Diffusion, training: Path) -> None:
    method = Sinks(str(training))
    neurons = tuple(method.localize(tiny, prompt).neurons for prompt in (OWN, STRANGER))
    batch = replace(batch_of(tiny, [(0, 0), (1, 0)]), neurons=neurons)
    with tiny.block(neurons):
        expected = tiny.generate(batch.text, batch.latents)
    assert torch.equal(images_of(tiny, method, batch), expected)
    assert not torch.equal(images_of(tiny, NoMitigation(), batch), expected)
    assert method.auditable


@pytest.mark.parametrize(
    ("options", "pool", "others"),
    [
        ({}, 0.0, 1.0),
        ({"rescale": 1.5}, 0.0, 1.5),
        ({"mode": "all"}, 0.3, 1.0),
        ({"mode": "all", "active": 0.5}, 0.5, 1.0),
        ({"factor": 0.25, "rescale": 2.0}, 0.25, 2.0),
    ],
)
def test_factors_of_sinks_and_of_all_other_neurons(
    tiny: Diffusion, training: Path, options: dict[str, Any], pool: float, others: float
) -> None:
    module = next(iter(tiny.value_layers.values()))
    method = Sinks(str(training), **options)
    batch = batch_of(tiny, [(0, 0)])
    changed = replace(batch, neurons=(method.localize(tiny, OWN).neurons,))
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda *args: seen.append(args[2].clone()))  # after that of the masks
    try:
        for each in (NoMitigation(), method):
            with torch.no_grad(), each.apply(tiny, changed) as applied:
                tiny.predict_noise(applied.latents, tiny.timestep(), applied.text)
    finally:
        handle.remove()
    plain, scaled = seen
    width = plain.shape[-1]
    factors = torch.tensor([pool if index in (4, 5, 6, 7) else others for index in range(width)])
    torch.testing.assert_close(scaled, plain * factors, rtol=1e-6, atol=0)


def test_fingerprint_follows_the_sinks_and_not_the_path(
    training: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = Sinks(str(training)).fingerprint([OWN, STRANGER])
    content = json.loads((training / "isolation.json").read_text())
    moved = tmp_path_factory.mktemp("moved")
    write(moved, **content)
    assert Sinks(str(moved)).fingerprint([OWN, STRANGER]) == before
    content["neurons"]["vm-02"] = {}
    write(moved, **content)
    assert Sinks(str(moved)).fingerprint([OWN, STRANGER]) == before  # of no prompt that is asked for
    content["neurons"]["vm-01"] = {}
    write(moved, **content)
    assert Sinks(str(moved)).fingerprint([OWN, STRANGER]) != before


def test_what_has_no_sinks_is_refused(tmp_path: Path, tiny: Diffusion) -> None:
    with pytest.raises(ConfigError, match=r"sinks are those of a training.*model\.training=DIR"):
        Sinks().fingerprint([OWN])
    with pytest.raises(ConfigError, match=r"isolation\.json can't be read.*variant=sinks writes them"):
        Sinks(str(tmp_path)).fingerprint([OWN])
    layer = next(iter(tiny.value_layers))
    write(tmp_path, variant="routed", pool={}, neurons={"vm-01": {layer: [1]}})
    with pytest.raises(ConfigError, match="variant=routed has no pool of sinks"):
        Sinks(str(tmp_path)).fingerprint([OWN])
    write(tmp_path, variant="random_sinks", pool={layer: [1]})
    assert Sinks(str(tmp_path), mode="all").fingerprint([OWN])
    with pytest.raises(ConfigError, match=r"variant=random_sinks gave captions no sinks.*mode=off or mode=all"):
        Sinks(str(tmp_path), mode="own").fingerprint([OWN])
    write(tmp_path, pool={layer: "all"})
    with pytest.raises(ConfigError, match=r"expected .*PROMPT ID.*pool"):
        Sinks(str(tmp_path)).fingerprint([OWN])
    write(tmp_path, pool={layer: [1000]})
    with pytest.raises(ModelError, match="given 1000"):
        Sinks(str(tmp_path)).localize(tiny, OWN)


def test_rescaling_is_for_dropped_sinks() -> None:
    with pytest.raises(ConfigError, match=r"rescale=1.43 is for mode=off, given mode=own"):
        Sinks(rescale=1.43, mode="own")
