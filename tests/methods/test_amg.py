from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from batches import batch_of, images_of
from linear_noise import FixedSignal
from nemo_bench import ConfigError, Diffusion, ModelError, Prompt, resolve
from nemo_bench.diffusion import Conditioning, Step
from nemo_bench.diffusion.schedule import Flow, Schedule
from nemo_bench.errors import StoreError
from nemo_bench.methods import AMG, Setup
from nemo_bench.methods.amg import Guidance, TrainingImages


class Plane(AMG):
    """Compares pictures of two numbers, by the direction that they point to."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        return flat / flat.norm(dim=1, keepdim=True)


class Flat:
    """Stands in for a model without a decoder; a prompt's noise is the number that it consists of, everywhere."""

    schedule: Schedule = FixedSignal()

    def __init__(self) -> None:
        self.asked: list[str] = []

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def encode(self, texts: list[str]) -> Conditioning:
        self.asked += texts
        return Conditioning(torch.tensor([float(text) for text in texts])[:, None, None])

    def predict_noise(self, latents: torch.Tensor, timestep: int, text: Conditioning) -> torch.Tensor:
        return text.text[:, :, :, None].expand_as(latents)


def vectors(*rows: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(rows)[:, :, None, None]


def guided(
    method: AMG, known: TrainingImages, steps: int = 1, timestep: int = 500, **given: torch.Tensor
) -> list[torch.Tensor]:
    guidance = Guidance(method, Flat(), known, len(given["latents"]))  # type: ignore[arg-type]
    return [guidance(Step(number, timestep, 7.5, **given)) for number in range(steps)]


def similarity(latents: torch.Tensor, noise: torch.Tensor, known: TrainingImages) -> float:
    """Of the image that noise leads to: signal and noise are mixed 0.6 to 0.8."""
    image = (latents - 0.8 * noise).flatten() / 0.6
    return float((image / image.norm() @ known.vectors.T).max())


def slope(latents: torch.Tensor, noise: torch.Tensor, known: TrainingImages) -> torch.Tensor:
    """Gradient of the similarity by the latents, from finite differences."""
    found = []
    for axis in ((1e-3, 0.0), (0.0, 1e-3)):
        ahead, behind = (similarity(latents + sign * vectors(axis), noise, known) for sign in (1, -1))
        found.append((ahead - behind) / 2e-3)
    return vectors((found[0], found[1]))


LATENTS, EMPTY, PROMPT = vectors((1.0, 0.2)), vectors((0.1, 0.1)), vectors((0.0, 0.2))
NEAR = TrainingImages(torch.tensor([[0.0, 1.0], [0.8, 0.6]]), ("1", "2"))


def test_despecification_lowers_guidance_by_similarity() -> None:
    plain = EMPTY + 7.5 * (PROMPT - EMPTY)
    near = similarity(LATENTS, plain, NEAR)
    for saturation in (0.5, 5.0):
        less = min(6.5, 6.5 * near / saturation)
        (noise,) = guided(
            Plane(threshold=-0.2, saturation=saturation, strength=0.0), NEAR, latents=LATENTS, unconditional=EMPTY,
            conditional=PROMPT,
        )  # fmt: skip
        torch.testing.assert_close(noise, EMPTY + (7.5 - less) * (PROMPT - EMPTY))
    assert 6.5 * near / 0.5 > 6.5 > 6.5 * near / 5.0 > 0


def test_c1_is_the_published_thirteen() -> None:
    assert 6.5 / AMG().saturation == 13


def test_dissimilarity_follows_the_gradient_of_similarity_after_despecification() -> None:
    """Worked out in plain numbers, the gradient by finite differences."""
    method = Plane(threshold=-0.2, saturation=5.0, strength=0.05)
    (noise,) = guided(method, NEAR, latents=LATENTS, unconditional=EMPTY, conditional=PROMPT)
    plain = EMPTY + 7.5 * (PROMPT - EMPTY)
    less = 6.5 * similarity(LATENTS, plain, NEAR) / 5.0
    despecified = EMPTY + (7.5 - less) * (PROMPT - EMPTY)
    near = similarity(LATENTS, despecified, NEAR)
    assert abs(near - similarity(LATENTS, plain, NEAR)) > 0.01
    factor = 0.8 * 0.05 * (near + 0.2) * math.exp((1000 - 500) / 170)
    added = factor * slope(LATENTS, despecified, NEAR)
    torch.testing.assert_close(noise, despecified + added, rtol=0, atol=2e-3)
    assert added.abs().max() > 0.05
    # Taking that noise off makes the latents less like what they were like.
    assert similarity(LATENTS - 1e-2 * (noise - despecified), despecified, NEAR) < near


def test_dissimilarity_of_a_flow_is_a_change_of_its_velocity() -> None:
    """At the timestep like Stable Diffusion's 500, where a velocity changes by 1 / (1 - s) for each unit of noise."""
    model = Flat()
    model.schedule = Flow({}, 1)
    timestep = model.schedule.like(500)
    share = timestep / 1000
    method = Plane(threshold=-0.2, saturation=1e9, strength=0.05)
    noise = Guidance(method, model, NEAR, 1)(Step(0, timestep, 7.5, LATENTS, EMPTY, PROMPT))  # type: ignore[arg-type]
    plain = EMPTY + 7.5 * (PROMPT - EMPTY)

    def near(latents: torch.Tensor) -> float:
        image = (latents - share * plain).flatten()
        return float((image / image.norm() @ NEAR.vectors.T).max())

    x, y = (vectors(axis) for axis in ((1e-3, 0.0), (0.0, 1e-3)))
    gradient = vectors(tuple((near(LATENTS + step) - near(LATENTS - step)) / 2e-3 for step in (x, y)))  # type: ignore[arg-type]
    deviation = (1 - model.schedule.signal(timestep)) ** 0.5
    factor = 0.05 * deviation * (near(LATENTS) + 0.2) * math.exp((1000 - 500) / 170) / (1 - share)
    torch.testing.assert_close(noise, plain + factor * gradient, rtol=0, atol=2e-3)


def test_images_of_a_batch_are_guided_on_their_own() -> None:
    given = {
        "latents": torch.cat([LATENTS, vectors((-1.0, -0.3))]),
        "unconditional": EMPTY.repeat(2, 1, 1, 1),
        "conditional": PROMPT.repeat(2, 1, 1, 1),
    }
    method = Plane(threshold=0.1, saturation=5.0, strength=0.05)
    (noise,) = guided(method, NEAR, **given)
    assert torch.equal(noise[1:], EMPTY + 7.5 * (PROMPT - EMPTY))
    (alone,) = guided(method, NEAR, **{key: value[:1] for key, value in given.items()})
    assert torch.equal(noise[:1], alone)
    assert (alone != EMPTY + 7.5 * (PROMPT - EMPTY)).any()


def test_gradients_are_followed_in_small_parts() -> None:
    """As many rows at once as gradients have memory for, with the same result."""
    latents = torch.cat([LATENTS * scale for scale in (1.0, 1.5, 2.0, 2.5, 3.0)])
    given = {"unconditional": EMPTY.repeat(5, 1, 1, 1), "conditional": PROMPT.repeat(5, 1, 1, 1), "latents": latents}
    seen: list[int] = []

    class Counting(Plane):
        def embed(self, images: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                seen.append(len(images))
            return super().embed(images)

    class Smaller(Counting):
        batch_size = 8

    (whole,) = guided(Counting(threshold=-0.9, saturation=5.0, strength=0.05), NEAR, **given)
    (parts,) = guided(Smaller(threshold=-0.9, saturation=5.0, strength=0.05), NEAR, **given)
    assert seen == [5, 2, 2, 1]
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(("timestep", "limit"), [(0, 0.4), (200, 0.3 + 0.1 * math.exp(-1)), (999, 0.3007)])
def test_the_threshold_falls_with_noise(timestep: int, limit: float) -> None:
    still = vectors((1.0, 0.0))
    for similarity_, acts in ((limit - 2e-3, False), (limit + 2e-3, True)):
        index = TrainingImages(torch.tensor([[similarity_, (1 - similarity_**2) ** 0.5]]), ("1",))
        (noise,) = guided(
            Plane(strength=0.0), index, timestep=timestep, latents=still, unconditional=0 * still,
            conditional=torch.full_like(still, 1e-6),
        )  # fmt: skip
        assert bool((noise != 7.5e-6).any()) == acts


def test_dissimilar_image_stays_the_same_unless_ungated() -> None:
    index = TrainingImages(torch.tensor([[0.1, 0.99**0.5]]), ("1",))
    still, prompt = vectors((1.0, 0.0)), vectors((1e-6, 0.0))
    given = {"latents": still, "unconditional": 0 * still, "conditional": prompt}
    assert torch.equal(guided(Plane(), index, **given)[0], 7.5 * prompt)
    (ungated,) = guided(Plane(legacy_ungated=True), index, **given)
    torch.testing.assert_close(ungated, (7.5 - 13 * 0.1) * prompt, rtol=1e-3, atol=0)


def test_guidance_leads_away_from_a_frequent_caption_for_ten_steps() -> None:
    # Three of one caption, two of another; the image is like them in the first step only.
    near = TrainingImages(torch.tensor([[1.0, 0.0]] * 5), ("0.25", "0.25", "0.25", "2", "2"))
    still, prompt = vectors((1.0, 0.0)), vectors((0.0, 0.0))
    method = Plane(strength=0.0, captions=2, saturation=10.0)
    guidance = Guidance(method, Flat(), near, 1)  # type: ignore[arg-type]
    noises = []
    for number in range(12):
        latents = still if number == 0 else vectors((0.1, 1.0))
        noises.append(guidance(Step(number, 500, 7.5, latents, prompt, prompt)))
    # s1 = 6.5 / 10; s2 = min(s1's rest / 0.3 S, s1's rest).
    torch.testing.assert_close(noises[0], torch.full_like(still, (6.5 - 0.65) * -0.25))
    # Afterwards the similarity is 0.1 / |(0.1, 1)|, below the threshold.
    low = 0.1 / 1.01**0.5
    for noise in noises[1:10]:
        torch.testing.assert_close(noise, torch.full_like(still, 6.5 * low / 0.3 * -0.25))
    assert not noises[10].any()
    assert not noises[11].any()
    assert guidance.notes == ({"guided_steps": 10},)
    assert guidance.model.asked == ["0.25"]  # type: ignore[attr-defined]
    rare = guided(
        Plane(strength=0.0, captions=3, saturation=10.0), near, latents=still, unconditional=prompt, conditional=prompt
    )
    assert not rare[0].any()


def test_noise_moved_away_from_a_caption_is_compared_as_well() -> None:
    """Not near any more, but led near again by going away from the caption: dissimilarity sees to that."""
    near = TrainingImages(torch.tensor([[1.0, 0.0]] * 3), ("0.25",) * 3)
    still, later, nothing = vectors((1.0, 0.0)), vectors((0.1, 1.0)), vectors((0.0, 0.0))
    guidance = Guidance(Plane(strength=0.05, captions=2), Flat(), near, 1)  # type: ignore[arg-type]
    guidance(Step(0, 500, 7.5, still, nothing, nothing))
    noise = guidance(Step(1, 500, 7.5, later, nothing, nothing))
    low = similarity(later, nothing, near)
    moved = torch.full_like(later, 6.5 * low / 0.3 * -0.25)
    limit, high = 0.3 + 0.1 * math.exp(-2.5), similarity(later, moved, near)
    assert low < limit < high
    factor = 0.8 * 0.05 * (high - 0.3) * math.exp((1000 - 500) / 170)
    torch.testing.assert_close(noise, moved + factor * slope(later, moved, near), rtol=0, atol=1e-3)
    # Another generation within the same context starts afresh.
    assert not guidance(Step(0, 500, 7.5, later, nothing, nothing)).any()


def test_every_image_is_led_away_from_its_own_caption() -> None:
    index = TrainingImages(torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3), ("0.25",) * 3 + ("-0.5",) * 3)
    latents, nothing = vectors((1.0, 0.05), (0.05, 1.0), (-1.0, -1.0)), vectors((0.0, 0.0)).repeat(3, 1, 1, 1)
    (noise,) = guided(
        Plane(strength=0.0, captions=2, saturation=10.0), index, latents=latents, unconditional=nothing,
        conditional=nothing,
    )  # fmt: skip
    room = 6.5 * (1 - 1 / 1.0025**0.5 / 10)
    for row, caption in enumerate((0.25, -0.5)):
        torch.testing.assert_close(noise[row], torch.full_like(noise[row], room * -caption))
    assert not noise[2].any()


def test_captions_of_pictures_unlike_the_image_do_not_count() -> None:
    index = TrainingImages(torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 21), ("0.25",) * 3 + ("2",) * 21)
    still, nothing = vectors((1.0, 0.0)), vectors((0.0, 0.0))
    given = {"latents": still, "unconditional": nothing, "conditional": nothing}
    (noise,) = guided(Plane(strength=0.0, captions=2, saturation=10.0), index, **given)
    torch.testing.assert_close(noise, torch.full_like(still, (6.5 - 0.65) * -0.25))
    (noise,) = guided(Plane(strength=0.0, captions=20, saturation=10.0), index, **given)
    assert not noise.any()


def references() -> tuple[Path, ...]:
    return tuple(sorted(Path(resolve("package:planted/references")).glob("vm-0*.png")))


def test_pixels_are_compared_free_of_brightness() -> None:
    images = torch.rand(2, 3, 4, 4)
    found = AMG().embed(images)
    expected = torch.corrcoef(images.flatten(1))[0, 1]
    torch.testing.assert_close(found[0] @ found[1], expected)
    torch.testing.assert_close(AMG().embed(images * 0.5 + 0.2), found)


def test_sscd_sees_prepared_pictures(tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    file = tmp_path / "sscd.pt"
    torch.jit.script(Mean()).save(str(file))
    expected = (torch.tensor([1.0, 0.0, 0.5]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    picture = torch.tensor([1.0, 0.0, 0.5])[None, :, None, None].expand(1, 3, 64, 64).clone().requires_grad_()
    found = AMG(str(file)).embed(picture)
    torch.testing.assert_close(found[0], expected / expected.norm())
    assert torch.autograd.grad(found.sum(), [picture])[0].any()
    assert set(AMG(str(file)).fingerprint([Prompt("a", "a", references=references())])) == {"references", "sscd"}
    file.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is no TorchScript file of SSCD"):
        AMG(str(file)).embed(picture)


def test_weights_loaded_in_inference_mode_let_gradients_through(tmp_path: Path) -> None:
    file = tmp_path / "conv.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())).save(str(file))
    method = AMG(str(file))
    with torch.inference_mode():
        method.embed(torch.rand(1, 3, 64, 64))
        with torch.inference_mode(False), torch.enable_grad():
            picture = torch.rand(1, 3, 64, 64).requires_grad_()
            assert torch.autograd.grad(method.embed(picture)[0, 0], [picture])[0].any()


def test_gradient_through_the_decoder_matches_finite_differences(planted: Diffusion) -> None:
    method, prompts = AMG(), [Prompt("a", "a", references=references())]
    method.setup(planted, Setup(prompts=prompts))
    assert method.training_images
    known = method.training_images.vectors
    latents = (0.5 * planted.latents([0])).requires_grad_()

    def value(at: torch.Tensor) -> torch.Tensor:
        return (method.embed(planted.decode(at)) @ known[0]).sum()

    (gradient,) = torch.autograd.grad(value(latents), [latents])
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (value(latents + 1e-2 * direction) - value(latents - 1e-2 * direction)) / 2e-2
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_decoding_is_the_pipelines_own(planted: Diffusion) -> None:
    text, latents = planted.encode(["a small red fox"]), planted.latents([0])
    plain = copy.copy(planted.pipeline)
    plain.scheduler = planted.scheduler

    def images(output_type: str) -> torch.Tensor:
        found: torch.Tensor = plain(
            prompt_embeds=text.text,
            negative_prompt_embeds=planted.unconditional(1).text,
            latents=latents,
            num_inference_steps=4,
            guidance_scale=planted.guidance,
            output_type=output_type,
        ).images
        return found

    with torch.no_grad():
        torch.testing.assert_close(planted.decode(images("latent")).clamp(0, 1), images("pt"))


def test_images_above_the_threshold_become_less_similar(planted: Diffusion) -> None:
    texts = ["the golden harbor podcast for nine silent stars"]
    batch, method = batch_of(planted, [(0, 0)], texts), AMG()
    prompts = [Prompt("vm-01", texts[0], "VM", (references()[0],))]
    method.setup(planted, Setup(prompts=prompts))
    assert method.training_images
    known = method.training_images.vectors

    def near(image: torch.Tensor) -> float:
        return float((method.embed(image) @ known.T).max())

    plain, changed = planted.generate(batch.text, batch.latents), images_of(planted, method, batch)
    assert near(plain) > 0.8
    assert near(changed) < near(plain) - 0.2
    before = planted.row_passes
    images_of(planted, method, batch)
    # Decoding and embedding are no passes of the UNet, and no caption is there often enough for one.
    assert planted.row_passes - before == planted.passes_per_image


def test_fingerprint_follows_the_training_images() -> None:
    one, two = ([Prompt("a", "a", references=(file,))] for file in references()[:2])
    assert AMG().fingerprint(one) == AMG().fingerprint([Prompt("b", "b", references=one[0].references)])
    assert AMG().fingerprint(one) != AMG().fingerprint(two)


def test_missing_or_broken_training_images_are_errors(tiny: Diffusion, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt has any: give references"):
        AMG().fingerprint([Prompt("a", "a")])
    with pytest.raises(ConfigError, match=r"call setup\(model, Setup\(prompts=...\)\)"):
        images_of(tiny, AMG(), batch_of(tiny, [(0, 0)]))
    with pytest.raises(ModelError, match="does not exist"):
        AMG("nowhere.pt").fingerprint([Prompt("a", "a", references=references())])
    broken = tmp_path / "broken.png"
    Image.new("RGB", (4, 4)).save(broken)
    broken.write_bytes(broken.read_bytes()[:20])
    with pytest.raises(StoreError, match="can't be read as an image"):
        AMG().setup(tiny, Setup(prompts=[Prompt("a", "a", references=(broken,))]))
