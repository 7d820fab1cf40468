"""What a dry run says: what is needed and missing, what is open, and what it will cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_bench.benchmark.dry_run import forecast
from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.run import run
from nemo_bench.cli import main
from nemo_bench.config import CellConfig, PublishedSettings, build, grid, options
from nemo_bench.diffusion import pipeline_class_of
from nemo_bench.errors import ModelError
from nemo_bench.metrics import Alignment
from nemo_bench.records.io import write_json
from nemo_bench.records.schema import Network, Threshold
from nemo_bench.report.console import show_forecast
from on_disk import read_json, read_records
from small_runs import small
from tiny import tiny_pipeline

FEW = small(steps=5)


@pytest.fixture
def words(tmp_path: Path, prompt_file: Path) -> list[str]:
    """Three prompts of the embedded model."""
    return [*FEW, f"root={tmp_path / 'results'}", f"prompts.files=[{prompt_file}]"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub: its library reads the environment at import only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def states(expected: dict[str, Any]) -> dict[str, str]:
    return {f"{need['kind']} {need['what'].rpartition('/')[2]}": need["state"] for need in expected["needs"]}


def test_passes_are_counted_before_anything_is_known(words: list[str], tmp_path: Path) -> None:
    expected = forecast(grid([*words, "method=none,random,nemo"]))
    measure = {"memorization": 3, "generate": 6, "score": 3}
    assert [row["pending"] for row in expected["cells"]] == [measure, *[{"localize": 3, **measure}] * 2]
    images, measured = 6 * 5 * 2, 3 * 3
    assert [row["passes"] for row in expected["cells"]] == [
        {"calibrate": 0, "localize": 0, "fit": 0, "memorization": measured, "generate": images},
        {"calibrate": 0, "localize": 0, "fit": 0, "memorization": measured, "generate": images},
        {"calibrate": 8 * 3, "localize": measured, "fit": 0, "memorization": measured, "generate": images},
    ]
    assert [row["at_least"] for row in expected["cells"]] == [False, False, True]
    assert expected["total"]["passes"] == {
        "calibrate": 24, "localize": measured, "fit": 0, "memorization": 3 * measured, "generate": 3 * images
    }  # fmt: skip
    assert expected["total"]["seconds"] is None
    assert set(states(expected).values()) == {"there"}
    assert not (tmp_path / "results").exists()


def test_what_nobody_asked_for_and_what_was_given_are_counted_too(words: list[str]) -> None:
    (source, random) = forecast(grid([*words, "method=random"]))["cells"]
    assert source["pending"] == {"localize": 3}
    assert (source["passes"]["generate"], random["passes"]["generate"]) == (0, 60)
    of_sources = forecast(grid([*words, "method=random_shared"]))["cells"]
    assert [row["pending"].get("localize") for row in of_sources] == [3, 3, 3]
    assert [row["pending"].get("generate", 0) for row in of_sources] == [0, 0, 6]
    assert [row["passes"]["calibrate"] for row in of_sources] == [8 * 3, 0, 0]
    (given,) = forecast(grid([*words, "method=nemo", "method.threshold=0.3"]))["cells"]
    assert given["passes"]["calibrate"] == 0
    (guided,) = forecast(grid([*words, "method=nemo", "method.protocol=reference"]))["cells"]
    assert guided["passes"]["calibrate"] == 2 * 8 * 3
    (unguided,) = forecast(grid([*words, "method=none", "model.guidance=1"]))["cells"]
    assert unguided["passes"]["generate"] == 6 * 5


def test_finished_records_tell_what_a_search_takes_and_how_long(words: list[str], tmp_path: Path) -> None:
    run(plan(grid([*words, "method=nemo"])), "test", progress=False)
    done = forecast(grid([*words, "method=nemo"]))
    assert done["total"]["passes"] == {"calibrate": 0, "localize": 0, "fit": 0, "memorization": 0, "generate": 0}
    assert done["total"]["seconds"] == 0
    (cell,) = (p for p in (tmp_path / "results" / "default").iterdir() if p.is_dir())
    stages = ("localize", "memorization", "generate", "score")
    found = {stage: list(read_records(cell, stage).values()) for stage in stages}
    each = sum(r["cost"]["row_passes"] for r in found["localize"]) / 3
    (row,) = forecast(grid([*words, "method=nemo", "seeds=3"]))["cells"]
    assert not row["at_least"]
    assert row["passes"] == {"calibrate": 0, "localize": 3 * round(each), "fit": 0, "memorization": 9, "generate": 90}
    rates = {
        stage: sum(r["cost"]["seconds"] / r["cost"]["row_passes"] for r in found[stage]) / len(found[stage])
        for stage in ("localize", "memorization", "generate")
    }
    scoring = sum(r["cost"]["seconds"] for r in found["score"] if "seed" not in r)
    expected = sum(row["passes"][stage] * rate for stage, rate in rates.items()) + scoring
    assert row["seconds"] == pytest.approx(expected)
    speed = forecast(grid([*words, "method=none"]))["speed"]["planted"]
    assert speed["records"] == sum(map(len, found.values()))
    assert speed["devices"] == [read_json(cell / "env.json")[0]["device"]]


def test_passes_that_a_method_makes_itself_are_told_by_its_records(words: list[str], tmp_path: Path) -> None:
    method = ["method=embedding_optimization", "method.target=0", "method.steps=1", "method.images=null"]
    (first,) = forecast(grid([*words, *method]))["cells"]
    assert first["at_least"]
    run(plan(grid([*words, *method])), "test", progress=False)
    (again,) = forecast(grid([*words, *method, "seeds=3"]))["cells"]
    assert not again["at_least"]
    # Steps with guidance, the unconditional noise, and a pass with its gradients.
    assert again["passes"]["generate"] == 9 * (10 + 3)


def test_damaged_folders_beside_it_are_passed_over(words: list[str], tmp_path: Path) -> None:
    other = tmp_path / "results" / "other" / "cell"
    other.mkdir(parents=True)
    (other / "spec.json").write_text("{")
    (row,) = forecast(grid([*words, "method=none"]))["cells"]
    assert row["seconds"] is None


def test_a_finished_calibration_costs_nothing(words: list[str]) -> None:
    (cell,) = plan(grid([*words, "method=nemo"]))
    assert cell.calibration
    folder = cell.calibration.folder
    (folder / "records").mkdir(parents=True)
    record = {"id": "a", "prompt": "a", "pairs": [0.1], "cost": {"row_passes": 3, "seconds": 1.0}}
    (folder / "records" / "calibrate.0.jsonl").write_text(json.dumps(record) + "\n")
    (row,) = forecast(grid([*words, "method=nemo"]))["cells"]
    assert row["passes"]["calibrate"] == 7 * 3
    path = folder / "threshold.json"
    path.write_text("{}")
    (row,) = forecast(grid([*words, "method=nemo"]))["cells"]
    assert row["passes"]["calibrate"] == 7 * 3  # it lacks what it should hold
    write_json(path, Threshold(protocol="paper", similarity="fixed", velocity="noise"))
    (row,) = forecast(grid([*words, "method=nemo"]))["cells"]
    assert row["passes"]["calibrate"] == 0


@pytest.mark.usefixtures("offline")
def test_missing_weights_are_said_and_the_cost_all_the_same(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["run", "--dry-run", *words, "model=sd14", "model.local_files_only=true", "method=none"]) == 1
    said = capsys.readouterr()
    assert "missing  weights" in said.out
    assert "CompVis/stable-diffusion-v1-4" in said.out
    assert "60 to generate" in " ".join(said.out.split())
    assert "missing: 1 of what the run needs" in said.err
    assert not (tmp_path / "results").exists()


def test_the_files_that_loading_asks_for_are_looked_at(words: list[str], tmp_path: Path) -> None:
    place = tmp_path / "model"
    tiny_pipeline().save_pretrained(place, variant="fp16", max_shard_size="20KB")
    asked = [*words, "method=none", f"model.source={place}"]
    expected = forecast(grid(asked))
    assert states(expected)["weights model"] == "there"
    lost = sorted(place.glob("unet/*-of-*"))[0]
    lost.unlink()
    (weights,) = [need for need in forecast(grid(asked))["needs"] if need["kind"] == "weights"]
    assert weights["state"] == "missing"
    assert lost.name in weights["note"]


def test_a_lora_is_looked_at_and_makes_another_cell(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_file({"unet.mid_block.to_q.lora_A.weight": torch.ones(1, 2)}, tmp_path / "lora.safetensors")
    asked = [*words, "method=none"]
    with_lora = [*asked, f"model.lora={tmp_path / 'lora.safetensors'}"]
    ids = {plan(grid(given))[0].id for given in (asked, with_lora, [*with_lora, "model.lora_scale=0.5"])}
    assert len(ids) == 3
    assert states(forecast(grid(with_lora)))["weights lora.safetensors"] == "there"
    missing = forecast(grid([*asked, "model.lora=gone.safetensors"]))
    assert "missing" in states(missing).values()


def test_all_that_is_missing_is_said_at_once(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(self: Alignment) -> None:
        raise ModelError("no weights of the judge; fetch them")

    monkeypatch.setattr(Alignment, "check", lacks)
    lists = ["prompts.files=[nowhere.csv]", "prompts.calibration=neither.txt", "prompts.obtain=Get it from there."]
    missing = ["model.statistics=statistics.pt", "model.source=no/where", "model.local_files_only=true"]
    expected = forecast(grid([*FEW, *lists, *missing, "method=nemo"]))
    found = states(expected)
    assert {name for name, state in found.items() if state == "missing"} == {
        "weights where",
        "metric alignment (CLIP alignment)",
        "prompts nowhere.csv",
        "general prompts neither.txt",
        "statistics statistics.pt",
    }
    assert expected["cells"] == []
    assert expected["uncounted"] == 1
    notes = {need["kind"]: need["note"] for need in expected["needs"] if need["state"] == "missing"}
    assert notes["prompts"].endswith("Get it from there.")
    assert "fetch them" in notes["metric"]
    # A metric that lacks its weights does not keep its cell from being counted.
    assert len(forecast(grid([*words, "method=none"]))["cells"]) == 1


def test_neurons_that_a_file_lacks_are_missing(words: list[str], tmp_path: Path) -> None:
    expected = forecast(grid([*words, "method=saved", f"method.file={tmp_path / 'neurons.json'}"]))
    assert states(expected)["method's file neurons.json"] == "missing"


def test_memorized_prompts_without_training_image_are_counted(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "bare.jsonl").write_text('{"text": "a red sun", "kind": "VM"}\n{"text": "a hat"}\n')
    expected = forecast(grid([*words[:-1], f"prompts.files=[{tmp_path / 'bare.jsonl'}]", "method=none"]))
    (need,) = (need for need in expected["needs"] if need["kind"] == "training images")
    assert need["state"] == "partly"
    assert need["note"].startswith("1 of 1 memorized prompts have none")


def test_the_table_is_whole_in_a_narrow_terminal(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", *words, "method=none,nemo"]) == 0
    out = capsys.readouterr().out
    for cell in plan(grid([*words, "method=none,nemo"])):
        assert cell.id in out
    passes = "24 to calibrate, ≥ 9 to localize, 18 to measure memorization, 120 to generate"
    assert f"passes of one sample: {passes}; TFLOPs: ≥ " in " ".join(out.split())
    assert "time: ?" in out


@pytest.mark.usefixtures("offline")
def test_a_run_names_all_that_it_lacks_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["prompts.files=[nowhere.csv]", "model.source=no/where", "model.local_files_only=true", "method=amg,nemo"]
    assert main(["run", *words]) == 1
    said = capsys.readouterr().err
    for part in (
        "weights no/where",
        "prompts nowhere.csv",
        "method=nemo needs general prompts",
        "set prompts.calibration",
    ):
        assert part in said
    assert "additional_laion_prompts.csv" in said
    (tmp_path / "bare.txt").write_text("a red sun\na hat\n")
    # Two methods that do not fit these prompts, each for a reason of its own, are both named.
    assert main(["run", "prompts.files=[bare.txt]", "method=amg,wanda,none"]) == 1
    said = capsys.readouterr().err
    for part in ("method amg on planted, bare", "method wanda on planted, bare"):
        assert part in said
    assert not (tmp_path / "results").exists()


LISTS = {
    "memorized_laion_prompts.csv": ";Caption;URL;type;Index\n0;a cup;https://a.b/c.jpg;VM;7\n1;a hat;https://a.b/d.jpg;TM;8\n",
    "additional_laion_prompts.csv": ";Caption;URL;Index\n0;a tree;;1\n1;a sea;;2\n",
    "unmemorized_laion_prompts.csv": ";Caption;URL;Index\n0;a road;;1\n1;a lake;;2\n",
    "coco2014_val_10000.csv": ";Caption;URL;Index\n0;a person;;0000\n1;a sheep;;0001\n",
    "SD1_final.csv": ",prompt,urls\n0,a flag,['https://a.b/e.jpg']\n1,a garden,['https://a.b/f.jpg']\n",
    "sdv1_500_memorized.jsonl": '{"caption": "a cup", "index": 7, "url": "https://a.b/c.jpg"}\n'
    '{"caption": "a hat", "index": 8, "url": "https://a.b/d.jpg"}\n',
}
"""The published lists in small."""


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", options("experiment"))
def test_every_preset_has_a_complete_table_of_needs_on_every_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for file, text in LISTS.items():
        (tmp_path / "data" / file).write_text(text)
    choices = grid([f"experiment={name}", "strengths=false"])
    for model in options("model"):
        (other,) = grid([f"model={model}", "method=none"])
        others = [
            CellConfig({**c.names, "model": model}, replace(c.settings, model=other.settings.model)) for c in choices
        ]
        pipeline_class = pipeline_class_of(other.settings.model.family)
        methods = [build(choice.settings.method, "method") for choice in choices]
        refused = sum(pipeline_class not in method.families for method in methods)
        lacks_training = name == "memsinks"  # whose pools are those of a training
        found = forecast(others)
        (weights,) = (need for need in found["needs"] if need["kind"] == "weights")
        assert weights["state"] == ("there" if model.startswith("planted") else "missing")
        kinds = {need["kind"] for need in found["needs"] if need["state"] == "missing"}
        assert kinds <= {"weights", "metric", "method", *(["method's file"] if lacks_training else [])}
        assert "method" in kinds or not refused
        assert found["uncounted"] >= refused
        if pipeline_class == "StableDiffusionPipeline" and not lacks_training:
            assert "method" not in kinds
            assert found["uncounted"] == 0
        # Models of trainings, and versions, are one model here.
        different = {repr(other.settings) for other in others}
        assert lacks_training or len(found["cells"]) >= len(different) - found["uncounted"]


@pytest.mark.usefixtures("offline")
def test_versions_are_told_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Licence, size and cost of every model, and the operations that each cell takes."""
    monkeypatch.chdir(tmp_path)
    choices = grid(["experiment=versions"])
    bare = forecast(choices)  # without prompts either
    assert bare["uncounted"] == len(choices) == 16
    (tmp_path / "data").mkdir()
    for file, text in LISTS.items():
        (tmp_path / "data" / file).write_text(text)
    expected = forecast(choices)
    assert expected["models"] == bare["models"]
    assert [model["model"] for model in expected["models"]] == [c.names["model"] for c in choices[::2]]
    assert all(value is not None for model in expected["models"] for value in model.values())
    assert {model["model"] for model in expected["models"] if model["gated"]} == {
        "sd3_medium", "sd35_medium", "flux1_dev"
    }  # fmt: skip
    first, *_, flux = expected["models"]
    assert (first["passes_per_image"], flux["passes_per_image"]) == (100, 50)
    assert first["teraflops_per_image"] == pytest.approx(80.3)
    assert first["memory_gb"] == pytest.approx(4 * first["weights"])
    assert flux["memory_gb"] == pytest.approx(2 * flux["weights"])
    for number, row in enumerate(expected["cells"]):
        each = expected["models"][number // 2]["teraflops_per_pass"]
        assert row["teraflops"] == pytest.approx(each * sum(row["passes"].values()))
    assert expected["total"]["teraflops"] == pytest.approx(sum(row["teraflops"] for row in expected["cells"]))
    show_forecast(expected)
    out = capsys.readouterr().out
    assert "FLUX.1-dev Non-Commercial License, gated" in out
    assert "accept the conditions at the model's page" in out


def test_of_another_source_nothing_is_told_before_its_records(words: list[str], tmp_path: Path) -> None:
    (choice,) = grid([*words, "model=sd14", f"model.source={tmp_path}", "method=none"])
    assert choice.settings.model.published == PublishedSettings()
    (flux,) = grid([*words, "model=flux1_dev", "model.size=512", "method=none"])
    assert flux.settings.model.published.teraflops is None
    assert flux.settings.model.published.gated
    flux_published = flux.settings.model.published
    (given,) = grid([*words, "model=sd14", "model.source=mine", "model.published.licence=ours", "method=none"])
    assert given.settings.model.published == PublishedSettings(licence="ours")
    (tuned,) = grid([*words, "model=sd14", "model.unet=mine", "method=none"])
    assert tuned.settings.model.published == PublishedSettings()
    (tmp_path / "conf" / "model").mkdir(parents=True)
    files = {
        "mine": "defaults: [planted, _self_]\nsource: mine\n",
        "small": "defaults: [flux1_dev, _self_]\nsize: 512\n",
        "stated": "defaults: [planted, _self_]\nsource: mine\npublished: {licence: ours}\n",
        "further": "defaults: [stated, _self_]\nsteps: 7\n",
    }
    for name, text in files.items():
        (tmp_path / "conf" / "model" / f"{name}.yaml").write_text(text)
    (mine, small, stated, further) = (
        config.settings.model.published
        for config in grid([*words, f"model={','.join(files)}", "method=none"], tmp_path / "conf")
    )
    assert mine == PublishedSettings()
    assert small == flux_published
    assert stated == further == PublishedSettings(licence="ours")
    place = tmp_path / "model"
    tiny_pipeline().save_pretrained(place)
    asked = [*words, "method=none", f"model.source={place}"]
    (before,) = forecast(grid(asked))["models"]
    assert (before["licence"], before["gated"], before["teraflops_per_pass"]) == (None, None, None)
    (cell,) = plan(grid(asked))
    cell.store.open(cell.spec)
    write_json(cell.store.folder / "network.json", Network(weights=7, flops_per_pass=2 * 10**12))
    after = forecast(grid(asked))
    assert after["models"][0]["teraflops_per_pass"] == 2
    assert after["cells"][0]["teraflops"] == 2 * sum(after["cells"][0]["passes"].values())
    other = forecast(grid([*asked, "model.size=32"]))  # of images of another size the records tell nothing
    assert (other["models"][0]["teraflops_per_pass"], other["speed"]) == (None, {})


def test_general_prompts_that_are_benchmarked_too_are_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for file in ("sdv1_500_memorized.jsonl", "unmemorized_laion_prompts.csv"):
        (tmp_path / "data" / file).write_text(LISTS[file])
    (choice,) = grid(["prompts=wen", "method=nemo"])
    needs = {need["kind"]: need for need in forecast([choice])["needs"]}
    assert needs["general prompts"]["state"] == "there"
    assert "benchmarked too" in needs["general prompts"]["note"]
    (cell,) = plan([choice])
    assert [p.kind for p in cell.prompts] == ["memorized", "memorized", None, None]


def test_captions_of_another_list_take_the_neurons_of_the_cell_that_searched_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memorized prompts are searched once, though their images and those of the captions are of other numbers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for file, text in LISTS.items():
        (tmp_path / "data" / file).write_text(text)
    words = ["experiment=nemo_table", "model=planted", "model.guidance=3", "metrics=default"]
    cells = plan(grid(words))
    by_names = {
        (c.spec.prompts, c.spec.method): c for c in cells if c.spec.settings["method"].get("neurons") != "initial"
    }
    shared, random = by_names["coco", "shared"], by_names["coco", "random_shared"]
    assert shared.source is by_names["nemo", "nemo"] is by_names["nemo", "random"].source
    assert random.source is shared
    assert [p.text for p in shared.source_prompts] == ["a cup", "a hat"]
    assert [p.text for p in random.source_prompts] == ["a person", "a sheep"]
    (tmp_path / "data" / "memorized_laion_prompts.csv").write_text(
        LISTS["memorized_laion_prompts.csv"].replace("cup", "cap")
    )
    changed = {c.spec.method: c.id for c in plan(grid(words)) if c.spec.prompts == "coco"}
    assert changed["none"] == by_names["coco", "none"].id
    assert changed["shared"] != shared.id
    assert changed["random_shared"] != random.id
