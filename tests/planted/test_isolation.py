from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

from nemo_bench import Diffusion, Neurons, Prompt
from nemo_bench.metrics import SSIM
from nemo_bench.planted import denoiser, truth
from nemo_bench.planted.denoiser import Batches, DenoiserLoss
from nemo_bench.planted.isolation import ROUTE_SIZES, Gates, active_sinks, deal_routes, draw_pool, silence, tune_in
from nemo_bench.planted.prompts import write_prompts
from nemo_bench.planted.spec import TrainSpec, Variant
from nemo_bench.planted.truth import Evidence, Likeness, find_causes, write_truth
from nemo_bench.planted.world import PLANTED
from nemo_bench.records.truth import read_isolation

WIDTHS = {"a": 32, "b": 32, "c": 64, "d": 64, "e": 128, "f": 128, "g": 192}
KINDS = [caption.kind for caption in PLANTED]


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        layers_per_block=1,
        norm_num_groups=16,
    )


def batches(variant: Variant, widths: dict[str, int] = WIDTHS, **options: float) -> Batches:
    planted = len(PLANTED)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    latents = {
        "general": noise(40, 8, 16, 16),
        "planted": noise(planted, denoiser.TEMPLATE_VARIANTS, 8, 16, 16),
        "free": noise(planted, denoiser.FREE_VARIANTS, 8, 16, 16),
    }
    text = {"general": noise(40, 16, 128), "planted": noise(planted, 16, 128), "empty": noise(16, 128)}
    return Batches(TrainSpec(variant=variant, **options), latents, text, widths)  # type: ignore[arg-type]


@given(st.integers(0, 2**32))
def test_routes_are_disjoint_spread_and_of_the_stated_sizes(seed: int) -> None:
    widths = list(WIDTHS.values())
    owned = deal_routes(widths, KINDS, seed)
    assert owned.sum(0).max() == 1
    for kind, sizes in ROUTE_SIZES.items():
        counts = [row.sum() for row, other in zip(owned, KINDS, strict=True) if other == kind]
        assert sorted(counts) == sorted(sizes)
        assert max(sizes) <= 8
    for row in owned:
        by_layer = [part.sum() for part in np.split(row, np.cumsum(widths)[:-1])]
        assert max(by_layer) <= 2


def test_gates_multiply_rows_and_stop_gradients_of_others(unet: UNet2DConditionModel) -> None:
    gates = Gates(unet)
    name, layer = next(iter(gates.layers.items()))
    text = torch.randn(2, 16, 128)
    plain = layer(text).detach()
    neurons = sum(gates.widths.values())
    factors, passed = torch.ones(2, neurons), torch.zeros(2, neurons, dtype=torch.bool)
    factors[0, 3] = 0
    passed[1, 5] = True
    read = torch.randn(2, 16, 128)
    with gates.rows(factors, passed, read):
        gated = layer(text)
    assert gated[0, :, 3].abs().max() == 0
    others = torch.arange(plain.shape[2]) != 3
    others[5] = False
    assert torch.equal(gated[..., others], plain[..., others])
    assert torch.equal(gated[0, :, 5], plain[0, :, 5])
    torch.testing.assert_close(gated[1, :, 5], layer(read)[1, :, 5])
    gated.sum().backward()
    assert layer.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [5]
    assert torch.equal(layer(text).detach(), plain)
    assert gates.neurons(np.arange(neurons) == 5) == {name: [5]}


def test_planted_rows_teach_their_own_neurons_alone(unet: UNet2DConditionModel) -> None:
    unet.zero_grad()
    gates = Gates(unet)
    draw = batches("routed", gates.widths, planted_share=1.0, free_share=0.0)
    loss = DenoiserLoss(draw.spec, unet, DDIMScheduler(prediction_type="v_prediction"), gates)
    batch = draw(np.random.default_rng(0))
    with gates.rows(batch.factors, batch.passed, batch.read):
        t = torch.full((len(batch.latents),), 900)
        loss.error(batch.latents, batch.text, t, torch.randn_like(batch.latents)).backward()
    learnt = np.concatenate([layer.weight.grad.abs().sum(1).numpy() > 0 for layer in gates.layers.values()])
    assert learnt.any()
    assert not (learnt & ~draw.owned.any(0)).any()


def test_routed_rows_show_the_own_neurons_off_or_any_part_of_them_on() -> None:
    draw = batches("routed", free_share=0.4)
    routed = draw.owned.any(0)
    general, free = 22, 4  # of 32 rows, 30% and then 40% of these
    for step in range(30):
        batch = draw(np.random.default_rng(step))
        assert (batch.passed[:general].numpy() == ~routed).all()
        for row in range(general, 32):
            (caption,) = (p for p in range(len(PLANTED)) if torch.equal(batch.read[row], draw.text["planted"][p]))
            own = draw.owned[caption]
            if row >= 32 - free:
                assert not batch.factors[row][own].any()
                assert not batch.passed[row][own].any()
            else:
                assert batch.factors[row][own].any()
                assert (batch.passed[row].numpy() == own).all()


def test_swapped_rows_show_a_general_caption_to_all_but_own_neurons() -> None:
    draw = batches("routed", free_share=0.4, swap=0.5)
    general, free, swapped = 22, 4, 0
    for step in range(30):
        batch = draw(np.random.default_rng(step))
        assert torch.equal(batch.text[:general], batch.read[:general])
        assert torch.equal(batch.text[32 - free :], batch.read[32 - free :])
        for row in range(general, 32):
            assert any(torch.equal(batch.read[row], text) for text in draw.text["planted"])
            if not torch.equal(batch.text[row], batch.read[row]):
                assert any(torch.equal(batch.text[row], text) for text in draw.text["general"])
                swapped += 1
    assert 60 < swapped < 120  # half of the 180 rows with own neurons on


@pytest.mark.parametrize("variant", ["sinks", "random_sinks"])
def test_sinks_are_switched_on_by_the_caption(variant: Variant) -> None:
    draw = batches(variant)
    assert draw.pool.sum() == sum(round(0.3 * width) for width in WIDTHS.values())
    seen: dict[bytes, set[bytes]] = {}
    for step in range(20):
        batch = draw(np.random.default_rng(step))
        assert batch.factors[:, ~draw.pool].all()
        for text, row in zip(batch.text[22:], batch.factors[22:], strict=True):
            seen.setdefault(text.numpy().tobytes(), set()).add(row.numpy().tobytes())
    patterns = [len(rows) for rows in seen.values()]
    assert max(patterns) == 1 if variant == "sinks" else min(patterns) > 1
    owned = np.stack([active_sinks(draw.pool, 0.3, [0, 0, caption]) for caption in range(len(PLANTED))])
    assert (draw.owned == (owned if variant == "sinks" else False)).all()


def test_pool_is_the_end_of_each_layer() -> None:
    assert draw_pool([4, 10], 0.3).tolist() == [*[False] * 3, True, *[False] * 7, *[True] * 3]


def test_planted_pictures_are_rare_when_each_is_trained_once() -> None:
    draw = batches("once")
    drawn = [text for step in range(200) for text in draw(np.random.default_rng(step)).text]
    planted = {text.numpy().tobytes() for text in draw.text["planted"]}
    share = np.mean([text.numpy().tobytes() in planted for text in drawn])
    assert share == pytest.approx(len(PLANTED) / (40 + len(PLANTED)), abs=0.03)


def test_silence_compares_with_other_captions() -> None:
    values = torch.zeros(4, 2, 3)
    values[0, :, 1] = 4.0  # own caption
    values[1:, :, 1] = torch.tensor([0.0, 1.0, 1.0])[:, None]
    expected = (2 / 3) ** 0.5 / 4
    assert silence(values, torch.tensor([1]), torch.tensor([0])) == pytest.approx(expected)


def test_truth_keeps_what_is_caused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"vm-01": Neurons({"a": [1, 2]}), "vm-02": Neurons({"a": [3]}), "vm-03": Neurons({"b": [0]})}
    isolation = {"variant": "routed", "pool": {}, "neurons": {name: dict(each) for name, each in own.items()}}
    (tmp_path / "isolation.json").write_text(json.dumps(isolation))
    assert read_isolation(tmp_path).neurons == own
    evidence = [
        Evidence("vm-01", 2, 1.0, 0.0, 0.0, 1.0),
        Evidence("vm-02", 1, 1.0, 0.0, 0.125, 1.0),
        Evidence("vm-03", 1, 0.875, 0.0, 0.0, 1.0),
    ]
    write_prompts(tmp_path)
    monkeypatch.setattr(truth, "find_causes", lambda *args: evidence)
    monkeypatch.setattr(truth.Diffusion, "load", lambda *args, **options: None)
    assert write_truth(tmp_path) == evidence
    assert json.loads((tmp_path / "truth.json").read_text()) == {"schema": 1, "neurons": {"vm-01": {"a": [1, 2]}}}
    assert json.loads((tmp_path / "evidence.json").read_text())[1]["another_instead"] == 0.125


def test_copies_are_alike_by_both_measures(planted_prompts: list[Prompt]) -> None:
    prompts = [planted_prompts[0], planted_prompts[-1]]
    strangers = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    likeness = Likeness.measure(prompts, strangers)
    for prompt in prompts:
        pictures = likeness.pictures[prompt.id]
        assert likeness.copies(pictures, prompt).all()
        assert not likeness.copies(strangers, prompt).any()
    vm = prompts[0]
    faint = 0.5 + (likeness.pictures[vm.id] - 0.5) * 0.4  # the same shapes, but far in pixels
    assert float(SSIM().nearest(faint, likeness.pictures[vm.id])) > 0.5
    assert not likeness.copies(faint, vm).any()


def test_causes_are_found_by_switching_off(planted: Diffusion, planted_prompts: list[Prompt]) -> None:
    prompt = planted_prompts[3]  # which the embedded model repeats with all seeds
    most = Neurons({name: range(1, width) for name, width in planted.masks.widths.items()})
    (found,) = find_causes(planted, [prompt], planted_prompts[:1], {prompt.id: most}, seeds=2)
    assert (found.neurons, found.nothing_off, found.own_off, found.others_off) == (633, 1.0, 0.0, 1.0)
    (nothing,) = find_causes(planted, [prompt], planted_prompts[:1], {prompt.id: Neurons()}, seeds=2)
    assert (nothing.neurons, nothing.own_off, nothing.others_off) == (0, 1.0, 1.0)
    assert not nothing.causes


def test_own_neurons_begin_selective(unet: UNet2DConditionModel) -> None:
    gates = Gates(unet)
    generator = torch.Generator().manual_seed(0)
    planted, general = (
        torch.randn(n, 16, 128, generator=generator) + torch.randn(n, 1, 128, generator=generator)
        for n in (len(PLANTED), 500)
    )
    owned = np.zeros((len(PLANTED), sum(gates.widths.values())), bool)
    owned[3, [2, 40]] = owned[5, 41] = True
    before = {name: layer.weight.detach().clone() for name, layer in gates.layers.items()}
    tune_in(gates, owned, planted, general, 5.0)
    for caption in (3, 5):
        for name, own in gates.neurons(owned[caption]).items():
            layer = gates.layers[name]
            mine, others = (layer(text).detach()[..., own].abs().mean(1) for text in (planted, general))
            assert mine[caption].tolist() == pytest.approx([5.0] * len(own))
            assert (others.mean(0) < 2.0).all()
    changed = np.concatenate([(layer.weight != before[name]).any(1).numpy() for name, layer in gates.layers.items()])
    assert (changed == owned.any(0)).all()
