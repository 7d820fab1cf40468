"""The library as a newcomer has it: by name, in few lines, and the same as what the command line does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nemo_bench
from nemo_bench import Calibration, ConfigError, Diffusion, NeMo, Prompt, PromptError, load, load_prompts, run
from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.run import run as run_cells
from nemo_bench.benchmark.runner import Runner
from nemo_bench.config import grid
from nemo_bench.localization import REFERENCE, pair_scores
from nemo_bench.methods import Setup
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.schema import LocalizationRecord
from on_disk import read_json, read_records
from small_runs import small
from tiny import tiny_texts

FEW = small(seeds=1, steps=2)


def test_a_model_by_name_has_its_settings() -> None:
    model = load("planted", "model.steps=7")
    assert (model.steps, model.guidance, model.similarity.betas) == (7, 3.0, ())
    with pytest.raises(ConfigError, match="Did you mean 'planted'"):
        load("plantd")
    with pytest.raises(ConfigError, match="Did you mean 'steps'"):
        load("planted", "model.stepps=7")


def test_prompts_by_name_and_the_general_ones() -> None:
    prompts, general = load_prompts("planted", "prompts.limit=3", "prompts.calibration_limit=5")
    assert [prompt.id for prompt in prompts] == ["vm-01", "vm-02", "vm-03", "general-01", "general-02", "general-03"]
    assert all(path.is_file() for path in prompts[0].references)
    assert [prompt.kind for prompt in general] == [None] * 5
    assert load_prompts("planted", "prompts.calibration=null")[1] == []
    for words in (("planted", "prompts.files=[missing.csv]"), ("missing.csv",)):
        with pytest.raises(PromptError, match="no such file"):
            load_prompts(*words)


def test_a_prompt_and_seeds_give_what_conditioning_and_latents_give(tiny: Diffusion) -> None:
    text = tiny_texts(1)[0]
    expected = tiny.generate(tiny.encode([text, text]), tiny.latents([3, 5]))
    assert torch.equal(tiny.generate(text, [3, 5]), expected)
    assert not torch.equal(tiny.generate(text, [3, 4]), expected)


def test_localize_draws_the_noise_of_a_run(tiny: Diffusion, tiny_calibration: Calibration) -> None:
    nemo, prompt = NeMo(), Prompt("a", tiny_texts(1)[0])
    nemo.setup(tiny, Setup(calibration=tiny_calibration))
    found = nemo.localize(tiny, prompt)
    assert found.neurons
    assert found == nemo.localize(tiny, prompt, tiny.latents(seeds_of(prompt, "localize", range(10))))
    assert found != nemo.localize(tiny, prompt, tiny.latents(seeds_of(prompt, "generate", range(10))))


def test_calibrating_in_memory_is_what_a_run_measures(tmp_path: Path, prompt_file: Path) -> None:
    words = [*FEW, f"root={tmp_path}", f"prompts.files=[{prompt_file}]", "method=nemo"]
    cells = plan(grid(words))
    run_cells(cells, "test", progress=False)
    cells[0].store.reopen(LocalizationRecord)  # a method is given a calibration as long as neurons are pending
    measured = Runner(cells[0].config.settings.trainer, progress=False).method(cells[0]).calibration
    model, (prompts, general) = load("planted"), load_prompts("planted", *words[:-1])
    nemo = NeMo().calibrate(model, general, seeds=3)
    assert measured is not None
    assert nemo.calibration is not None
    assert nemo.calibration.threshold == pytest.approx(measured.threshold, abs=1e-6)
    assert nemo.calibration.prompts == measured.prompts == 8
    for layer, mean in measured.mean.items():
        torch.testing.assert_close(nemo.calibration.mean[layer], mean)
        torch.testing.assert_close(nemo.calibration.std[layer], measured.std[layer])
    records = read_records(cells[0].store.folder, "localize").values()
    found = nemo.localize(model, prompts[0], model.latents(seeds_of(prompts[0], "localize", range(3))))
    assert dict(found.neurons) == {
        k: tuple(v) for r in records if r["prompt"] == "vm-01" for k, v in r["localization"]["neurons"].items()
    }


def test_a_calibration_is_of_the_method_s_own_protocol(tiny: Diffusion) -> None:
    prompts = [Prompt(text, text) for text in tiny_texts(3)]
    reference = NeMo(protocol="reference").calibrate(tiny, prompts, seeds=3).calibration
    assert reference is not None
    pairs = torch.tensor(pair_scores(tiny, prompts, 3, REFERENCE), dtype=torch.float64)
    assert pairs.shape == (3, 3)
    assert reference.threshold == pytest.approx(float(pairs.mean() + pairs.std()))
    paper = NeMo().calibrate(tiny, prompts, seeds=3).calibration
    assert paper is not None
    assert paper.threshold != reference.threshold


@pytest.mark.parametrize(("prompts", "seeds"), [(1, 3), (3, 1)])
def test_too_little_to_calibrate_is_explained(tiny: Diffusion, prompts: int, seeds: int) -> None:
    with pytest.raises(ConfigError, match=f"given {prompts} and {seeds}"):
        NeMo().calibrate(tiny, [Prompt(text, text) for text in tiny_texts(prompts)], seeds)


def test_the_size_of_batches_changes_no_scores(tiny: Diffusion) -> None:
    prompts = [Prompt(text, text) for text in tiny_texts(3)]
    whole, parts = (torch.tensor(pair_scores(tiny, prompts, 3, batch_size=size)) for size in (9, 2))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


def test_a_benchmark_and_its_scores_as_rows(tmp_path: Path, prompt_file: Path) -> None:
    words = [*FEW, f"root={tmp_path}", f"prompts.files=[{prompt_file}]", "seeds=2"]
    folder = run("method=none,random", *words)
    assert folder == tmp_path / "default"
    rows = nemo_bench.read_scores(folder)
    ssim = [row for row in rows if row["metric"] == "ssim" and row["method"] == "none"]
    assert [(row["prompt"], row["group"], row["seed"]) for row in ssim] == [
        ("vm-01", "VM", 0),
        ("vm-01", "VM", 1),
        ("tm-26", "TM", 0),
        ("tm-26", "TM", 1),
    ]
    records = {r["id"]: r for path in folder.glob("*__none__*") for r in read_records(path, "score").values()}
    assert sum(len(r["scores"]) for r in records.values()) == sum(row["method"] == "none" for row in rows)
    assert ssim[0]["value"] in [r["scores"].get("ssim") for r in records.values() if r["prompt"] == "vm-01"]
    assert {row["label"] for row in rows} == {"No mitigation", "Random neurons"}
    assert all(row["seed"] is None for row in rows if row["metric"] == "neurons")
    (start,) = read_json(next(folder.glob("*__none__*")) / "env.json")
    assert start["command"].startswith("nemo_bench.run('method=none,random', ")
