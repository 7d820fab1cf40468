"""Adversarial fine-tuning: what an update takes, its loss, and that it is resumed."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch

from nemo_bench import ConfigError, Diffusion, Prompt, resolve
from nemo_bench.diffusion import Conditioning, fitted_picture
from nemo_bench.methods import AdversarialFineTuning, Batch, NoMitigation, Setup, Wanda
from nemo_bench.methods.adversarial_fine_tuning import AdversarialFit
from nemo_bench.methods.embedding_search import search_embeddings
from nemo_bench.methods.fitted_weights import generated_pictures
from nemo_bench.records.data import Neurons
from nemo_bench.records.io import seed_of

QUICK = {"batch": 2, "steps": 1, "samples": 1, "ratio": 0.5}


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    references = sorted(Path(resolve("package:planted/references")).glob("vm-0*.png"))
    memorized = [Prompt(name, text, "VM", (references[n],)) for n, (name, text) in enumerate(
        [("a", "red sun map"), ("b", "ice jam key"), ("c", "log net oak")])]  # fmt: skip
    return [*memorized, Prompt("d", "fox big hat"), Prompt("e", "cup dog")]


@pytest.fixture(scope="module")
def fit(tiny: Diffusion, prompts: list[Prompt]) -> AdversarialFit:
    method = AdversarialFineTuning(epochs=3, **QUICK)  # type: ignore[arg-type]
    return method.fit(tiny, Setup(prompts=prompts, batch_size=8))  # type: ignore[return-value]


def test_each_epoch_takes_every_memorized_prompt_once_in_an_order_of_its_own(fit: AdversarialFit) -> None:
    assert fit.updates == 3 * 2  # three prompts in batches of two
    epochs = [[fit.chosen(number) for number in (2 * epoch, 2 * epoch + 1)] for epoch in range(3)]
    assert all([len(rows) for rows in parts] == [2, 1] for parts in epochs)
    assert all(sorted(chain(*parts)) == [0, 1, 2] for parts in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_surrogates_are_images_of_the_pruned_model(tiny: Diffusion, prompts: list[Prompt], fit: AdversarialFit) -> None:
    plain = generated_pictures(tiny, prompts[:3], 8).latents
    wanda = Wanda(ratio=0.5)
    wanda.setup(tiny, Setup(prompts=prompts[:3], batch_size=8))
    with wanda.pruning():
        pruned = generated_pictures(tiny, prompts[:3], 8).latents
    torch.testing.assert_close(fit.surrogates.latents, pruned)
    assert not torch.allclose(fit.surrogates.latents, plain, atol=1e-3)


def test_embeddings_are_those_of_the_audits_search_for_training_images(
    tiny: Diffusion, prompts: list[Prompt], fit: AdversarialFit
) -> None:
    (row,) = fit.chosen(1)
    picture = tiny.encode_images(fitted_picture(prompts[row].references[0], tiny.image_size)[None])
    seed = seed_of(["adversarial", 0, 1, prompts[row].id])
    batch = Batch((prompts[row],), tiny.encode([prompts[row].text]), tiny.latents([seed]), (seed,), (Neurons(),))
    found = search_embeddings(tiny, NoMitigation(), batch, picture, steps=1, rate=0.1, samples=1)
    assert torch.equal(fit.adversarial(1).text, found.text.text)
    assert not torch.equal(found.text.text, batch.text.text)


def test_the_gradient_is_that_of_the_two_losses(
    tiny: Diffusion, fit: AdversarialFit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is replaced by an embedding of ones; parts of two rows add up to what all rows give at once."""
    ones = Conditioning(torch.ones_like(fit.surrogates.text.text[:2]))
    monkeypatch.setattr(fit, "adversarial", lambda _number: ones)
    drawn: list[tuple[torch.Tensor, ...]] = []
    losses = tiny.training_losses

    def spied(clean: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor, text: Conditioning) -> torch.Tensor:
        drawn.append((clean, timesteps, noise, text.text))
        return losses(clean, timesteps, noise, text)

    tiny.network.requires_grad_(True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(tiny, "training_losses", spied)
            found = fit.gradients(0)
        assert [len(part[0]) for part in drawn] == [2, 2]  # rows of a batch of 8, a quarter of it with gradients
        clean, timesteps, noise, text = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        rows = fit.chosen(0)
        assert torch.equal(clean[:2], fit.surrogates.latents[rows])
        assert torch.equal(text[:2], ones.text)
        assert all(any(torch.equal(t, kept) for kept in fit.kept.text.text) for t in text[2:])
        each = losses(clean, timesteps, noise, Conditioning(text))
        loss = each[:2].mean() + each[2:].mean()
        expected = torch.autograd.grad(loss, [*tiny.network.parameters()])
    finally:
        tiny.network.requires_grad_(False)
    one, other = (torch.cat([part.flatten() for part in gradients]) for gradients in (found, expected))
    assert float((one - other).norm()) < 1e-3 * float(other.norm())


def test_an_update_depends_on_its_number_and_the_weights_alone(tiny: Diffusion, fit: AdversarialFit) -> None:
    tiny.network.requires_grad_(True)
    before = tiny.state_digest()
    try:
        one, other, again = (fit.gradients(number) for number in (1, 3, 1))
    finally:
        tiny.network.requires_grad_(False)
    assert tiny.state_digest() == before
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_dry_run_counts_the_passes_of_a_fit(tiny: Diffusion, prompts: list[Prompt]) -> None:
    method = AdversarialFineTuning(epochs=1, **QUICK)  # type: ignore[arg-type]
    before = tiny.row_passes
    own = method.fit(tiny, Setup(prompts=prompts, batch_size=8))
    tiny.network.requires_grad_(True)
    try:
        for number in range(own.updates):
            own.gradients(number)
    finally:
        tiny.network.requires_grad_(False)
    image = tiny.steps * (2 if tiny.guidance > 1 else 1)
    assert tiny.row_passes - before == method.least_passes(prompts, image)


def test_it_needs_training_images_and_prompts_to_keep(prompts: list[Prompt]) -> None:
    with pytest.raises(ConfigError, match=r"Adversarial fine-tuning .* needs memorized prompts with reference images"):
        AdversarialFineTuning().fingerprint(prompts[3:])
