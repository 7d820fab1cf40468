"""Audits of finished runs, as a user has them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nemo_bench import Diffusion, Neurons, resolve
from nemo_bench.benchmark.audit import cells_of, inverted_groups, verdict
from nemo_bench.benchmark.inversion import divergence
from nemo_bench.benchmark.stages.audit import AuditSettings
from nemo_bench.cli import main
from nemo_bench.config import build, grid, options
from nemo_bench.diffusion import Conditioning, fitted_picture
from nemo_bench.diffusion.noise import require_finite
from nemo_bench.errors import ConfigError
from nemo_bench.methods import Batch, NeMo
from nemo_bench.metrics import SSIM, PixelDistance
from nemo_bench.prompts.tasks import seeds_of
from nemo_bench.records.data import Prompt
from nemo_bench.records.images import open_image
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import Inversion, Inverted, SearchRecord
from nemo_bench.records.store import Store, read_localizations
from nemo_bench.report.audit import CellAudit, audits_of
from nemo_bench.report.terminal import terminal_audits
from on_disk import read_json, read_records
from owned_writes import watch_writes
from small_runs import small

QUICK = ["steps=2", "samples=2", "images=2", "trainer=cpu"]
CONTROLS = "package:planted/prompts/controls.jsonl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a verbatim, a template and a general prompt by methods that can be audited and one that can't."""
    folder = tmp_path_factory.mktemp("finished")
    source = Path(resolve("package:planted/prompts"))
    planted = [json.loads(line) for line in (source / "planted.jsonl").read_text().splitlines()]
    for line in planted:
        line["references"] = [str((source / path).resolve()) for path in line["references"]]
    general = json.loads((source / "general.jsonl").read_text().splitlines()[0])
    lines = [planted[0], planted[-1], general]
    (folder / "three.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        *small(seeds=1),
        f"root={folder}",
        f"prompts.files=[{folder / 'three.jsonl'}]",
        "method=none,nemo,embedding_noise",
    ]
    assert main(["run", *words, f"prompts.controls={CONTROLS}"]) == 0
    return folder / "default"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results" / "default"))


def cell(run: Path, method: str) -> Path:
    (place,) = (path for path in run.iterdir() if f"__{method}__" in path.name)
    return place


def lines(place: Path) -> int:
    return sum(path.read_text().count("\n") for path in place.glob("records/audit*.jsonl"))


def audits(run: Path, method: str) -> list[dict[str, Any]]:
    return list(read_json(cell(run, method) / "audit.json"))


def shown_audits(run: Path) -> list[CellAudit]:
    """Audits as the report shows them."""
    return audits_of(load_results(run))


def losses(place: Path, search: dict[str, Any]) -> list[float]:
    """The losses of the steps of a search."""
    found: list[float] = load_file(place / search["sheet"].replace(".png", ".safetensors"))["losses"].tolist()
    return found


def test_commands_write_into_the_folder_of_a_run_only_as_its_owner(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, others = watch_writes(monkeypatch, copy)
    for command, wanted in (
        (["audit", str(copy), "--cell", "nemo", *QUICK], {"report.html"}),
        (["score", str(copy)], {"run.json", "report.html"}),
        (["report", str(copy)], {"report.html", "leaderboard.json"}),
        (
            ["detect", f"root={copy.parent}", "detector=magnitude_first", "prompts.limit=1", "trainer=cpu"],
            {"run.json", "detection.html", "report.html"},
        ),
        (["report", str(copy)], {"detection.html", "report.html"}),
    ):
        held.clear()
        assert main(command) == 0
        assert wanted <= held, command
        assert not others, command


def test_sheets_and_scores_are_those_of_the_embeddings_in_the_files(
    copy: Path, planted: Diffusion, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (cell(copy, "nemo") / "env.json").read_bytes()
    assert main(["audit", str(copy), "--cell", "nemo", *QUICK]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    search = "2 steps of 2 samples at rate 0.1 from the prompt, 2 images each"
    assert f"NeMo: {search} (2 training images, 2 controls)" in shown
    (entry,) = audits(copy, "nemo")
    assert entry["settings"] == {"steps": 2, "rate": 0.1, "samples": 2, "start": "prompt", "images": 2}
    assert list(entry["states"]) == ["prompt", "found", "unmitigated"]
    assert [(s["prompt"], s["source"]) for s in entry["searches"]] == [
        ("vm-01", "vm-01"), ("vm-01", "general-01"), ("tm-26", "tm-26"), ("tm-26", "general-02"),
    ]  # fmt: skip
    assert set(entry["metrics"]) == {"ssim", "tiled_l2", "memorized"}

    store = Store(cell(copy, "nemo"))
    neurons = {name: found.neurons for name, found in read_localizations(store.folder).items()}
    assert all(neurons[name].count for name in ("vm-01", "tm-26"))
    planted.steps, kept = 3, planted.steps
    found = {}
    for search in entry["searches"]:
        sheet = open_image(store.folder / search["sheet"])
        assert sheet.size == (3 * 64, 3 * 64)
        seeds = seeds_of(Prompt(search["source"], ""), "generate", range(2))
        embedding = load_file(store.folder / search["sheet"].replace(".png", ".safetensors"))
        text = {"prompt": planted.encode([search["text"]]), "found": Conditioning(embedding["text"])}
        text["unmitigated"] = text["found"]
        assert not torch.allclose(text["prompt"].text, text["found"].text)
        reference = min(p for p in Path(resolve("package:planted")).glob(f"[cr]*/{search['source']}*.png"))
        target = fitted_picture(reference, (64, 64))
        for row, state in enumerate(text):
            tiles = [sheet.crop((64 * c, 64 * row, 64 * c + 64, 64 * row + 64)) for c in range(3)]
            tiles = SSIM().embed(tiles, (64, 64), torch.device("cpu"))
            torch.testing.assert_close(tiles[0], target, rtol=0, atol=1e-6)
            own = Neurons() if state == "unmitigated" else neurons[search["prompt"]]
            with torch.no_grad(), planted.block(own):
                images = planted.generate(text[state].rows([0, 0]), planted.latents(seeds))
            assert float((images - tiles[1:]).abs().max()) < 0.02
            scores = search["scores"][state]
            assert scores["ssim"] == pytest.approx(float(SSIM().compare(tiles[1:], target[None]).mean()), abs=1e-4)
            far = PixelDistance().compare(tiles[1:], target[None])
            assert scores["memorized"] == float((far < 0.15).double().mean())
            found[search["group"], search["prompt"], state] = scores["ssim"]
    planted.steps = kept
    # Images of the same seed without a search are those of the run.
    first = Image.open(store.folder / entry["searches"][0]["sheet"]).crop((64, 0, 128, 64))
    run_image = SSIM().embed([first, open_image(store.folder / "images/vm-01_00.png")], (64, 64), torch.device("cpu"))
    assert float((run_image[0] - run_image[1]).abs().max()) < 0.02

    mean = entry["scores"]["control"]["ssim"]["found"]["mean"]
    assert mean == pytest.approx(sum(found["control", p, "found"] for p in ("vm-01", "tm-26")) / 2, abs=1e-6)
    difference = sum(found["memorized", p, "found"] - found["control", p, "found"] for p in ("vm-01", "tm-26")) / 2
    assert entry["compared"]["ssim"]["difference"] == pytest.approx(difference, abs=1e-6)
    assert entry["verdict"] == {"memorized": "too few"}
    passes = 2 * (2 * 2) + 3 * 2 * 2 * 3  # the search forward and back; three rows of two guided images of three steps
    assert entry["cost"]["row_passes_per_search"] == passes
    assert (cell(copy, "nemo") / "env.json").read_bytes() == before
    page = (copy / "report.html").read_text()
    assert 'id="audit"' in page
    assert "A verdict takes at least 6 different controls; searches that share a control count once." in page
    (shown_audit,) = shown_audits(copy)
    rows = {title: dict(zip(shown_audit.headings, cells, strict=True)) for title, cells in shown_audit.rows}
    ssim = rows[entry["metrics"]["ssim"]["title"]]
    for group, name in (("memorized", "Memorized"), ("control", "Controls")):
        for state in ("prompt", "found", "unmitigated"):
            mean = sum(found[group, prompt, state] for prompt in ("vm-01", "tm-26")) / 2
            assert float(ssim[f"{name}: {state}"]) == pytest.approx(mean, abs=0.006)
            assert f"{name}: {state}</th>" in page


def test_a_killed_audit_resumes_on_two_processes_with_the_same_result(copy: Path, tmp_path: Path) -> None:
    words = [str(copy), "--cell", "none", *QUICK, "images=1"]
    assert main(["audit", *words]) == 0
    place = cell(copy, "none")
    (whole,) = audits(copy, "none")
    first = [losses(place, search) for search in whole["searches"]]
    count = lines(place)
    assert main(["audit", *words]) == 0
    assert lines(place) == count == 8

    (place / whole["searches"][2]["sheet"]).unlink()
    (records,) = place.glob("records/audit.*.jsonl")
    content = records.read_text().splitlines(keepends=True)
    records.write_text("".join(content[:3]) + content[3][:40])
    (place / "audit.json").unlink()
    (place / "audit.done").unlink()
    command = [sys.executable, "-m", "nemo_bench.cli", "audit", *words, "trainer.devices=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(Store(place).records(SearchRecord)) == 4
    assert lines(place) - count <= 2
    (again,) = audits(copy, "none")
    for before, search in zip(first, again["searches"], strict=True):
        assert losses(place, search) == pytest.approx(before, abs=1e-3)
    for one, other in zip(whole["searches"], again["searches"], strict=True):
        for state, scores in one["scores"].items():
            assert scores == pytest.approx(other["scores"][state], abs=2e-2)


def test_audits_of_other_settings_and_metrics_are_kept_beside_the_first(copy: Path) -> None:
    words = ["audit", str(cell(copy, "none")), *QUICK, "images=1", "limit=1"]
    assert main(words) == 0
    place, (prompt,) = cell(copy, "none"), audits(copy, "none")
    assert list(prompt["states"]) == ["prompt", "found"]  # nothing is mitigated
    (audit,) = shown_audits(copy)
    assert not any("unmitigated" in heading for heading in audit.headings)
    assert main([*words, "start=random", "batch_size=64"]) == 0
    first, random = audits(copy, "none")
    assert first == prompt
    assert random["settings"]["start"] == "random"
    random_losses, own_losses = (losses(place, entry["searches"][0]) for entry in (random, first))
    assert len(random_losses) == 2
    assert random_losses[0] > 1.2 * own_losses[0]
    searched = len(read_records(place, "audit"))
    assert main([*words, "~metrics.ssim", "metrics=default"]) == 0
    assert len(read_records(place, "audit")) == searched
    _, third = audits(copy, "none")
    assert set(third["metrics"]) == {"tiled_l2", "memorized"}
    tables = terminal_audits(shown_audits(copy))
    assert sum(isinstance(part, str) for part in tables) == 2


def test_a_control_of_several_prompts_counts_once(copy: Path, tmp_path: Path) -> None:
    source = Path(resolve(CONTROLS))
    line = json.loads(source.read_text().splitlines()[0])
    line["references"] = [str((source.parent / path).resolve()) for path in line["references"]]
    (tmp_path / "one.jsonl").write_text(json.dumps(line))
    words = ["audit", str(cell(copy, "none")), *QUICK, "images=1", f"controls={tmp_path / 'one.jsonl'}"]
    assert main(words) == 0
    (entry,) = audits(copy, "none")
    assert [search["group"] for search in entry["searches"]] == ["memorized", "control"] * 2
    assert entry["groups"]["control"] == 1
    own, first, other, second = (search["scores"]["found"]["ssim"] for search in entry["searches"])
    assert entry["scores"]["control"]["ssim"]["found"]["mean"] == pytest.approx((first + second) / 2)
    assert entry["compared"]["ssim"]["prompts"] == 1
    assert entry["compared"]["ssim"]["difference"] == pytest.approx((own - first + other - second) / 2)


def test_an_audit_without_controls_has_no_verdict_and_says_so(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cell(copy, "none") / "env.json"
    content = read_json(path)
    content[-1]["settings"]["prompts"]["controls"] = None
    path.write_text(json.dumps(content))
    assert main(["audit", str(copy), "--cell", "none", *QUICK, "images=1", "limit=1"]) == 0
    shown = capsys.readouterr().out
    assert "no controls: whether a search brings back just any picture is not known" in shown
    (entry,) = audits(copy, "none")
    assert (entry["compared"], entry["verdict"]) == ({}, {"memorized": "no controls"})


def test_pictures_are_inverted_beside_the_search_for_embeddings(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["audit", str(cell(copy, "nemo")), "audit=inversion", "steps=2", "check=2", "samples=1", "guidances=[3]"]
    words += ["images=1", "limit=1", "trainer=cpu"]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "InvMM: 0 of 2 pictures of memorized prompts replicated; 0 of 2 pictures of controls replicated." in shown
    (entry,) = audits(copy, "nemo")
    assert (entry["settings"]["audit"], entry["settings"]["guidances"]) == ("inversion", [3.0])
    assert list(entry["states"]) == ["prompt", "found"]
    assert entry["inverted"]["memorized"] == {"pictures": 2, "reached": 0}
    assert entry["inverted_auc"] == 0.5  # none was replicated, and so they are equal
    (record, *_) = read_records(cell(copy, "nemo"), "audit").values()
    assert record["inversion"]["steps"] == 2
    tensors = load_file(cell(copy, "nemo") / record["file"])
    mean, log_variance = tensors["mean"], tensors["log_variance"]
    expected = float(divergence(mean, log_variance))
    assert record["inversion"]["divergence"] == pytest.approx(expected, rel=1e-4)
    passes = 2 * 2 + 2 * 3 + 2 * 3  # two steps forward and back; a guided image of three steps of the check, and one
    assert entry["cost"]["row_passes_per_search"] == passes
    count = lines(cell(copy, "nemo"))
    assert main(words) == 0
    assert lines(cell(copy, "nemo")) == count == 2 * 4
    assert "at most 2 steps of 1 samples at rate 0.1" in (copy / "report.html").read_text()
    # Another memorization rate may end an inversion elsewhere, so it is another one.
    (one,) = cells_of(cell(copy, "nemo"), words[2:-1])
    (other,) = cells_of(cell(copy, "nemo"), [*words[2:-1], "metrics.memorized.threshold=0.2"])
    assert not {task.id for task in one.searches} & {task.id for task in other.searches}


def test_ends_of_searches_from_random_starts_are_compared(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = cell(copy, "nemo")
    words = ["audit", str(place), *QUICK, "steps=1", "samples=1", "images=1", "limit=1"]
    assert main([*words, "starts=2", "ratio=0.1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 searches from random numbers for 2 pictures. Mean distance of embeddings: what they found" in shown
    (entry,) = audits(copy, "nemo")
    assert (entry["settings"]["starts"], entry["settings"]["ratio"]) == (2, 0.1)
    own, control, *_ = entry["searches"]
    assert "diagnosis" not in control
    diagnosis = own["diagnosis"]
    assert diagnosis["spread"]["found"]["embeddings"] == 2
    assert set(diagnosis["activations"]["mid_block"]) == {"found", "memorized"}
    with pytest.raises(ConfigError, match="starts=1 leaves no pairs"):
        cells_of(place, [*QUICK, "starts=1"])


def test_how_well_divergences_tell_memorized_pictures_from_controls() -> None:
    """Pictures that were not replicated come last, whatever their divergence."""

    def ended(divergence: float, *, reached: bool = True) -> Inversion:
        return Inversion(divergence=divergence, reached=reached, steps=50, guidance=3.0)

    memorized = [ended(0.1), ended(0.3), ended(0.01, reached=False)]
    controls = [ended(0.2), ended(0.02, reached=False)]
    found, auc = inverted_groups({"memorized": memorized, "control": controls})
    assert found["memorized"] == Inverted(pictures=3, reached=2, median=0.3)
    assert found["control"] == Inverted(pictures=2, reached=1)
    assert auc == pytest.approx((2 + 1 + 0.5) / 6)
    assert inverted_groups({"memorized": memorized, "control": []})[1] is None


def set_dtype(place: Path, dtype: str) -> None:
    env = read_json(place / "env.json")
    env[-1]["settings"]["model"]["dtype"] = dtype
    (place / "env.json").write_text(json.dumps(env))


def test_a_cell_in_half_precision_is_left_out_and_the_others_are_audited(copy: Path, said: list[str]) -> None:
    set_dtype(cell(copy, "none"), "float16")
    assert [c.spec.method for c in cells_of(copy, QUICK)] == ["nemo"]
    (line,) = (line for line in said if "float16" in line)
    assert line.endswith(cell(copy, "none").name)


def test_a_search_fails_alone_where_the_method_is_not_finite(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = NeMo.apply

    def breaks(self: NeMo, model: Diffusion, batch: Batch) -> AbstractContextManager[Batch]:
        require_finite("activations", torch.tensor([nan if p.id == "vm-01" else 0 for p in batch.prompts]))
        return apply(self, model, batch)

    monkeypatch.setattr(NeMo, "apply", breaks)
    assert main(["audit", str(copy), "--cell", "nemo", *QUICK]) == 0
    searches = read_records(cell(copy, "nemo"), "audit").values()
    assert {s["prompt"]: s.get("failed") for s in searches if s["prompt"] == s["source"]} == {
        "vm-01": "activations are not finite",
        "tm-26": None,
    }


def test_an_audit_without_a_memorization_rate_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(copy), "--cell", "none", *QUICK, "~metrics.memorized"]) == 1
    said = capsys.readouterr().err
    assert "no metric of this run says which images are memorized, so there would be no verdict; add one" in said
    assert not (cell(copy, "none") / "audit").exists()


def test_methods_that_change_neurons_or_weights_alone_are_auditable() -> None:
    """Those that change nothing but neurons or weights; whoever adds a method decides."""
    built = {name: build(grid([f"method={name}"])[0].settings.method, "method") for name in options("method")}
    auditable = sorted(name for name, method in built.items() if method.auditable)
    assert auditable == [
        "adversarial_fine_tuning",
        "cluster_neurons",
        "nemo",
        "none",
        "one_edit",
        "other_prompt",
        "random",
        "random_shared",
        "saved",
        "shared",
        "sinks",
        "unlearning",
        "wanda",
    ]


def test_cells_that_cannot_be_audited_are_left_out_or_explained(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    cells = cells_of(copy, QUICK)
    assert [c.spec.method for c in cells] == ["none", "nemo"]
    assert len(said) == 1
    assert re.fullmatch(
        r"left out, since neurons and weights stay as they are; .*: planted__embedding_noise__\w+", said[0]
    )

    def error(*words: str) -> str:
        capsys.readouterr()
        assert main(["audit", *words]) == 1
        return capsys.readouterr().err

    run = str(copy)
    assert "can't be audited: neurons and weights stay as they are" in error(run, "--cell", "embedding_noise")
    assert "can't be audited" in error(str(cell(copy, "embedding_noise")))
    assert "Choices: embedding_noise, nemo, none" in error(run, "--cell", "nemoo")
    assert "unknown setting 'step=3'" in error(run, "step=3")
    assert "unknown audit 'inverson'. Did you mean 'inversion'?" in error(run, "audit=inverson")
    assert "unknown setting 'start=random'" in error(run, "audit=inversion", "start=random")
    assert "Did you mean 'steps'?" in error(run, "step=3")
    assert "steps=0: expected greater than or equal to 1" in error(run, "steps=0")
    assert "steps=many: expected a whole number" in error(run, "steps=many")
    assert "Did you mean 'prompt'?" in error(run, "start=prompts")
    assert "has no picture" in error(run, "controls=package:planted/prompts/general.jsonl")
    assert "is marked VM" in error(run, "controls=package:planted/prompts/planted.jsonl")
    assert "is no results folder" in error(str(copy.parent))
    (cell(copy, "none") / "generate.done").unlink()
    assert "not all images are there; go on" in error(run, "--cell", "none")
    path = cell(copy, "nemo") / "spec.json"
    content = read_json(path)
    content["settings"]["model"]["weights"] = "0" * 16
    path.write_text(json.dumps(content))
    assert "are not those that planted__nemo" in error(run, "--cell", "nemo")
    path.write_text(json.dumps({**content, "cell": ""}))
    assert "other weights" in error(run, "--cell", "nemo")
    place = cell(copy, "none")
    spec = read_json(place / "spec.json")
    (place / "generate.done").touch()
    other = {**spec, "cell": "", "settings": {**spec["settings"], "method": {"ratio": 0.1}}}
    (place / "spec.json").write_text(json.dumps(other))
    assert "hold something else by now" in error(run, "--cell", "none")
    (place / "spec.json").write_text(json.dumps(spec))
    set_dtype(place, "float16")
    assert "vanish in float16; generate with model.dtype=bfloat16" in error(run, "--cell", "none")
    (place / "spec.json").write_text(json.dumps({**spec, "detector": "magnitude"}))
    assert "made by a detector and holds no images" in error(str(place))
    assert not list(copy.glob("*/audit.json"))


@pytest.mark.parametrize("change", [lambda s: setattr(s, "steps", 3), lambda s: setattr(s, "start", "random")])
def test_the_key_of_settings_changes_with_those_that_change_a_search(change: Callable[[AuditSettings], None]) -> None:
    settings = AuditSettings(limit=3, controls="a")
    assert settings.key == AuditSettings().key
    change(settings)
    assert settings.key != AuditSettings().key


@pytest.mark.parametrize(
    ("prompt", "found", "control", "expected"),
    [
        ([0.0] * 8, [1.0] * 8, [0.0] * 8, "hidden"),
        ([1.0] * 8, [1.0] * 8, [0.0] * 8, "kept"),
        ([0.0] * 8, [1.0] * 8, [1.0] * 8, "not shown"),
        ([0.0] * 8, [0.0] * 8, [1.0] * 8, "not shown"),
        ([0.0] * 8, [0.0] * 8, [0.0] * 8, "not shown"),
        ([0.0] * 5, [1.0] * 5, [0.0] * 5, "too few"),
        ([0.0] * 6, [1.0] * 6, [0.0] * 6, "hidden"),
        ([0.0] * 8, [1.0] * 8, [], "no controls"),
        # 17% by prompt, 100% found: that five of five gain has a chance of 6%, and one by its prompt is not many.
        ([1.0] + [0.0] * 5, [1.0] * 6, [0.0] * 6, "unclear"),
        ([1.0] * 3 + [0.0] * 3, [1.0] * 6, [0.0] * 6, "unclear"),
        ([1.0] * 6, [1.0] * 6, [0.0] * 6, "kept"),
        ([1.0] * 7 + [0.0], [1.0] * 8, [0.0] * 8, "kept"),
        # By their prompts no more often than controls with what was found for them.
        ([0.5] * 8, [0.5] * 8, [0.0, 0.5] * 4, "not shown"),
        ([0.5] * 7 + [0.0] * 5, [1.0] * 3 + [0.5] * 9, [0.0] * 12, "hidden"),
    ],
)
def test_the_verdict_follows_from_differences_to_prompts_and_controls(
    prompt: list[float], found: list[float], control: list[float], expected: str
) -> None:
    over_control, prompt_over_control = (np.array(own)[: len(control)] - np.array(control) for own in (found, prompt))
    changes = (np.array(found) - np.array(prompt), over_control, prompt_over_control)
    assert verdict(*changes) == expected
    unmitigated = "memorized" if expected in ("hidden", "kept", "unclear") else expected
    assert verdict(*changes, mitigated=False) == unmitigated
