from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batches import batch_of, images_of
from nemo_bench import ConfigError, Diffusion, ModelError, Prompt
from nemo_bench.methods import Setup, Wanda
from nemo_bench.methods.wanda import feed_forward_layers, pruned
from tiny import tiny_pipeline

MEMORIZED = [Prompt("a", "red sun map", "VM"), Prompt("b", "fox big hat", "TM")]
WEIGHT = torch.tensor([[4.0, -3.0, 2.0, 1.0], [1.0, 1.0, -1.0, 5.0]])


def chosen(memorized: list[list[float]], empty: list[list[float]], **settings: Any) -> list[list[bool]]:
    """Weights chosen by squared norms of the inputs in each call."""
    norms = (torch.tensor(squares, dtype=torch.float64) for squares in (memorized, empty))
    return Wanda(**settings).choose(WEIGHT, *norms).tolist()


def test_weights_are_chosen_as_worked_out_by_hand() -> None:
    # Norms 1, 2, 3, 1: scores 4 6 6 1 and 1 2 3 5, against squares of two empty prompts.
    # Half a row are two: 6 6 and 3 5. Only inputs 1 and 3 score higher than for the empty prompt.
    found = chosen([[1.0, 4.0, 9.0, 1.0]], [[2.0, 2.0, 18.0, 0.0]], ratio=0.5)
    assert found == [[False, True, False, False], [False, False, False, True]]


def test_empty_prompt_counts_as_often_as_there_are_memorized_ones(tiny: Diffusion) -> None:
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watched(Wanda):
        def choose(self, weight: torch.Tensor, memorized: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
            given.append((memorized, empty))
            return super().choose(weight, memorized, empty)

    method, layers = Watched(), feed_forward_layers(tiny)
    method.setup(tiny, Setup(prompts=MEMORIZED))
    once = method.input_squares(tiny, layers, tiny.encode([""]))
    for (_, empty), squares in zip(given, once.values(), strict=True):
        torch.testing.assert_close(empty, 2 * squares)


def test_calls_must_agree() -> None:
    # First call: weights 0 and 3 are the highest of their rows; second call: 1 and 1.
    memorized, empty = [[9.0, 1.0, 1.0, 9.0], [1.0, 100.0, 1.0, 1.0]], [[0.0] * 4] * 2
    assert chosen(memorized, empty, ratio=0.25) == [[True, True, False, False], [False, True, False, True]]
    assert not any(map(any, chosen(memorized, empty, ratio=0.25, agreement=0.5)))


def test_norms_are_those_of_rows_of_length_one(tiny: Diffusion) -> None:
    """Against the same in numpy's manner, from every input that the layers are given."""
    layers, texts = feed_forward_layers(tiny), ["red sun map", "fox big hat", "cup dog"]
    method, inputs = Wanda(calls=3), {name: list[torch.Tensor]() for name in layers}
    method.setup(tiny, Setup(prompts=MEMORIZED, batch_size=2))
    found = method.input_squares(tiny, layers, tiny.encode(texts))
    hooks = [
        layer.register_forward_pre_hook(lambda _m, args, kept=inputs[name]: kept.append(args[0]))
        for name, layer in layers.items()
    ]
    tiny.generate(tiny.encode(texts), tiny.latents([0] * 3))
    for hook in hooks:
        hook.remove()
    for name, calls in inputs.items():
        assert len(calls) == tiny.steps == 4
        assert found[name].shape == (3, layers[name].in_features)
        for call in range(3):
            rows = calls[call].reshape(-1, layers[name].in_features).double()
            expected = (rows / rows.norm(dim=1, keepdim=True)).square().sum(0)
            torch.testing.assert_close(found[name][call], expected, rtol=1e-3, atol=1e-4)


def test_weights_are_zero_inside_and_restored_afterwards(tiny: Diffusion) -> None:
    method, batch, before = Wanda(ratio=0.1), batch_of(tiny, [(0, 0)]), tiny.state_digest()
    method.setup(tiny, Setup(prompts=MEMORIZED))
    weights = {name: layer.weight.clone() for name, layer in feed_forward_layers(tiny).items()}
    with torch.inference_mode(), method.apply(tiny, batch):
        inside = {name: layer.weight.clone() for name, layer in feed_forward_layers(tiny).items()}
    changed = sum(int((inside[name] != weights[name]).sum()) for name in weights)
    assert 0 < changed <= 0.1 * sum(weight.numel() for weight in weights.values()) * tiny.steps
    assert all(torch.all((inside[name] == weights[name]) | (inside[name] == 0)) for name in weights)
    assert tiny.state_digest() == before


def test_setup_generates_each_memorized_and_one_empty_prompt(tiny: Diffusion) -> None:
    before = tiny.row_passes
    Wanda().setup(tiny, Setup(prompts=[*MEMORIZED, Prompt("c", "cup dog")]))
    assert tiny.row_passes - before == 3 * tiny.passes_per_image


def test_prompts_come_from_a_file_or_from_the_run(tiny: Diffusion, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("red sun map\nfox big hat\n")
    from_file, from_run = Wanda(str(file), ratio=0.3), Wanda(ratio=0.3)
    assert from_file.fingerprint([]) == from_run.fingerprint(MEMORIZED) == from_file.fingerprint(MEMORIZED[:1])
    assert from_run.fingerprint(MEMORIZED[:1]) != from_run.fingerprint(MEMORIZED)
    from_run.setup(tiny, Setup(prompts=MEMORIZED))
    from_file.setup(tiny, Setup())
    batch = batch_of(tiny, [(0, 0)])
    assert torch.equal(images_of(tiny, from_file, batch), images_of(tiny, from_run, batch))


def test_missing_memorized_prompts_or_setup_are_errors(tiny: Diffusion) -> None:
    with pytest.raises(ConfigError, match="none of those given is marked VM or TM: set file"):
        Wanda().fingerprint([Prompt("c", "cup dog")])
    with pytest.raises(ConfigError, match=r"call setup\(model, Setup\(prompts=...\)\)"):
        images_of(tiny, Wanda(), batch_of(tiny, [(0, 0)]))


def test_compiled_network_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"model\.compiled=false"):
        Wanda().setup(Diffusion(tiny_pipeline(), compiled=True), Setup(prompts=MEMORIZED))


def test_weights_are_restored_after_an_error() -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight.clone()
    with pytest.raises(KeyError), pruned({layer: torch.ones(2, 3, dtype=torch.bool)}):
        raise KeyError(layer.weight.any())
    assert torch.equal(layer.weight, weight)
