"""What methods do in families that they were not published for, on tiny transformers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from acting_methods import IDLE, METHODS, prepared
from batches import batch_of, images_of
from nemo_bench import ModelError
from nemo_bench.cli import main
from nemo_bench.diffusion import FAMILIES
from nemo_bench.methods import (
    PRSS,
    SAIL,
    AdjustedNoise,
    AttentionRescaling,
    EmbeddingOptimization,
    OptimizedNoise,
    Wanda,
)
from nemo_bench.methods.wanda import feed_forward_layers
from on_disk import read_json, read_records
from tiny_transformers import TOKENS, TRANSFORMERS, tiny_transformer


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("name", [name for name, make in METHODS.items() if make().families == frozenset(FAMILIES)])
def test_a_method_changes_images_and_leaves_the_model_as_it_was(family: str, name: str) -> None:
    model = tiny_transformer(family)
    batch, method = batch_of(model, [(0, 0), (1, 0)]), prepared(model, name)
    before, plain = model.state_digest(), model.generate(batch.text, batch.latents)
    with torch.inference_mode():
        changed = images_of(model, method, batch_of(model, [(0, 0), (1, 0)])).clone()
    assert model.state_digest() == before
    assert changed.isfinite().all()
    # What pruning takes from Sana's convolutions hardly shows in pictures of random weights.
    least = 1e-6 if (name, family) == ("wanda", "sana") else 1e-4
    assert all((changed - plain).flatten(1).abs().amax(1) > least)
    if name.startswith("embedding"):  # whose rows have masks of their own
        alone = images_of(model, prepared(model, name), batch.rows([1]))
        torch.testing.assert_close(changed[[1]], alone, rtol=0, atol=2e-2)


@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_rescaling_draws_attention_to_begin_tokens(family: str) -> None:
    model = tiny_transformer(family)
    batch = batch_of(model, [(0, 0), (3, 0)])
    found = []
    edited = SimpleNamespace(begins=model.begins, edit_attention=lambda edit: nullcontext(found.append(edit)))
    with AttentionRescaling(2.0).apply(edited, batch):  # type: ignore[arg-type]
        (edit,) = found
    mask = batch.text.mask
    assert mask is not None
    logits = torch.rand(4, 2, 3, mask.shape[1])
    expected = logits.masked_fill((mask == 0).repeat(2, 1)[:, None, None], -torch.inf)
    expected[2:, ..., 0] *= 2  # CLIP's and Gemma's, of the conditional rows
    assert torch.equal(edit("layer", logits), expected)
    plain = model.generate(batch.text, batch.latents)
    assert (images_of(model, AttentionRescaling(2.0), batch) - plain).abs().max() > 1e-3


def test_without_strength_images_are_exactly_the_models_own() -> None:
    model = tiny_transformer("sd3")
    batch = batch_of(model, [(0, 0), (1, 0)])
    plain = model.generate(batch.text, batch.latents)
    serving = [name for name, make in IDLE.items() if make().families == frozenset(FAMILIES)]
    assert len(serving) > 15
    for name in serving:
        assert torch.equal(images_of(model, prepared(model, name, IDLE), batch), plain), name


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_only_what_may_move_of_an_embedding_follows_the_gradient(family: str) -> None:
    """Begin tokens and padding that is masked fall by AdamW's decay alone, zeros stay zeros."""
    model = tiny_transformer(family)
    batch = batch_of(model, [(0, 0), (3, 0)])
    with EmbeddingOptimization(0.0, steps=1, images=None).apply(model, batch) as changed:
        before, after = batch.text.text, changed.text.text
    decayed = before * (1 - 0.05 * 0.01)
    free = ~torch.isclose(after, decayed, rtol=0, atol=1e-6)
    expected = model.family.used(batch.text)
    if family in ("sd3", "sana"):
        expected[:, 0] = False  # CLIP's and Gemma's begin token; T5 has none
    assert torch.equal(free.any(2), expected.any(2))
    assert not (free & ~expected).any()
    assert torch.equal(after[before == 0], before[before == 0])
    assert changed.text.pooled is batch.text.pooled


def test_noise_is_moved_where_latents_hold_some_signal() -> None:
    """A round written out: velocities at the ratio of signal to noise of Stable Diffusion's first step."""
    model = tiny_transformer("sd3")
    batch, share = batch_of(model, [(0, 0)]), model.schedule.like(981) / 1000
    assert share == pytest.approx(1 / (1 + (0.00574 / (1 - 0.00574)) ** 0.5), rel=1e-3)

    def added(latents: torch.Tensor) -> torch.Tensor:
        return model.text_noise(latents * share, 1000 * share, batch.text)

    here = added(batch.latents)
    ahead = added(batch.latents + 4.0 * here / here.norm())
    with AdjustedNoise(1, radius=4.0, rate=0.5).apply(model, batch) as changed:
        moved = batch.latents - changed.latents
    torch.testing.assert_close(moved, 0.5 * (ahead - here), rtol=1e-2, atol=1e-5)
    loss = OptimizedNoise()._loss(model, batch.text, [0], batch.latents)
    assert float(loss) == pytest.approx(float(here.norm()), rel=1e-3)
    search = SAIL(1.0, candidates=1).loss(model, batch.text, batch.latents[:, None])
    expected = added(batch.latents + here / here.norm()).norm() + 0.05 * batch.latents.norm()
    assert float(search([0], batch.latents[:, None])) == pytest.approx(float(expected), rel=1e-3)
    # The paper's loss has scores: noise changes by 1 - s where velocity does by 1, and the score is that over -s.
    paper = SAIL(1.0, alpha=0.0, candidates=1, objective="paper").loss(model, batch.text, batch.latents[:, None])
    score = -(1 - share) / share * here
    expected = ((1 - share) / share * added(batch.latents + score) + score).norm() ** 2
    assert float(paper([0], batch.latents[:, None])) == pytest.approx(float(expected), rel=1e-2)


def test_layers_of_feed_forward_are_pruned_and_restored() -> None:
    for family, count, with_text in (("sd3", 3, 5), ("flux", 4, 6), ("pixart", 2, 2), ("sana", 2, 2)):
        model = tiny_transformer(family)
        layers = feed_forward_layers(model)
        assert (len(layers), len(feed_forward_layers(model, text=True))) == (count, with_text)
        method, before = prepared(model, "wanda"), model.state_digest()
        assert isinstance(method, Wanda)
        originals = {name: layer.weight.clone() for name, layer in layers.items()}
        with method.apply(model, batch_of(model, [(0, 0)])):
            for name, layer in layers.items():
                pruned = (layer.weight == 0).flatten(1)
                assert pruned.any()
                assert not pruned.all(1).any()
                assert torch.equal(layer.weight.flatten(1)[~pruned], originals[name].flatten(1)[~pruned])
                if name.startswith("single"):
                    assert not pruned[:, : len(pruned)].any()  # inputs from attention
        assert model.state_digest() == before


def test_bright_ending_is_refused_with_its_reason() -> None:
    PRSS().check("PixArtAlphaPipeline", 4.0, "float32")
    with pytest.raises(ModelError, match="needs attention at the resolution of the latents, and an end token of CLIP"):
        PRSS(bright_ending=True).check("PixArtAlphaPipeline", 4.0, "float32")


CARRIED = """\
method=adjusted_noise
method=amg method.threshold=-1
method=anisotropy_optimization method.steps=1 method.images=1
method=dimension_optimization method.steps=1
method=embedding_noise
method=embedding_optimization method.target=0 method.steps=1 method.images=1
method=optimized_noise method.target=0 method.steps=1
method=prss method.file=null method.search_target=0 method.steps=1
method=random_tokens
method=sail method.steps=1 method.restarts=0
method=wanda
"""
DETECTORS = "anisotropy,hessian_difference,intrinsic_dimension,one_step,score_dynamics,sharpness,token_significance"
"""What was carried over to transformers, with settings under which it acts."""


def test_a_user_runs_methods_and_detectors_on_a_transformer(tmp_path: Path, prompt_file: Path) -> None:
    """Stable Diffusion 3, by the command line; an audit of weights that are off goes on from there."""
    tiny_transformer("sd3").pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    grid = "".join(f"  - {line}\n" for line in CARRIED.splitlines())
    (tmp_path / "conf" / "experiment" / "carried.yaml").write_text(f"# @package _global_\nsummary: it\ngrid:\n{grid}")
    model = ["family=sd3", "layers=all", "steps=3", f"tokens={TOKENS}", f"source={tmp_path / 'model'}"]
    words = [
        *(f"model.{setting}" for setting in model), "trainer=cpu", f"prompts.files=[{prompt_file}]", "prompts.limit=1",
        f"root={tmp_path / 'results'}",
    ]  # fmt: skip
    assert main(["run", "--conf", str(tmp_path / "conf"), "experiment=carried", "seeds=1", *words]) == 0
    specs = [read_json(path) for path in (tmp_path / "results" / "default").glob("*/spec.json")]
    assert len(specs) == len(CARRIED.splitlines())
    assert all(spec["measures"].startswith("flow matching") for spec in specs)
    for path in (tmp_path / "results" / "default").glob("*/spec.json"):
        (record,) = read_records(path.parent, "generate").values()
        assert not record.get("failed")
    assert main(["detect", f"detector={DETECTORS}", "name=found", *words]) == 0
    for path in (tmp_path / "results" / "found").glob("*/spec.json"):
        assert not any(record.get("failed") for record in read_records(path.parent, "detect").values())
    audit = ["--cell", "wanda", "steps=1", "samples=1", "images=1", "limit=1", "trainer=cpu"]
    assert main(["audit", str(tmp_path / "results" / "default"), "--conf", str(tmp_path / "conf"), *audit]) == 0
