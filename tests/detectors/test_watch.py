"""Sampling once for all detectors, and what holds for every one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from nemo_bench import ModelError, read_prompts, resolve
from nemo_bench.config import build, detector_grid, options
from nemo_bench.detectors import (
    Anisotropy,
    AttentionEntropy,
    BrightEnding,
    Detector,
    DetectorScore,
    HessianDifference,
    IntrinsicDimension,
    LayerEntropy,
    Magnitude,
    NoiseDifference,
    Observed,
    OneStep,
    ScoreDynamics,
    Sharpness,
    TiledL2,
    TokenSignificance,
    View,
    watch,
)
from nemo_bench.diffusion import Diffusion, Similarity
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Prompt
from tiny import tiny_pipeline, tiny_sd2, tiny_sdxl, tiny_texts

PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(tiny_texts(3))]


def every() -> dict[str, Detector]:
    """One of each, of few seeds that differ."""
    return {
        "noise_difference": NoiseDifference(seeds=3),
        "magnitude": Magnitude(seeds=2),
        "magnitude_first": Magnitude(seeds=2, steps=1),
        "token_significance": TokenSignificance(seeds=1, steps=2),
        "layer_entropy": LayerEntropy(),
        "attention_entropy": AttentionEntropy(),
        "sharpness": Sharpness(seeds=2),
        "anisotropy": Anisotropy(),
        "bright_ending": BrightEnding(seeds=2),
        "tiled_l2": TiledL2(seeds=2),
        "one_step": OneStep(),
        "hessian_difference": HessianDifference(),
        "score_dynamics": ScoreDynamics(),
        "intrinsic_dimension": IntrinsicDimension(),
    }


DERIVATIVES = {"token_significance": 1 * 2, "sharpness": 2 * 2, "hessian_difference": 2, "intrinsic_dimension": 2}
"""Derivatives of passes that they take, by row, for a prompt."""
ON_SDXL = sorted(set(every()) - {"layer_entropy", "attention_entropy", "bright_ending"})


@contextmanager
def counted(model: Diffusion) -> Iterator[list[int]]:
    """Rows of every UNet pass made in the context."""
    rows: list[int] = []

    def note(_unet: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(len(args[0]))

    hook = model.unet.register_forward_pre_hook(note)
    try:
        yield rows
    finally:
        hook.remove()


def scores(model: Diffusion, detector: Detector, prompts: Sequence[Prompt], batch_size: int = 32) -> list[float]:
    findings, _ = watch(model, {"it": detector}, prompts, batch_size)
    return [finding.score for finding in findings["it"]]


def test_every_shipped_detector_is_tested_here() -> None:
    assert sorted(every()) == options("detector")
    shipped = {c.names["detector"]: build(c.settings.detector, "detector") for c in detector_grid([])}
    assert {name: type(one) for name, one in shipped.items()} == {name: type(one) for name, one in every().items()}
    for one in shipped.values():
        assert one.title
        assert one.summary
        assert one.citation.startswith("@")
    assert len({one.summary for one in every().values()}) == len(every()) - 1  # magnitude twice


def test_detectors_together_give_the_scores_of_each_alone_and_sample_once(tiny: Diffusion) -> None:
    detectors, before = every(), tiny.state_digest()
    with counted(tiny) as rows:
        together, costs = watch(tiny, detectors, PROMPTS)
    assert tiny.state_digest() == before
    for name, detector in detectors.items():
        with counted(tiny) as alone:
            assert [f.score for f in together[name]] == pytest.approx(scores(tiny, detector, PROMPTS), rel=1e-3)
        derivatives = DERIVATIVES.get(name, 0) * len(PROMPTS)
        assert sum(alone) == costs[name].row_passes - derivatives, name
        assert 0 <= costs[name].extra_row_passes <= costs[name].row_passes
        assert costs[name].seconds > 0
        # Sampling of two images is shared; the third noise's conditional prediction is at another timestep.
    own = sum(cost.extra_row_passes for cost in costs.values()) - sum(DERIVATIVES.values()) * len(PROMPTS)
    assert sum(rows) == own + 2 * tiny.passes_per_image * len(PROMPTS)


def test_sampling_ends_after_the_last_step_that_a_detector_needs(tiny: Diffusion) -> None:
    with counted(tiny) as rows:
        watch(tiny, {"magnitude": Magnitude(seeds=3, steps=2), "first": Magnitude(seeds=4, steps=1)}, PROMPTS[:1])
    assert sorted(rows) == [1, 1, 6, 6]


@pytest.mark.parametrize("name", every())
def test_score_does_not_depend_on_the_rest_of_the_batch(tiny: Diffusion, name: str) -> None:
    detector = every()[name]
    one_by_one = [score for prompt in PROMPTS for score in scores(tiny, detector, [prompt])]
    assert len(set(one_by_one)) == len(PROMPTS)
    assert scores(tiny, detector, PROMPTS) == pytest.approx(one_by_one, rel=2e-3)
    assert scores(tiny, detector, PROMPTS[::-1], batch_size=2) == pytest.approx(one_by_one[::-1], rel=2e-3)


def test_watching_leaves_the_model_unchanged(tiny: Diffusion) -> None:
    text, latents = tiny.encode([PROMPTS[0].text]), tiny.latents([0])
    image, before = tiny.generate(text, latents), tiny.state_digest()
    processors = {name: id(p) for name, p in tiny.unet.attn_processors.items()}
    hooks = len(tiny.unet._forward_hooks)
    watch(tiny, every(), PROMPTS[:1])
    assert tiny.state_digest() == before
    assert {name: id(p) for name, p in tiny.unet.attn_processors.items()} == processors
    assert len(tiny.unet._forward_hooks) == hooks
    assert not any("forward" in vars(module) for module in tiny.unet.modules())
    assert torch.equal(tiny.generate(text, latents), image)
    assert all(p.grad is None for p in tiny.parameters())


def test_scores_in_inference_mode_equal_those_outside_of_it(tiny: Diffusion) -> None:
    plain = watch(tiny, every(), PROMPTS[:1])[0]
    with torch.inference_mode():
        found = watch(tiny, every(), PROMPTS[:1])[0]
    for name in plain:
        assert found[name][0].score == pytest.approx(plain[name][0].score, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "names"),
    [(tiny_sd2, sorted(every())), (lambda: tiny_sd2(prediction_type="epsilon"), ["magnitude"]), (tiny_sdxl, ON_SDXL)],
)
def test_detectors_work_with_other_families(make: Callable[[], DiffusionPipeline], names: list[str]) -> None:
    model = Diffusion(make(), steps=4, guidance=3.0, similarity=Similarity(1.0, ()))
    before = model.state_digest()
    findings, _ = watch(model, {name: every()[name] for name in names}, PROMPTS[:2])
    assert model.state_digest() == before
    for name in names:
        one, other = (finding.score for finding in findings[name])
        assert torch.tensor([one, other]).isfinite().all()
        assert one != other, name


@pytest.mark.parametrize("name", sorted(set(every()) - set(ON_SDXL)))
def test_unsupported_family_is_an_error(name: str) -> None:
    model = Diffusion(tiny_sdxl(), steps=2, guidance=3.0, similarity=Similarity(1.0, ()))
    with pytest.raises(
        ModelError, match=r"made for StableDiffusionPipeline \(.*\), given a StableDiffusionXLPipeline; leave"
    ):
        watch(model, {name: every()[name]}, PROMPTS)


def test_missing_guidance_and_compiled_unet_are_errors() -> None:
    family = "StableDiffusionPipeline"
    Magnitude(steps=1).check(family, 1.0, compiled=True)
    Magnitude().check(family, 3.0, compiled=True)
    Sharpness().check(family, 1.0)
    with pytest.raises(ModelError, match=r"watches guided sampling, given model.guidance=1; give"):
        Magnitude().check(family, 1.0)
    for detector in (Sharpness(), LayerEntropy()):
        with pytest.raises(ModelError, match=r"set model\.compiled=false"):
            detector.check(family, 3.0, compiled=True)


def test_detectors_of_the_first_step_work_without_guidance() -> None:
    model = Diffusion(tiny_pipeline(), steps=4, guidance=1.0, similarity=Similarity(1.0, ()))
    assert watch(model, {"m": Magnitude(steps=1), "s": Sharpness(seeds=1)}, PROMPTS[:1])[0]["m"][0].score > 0


@pytest.mark.parametrize(
    ("detector", "derived"),
    [
        (TokenSignificance(seeds=5, steps=1), [2, 2, 1]),
        (Sharpness(seeds=5), [4, 4, 2]),  # both halves in one pass
    ],
)
def test_derivatives_are_taken_of_fewer_images_at_a_time(
    tiny: Diffusion, detector: Detector, derived: list[int]
) -> None:
    with counted(tiny) as rows:
        found, costs = watch(tiny, {"it": detector}, PROMPTS[:1], batch_size=8)
    shared = [5] if isinstance(detector, TokenSignificance) else [5, 5]
    assert rows == [*shared, *derived]
    with counted(tiny) as rows:
        whole, same = watch(tiny, {"it": detector}, PROMPTS[:1], batch_size=20)
    assert len(rows) == len(shared) + 1
    assert found["it"][0].score == pytest.approx(whole["it"][0].score, rel=1e-4)
    counts = [(cost["it"].row_passes, cost["it"].extra_row_passes) for cost in (costs, same)]
    assert counts[0] == counts[1] == (sum(shared) + 2 * sum(derived), 2 * sum(derived))


def test_seconds_are_those_of_needed_steps_and_of_needed_decoding(
    tiny: Diffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that advances by a second a row in the UNet, and by a thousand an image decoded."""
    clock = 0

    def tick(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal clock
        clock += len(args[0]) * (1 if module is tiny.unet else 1000)

    for module in ("base", "watch"):
        monkeypatch.setattr(import_module(f"nemo_bench.detectors.{module}"), "now", lambda _model: clock)
    detectors = {
        "first": Magnitude(seeds=3, steps=1),
        "two": Magnitude(seeds=3, steps=2),
        "all": Magnitude(seeds=2),
        "images": TiledL2(seeds=3),
        "own": Sharpness(seeds=1),
    }
    hooks = [part.register_forward_pre_hook(tick) for part in (tiny.unet, tiny.vae.decoder)]  # type: ignore[union-attr]
    try:
        _, costs = watch(tiny, detectors, PROMPTS[:2])
    finally:
        for hook in hooks:
            hook.remove()
    seconds = {name: cost.seconds for name, cost in costs.items()}
    # Two prompts, two rows an image and step; Sharpness has a pass of both halves beside the first step.
    assert seconds == pytest.approx(
        {
            "first": 2 * 3 * 2,
            "two": 2 * 3 * 2 * 2,
            "all": 2 * 2 * 2 * tiny.steps,
            "images": 2 * 3 * (2 * tiny.steps + 1000),
            "own": 2 * (2 + 2),
        }
    )


class Nought(Detector):
    """Divides by zero, and takes the mean of that."""

    title = summary = "nought"

    def observe(self, view: View) -> Mapping[str, Tensor]:
        return {"ratio": view.step.magnitude / 0 * 0}


def test_score_that_is_not_finite_has_failed_and_others_have_not(tiny: Diffusion) -> None:
    found, _ = watch(tiny, {"it": Nought(), "other": Magnitude(steps=1)}, PROMPTS)
    assert {finding.failed for finding in found["it"]} == {"the score is nan, in torch.float32"}
    assert all(not finding.failed and math.isfinite(finding.score) for finding in found["other"])


class Eyes(Detector):
    """Keeps everything it observes."""

    title = summary = citation = "eyes"
    images = True
    steps = None

    def __init__(self, seeds: int) -> None:
        self.seeds = seeds
        self.seen: dict[str, tuple[Observed, Tensor | None]] = {}

    def observe(self, view: View) -> Mapping[str, Tensor]:
        return {"latents": view.latents, "difference": view.step.difference, "magnitude": view.step.magnitude}

    def score(self, model: Diffusion, prompt: Prompt, observed: Observed, images: Tensor | None) -> DetectorScore:
        self.seen[prompt.id] = observed, images
        return DetectorScore(0.0)


def test_observed_sampling_is_that_of_a_run_without_mitigation(tiny: Diffusion) -> None:
    eyes = Eyes(2)
    watch(tiny, {"eyes": eyes, "noise": NoiseDifference(seeds=3)}, PROMPTS, batch_size=4)
    for prompt in PROMPTS:
        seen, images = eyes.seen[prompt.id]
        latents = tiny.latents(seeds_of(prompt, "generate", range(2)))
        text = tiny.encode([prompt.text]).rows([0, 0])
        assert images is not None
        torch.testing.assert_close(images, tiny.generate(text, latents), rtol=0, atol=1e-3)
        assert len(seen) == tiny.steps
        assert torch.equal(seen[0]["latents"], latents)
        first = tiny.timesteps()[0]
        expected = tiny.predict_noise(latents, first, text) - tiny.predict_noise(latents, first, tiny.unconditional(2))
        torch.testing.assert_close(seen[0]["difference"], expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(seen[0]["magnitude"], expected.flatten(1).norm(dim=1), rtol=1e-3, atol=0)


def test_memorized_prompts_of_the_embedded_model_score_higher(planted: Diffusion) -> None:
    """Three verbatim captions against three that were never trained on; what differs is far larger than noise."""
    known, unknown = (
        read_prompts(resolve(f"package:planted/prompts/{name}.jsonl"))[:3] for name in ("planted", "general")
    )
    detectors = {
        "noise_difference": NoiseDifference(seeds=4),
        "magnitude": Magnitude(seeds=1, steps=1),
        "anisotropy": Anisotropy(),
        "one_step": OneStep(),
        "hessian_difference": HessianDifference(),
        "score_dynamics": ScoreDynamics(),
    }
    for name, found in watch(planted, detectors, [*known, *unknown])[0].items():
        scores = [finding.score for finding in found]
        assert min(scores[:3]) > max(scores[3:]), name
