"""Statistics and threshold: measured, given, interrupted, over several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_bench.benchmark import runner
from nemo_bench.benchmark.plan import Cell, plan
from nemo_bench.benchmark.runner import Runner, load_model
from nemo_bench.benchmark.stages import base
from nemo_bench.benchmark.stages import calibrate as calibrate_stage
from nemo_bench.cli import main
from nemo_bench.config import grid
from nemo_bench.errors import ConfigError, ModelError, StoreError
from nemo_bench.localization import Calibration, activation_statistics, read_statistics, threshold, write_statistics
from nemo_bench.records.io import prompts_digest
from on_disk import read_json, read_records

SMALL = ["localize_seeds=2", "prompts.calibration_limit=10", "trainer=cpu", "method=nemo"]


def cell_of(root: Path, *more: str) -> Cell:
    return plan(grid([*SMALL, f"root={root}", *more]))[0]


def calibrate(cell: Cell) -> Cell:
    Runner(cell.config.settings.trainer, progress=False).calibrate(cell)
    return cell


def calibration_of(cell: Cell) -> Calibration:
    """The calibration that the cell's method gets."""
    found = Runner(cell.config.settings.trainer, progress=False).method(cell).calibration
    assert found
    return found


def folder_of(cell: Cell) -> Path:
    assert cell.calibration
    return cell.calibration.folder


def refuse(*args: object, **options: object) -> None:
    raise AssertionError("this was not to be computed")


def contents(cell: Cell) -> dict[str, bytes]:
    """What was measured, without records, whose cost may differ."""
    folder = folder_of(cell)
    files = [*folder.glob("*.pt"), *folder.glob("threshold.json"), *folder.glob("statistics/*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CHUNK", 4)
    monkeypatch.setattr(calibrate_stage, "ENCODED", 3)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """A calibration measured in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "CHUNK", 4)
        patch.setattr(calibrate_stage, "ENCODED", 3)
        return calibrate(cell_of(tmp_path_factory.mktemp("measured")))


def test_statistics_and_threshold_are_those_of_the_library(measured: Cell) -> None:
    texts = [p.text for p in measured.calibration_prompts]
    mean, std = activation_statistics(load_model(measured.config.settings.model), [texts])
    found = calibration_of(measured)
    assert (list(found.mean), found.prompts) == (list(mean), len(texts))
    for layer in mean:
        torch.testing.assert_close(found.mean[layer], mean[layer])
        torch.testing.assert_close(found.std[layer], std[layer])
    folder = folder_of(measured)
    assert len(list((folder / "statistics").iterdir())) == len(read_records(folder, "chunk")) == 3
    pairs = [value for record in read_records(folder, "calibrate").values() for value in record["pairs"]]
    assert found.threshold == pytest.approx(threshold(pairs))
    about = read_json(folder / "threshold.json")
    assert about["threshold"] == found.threshold == pytest.approx(about["mean"] + about["std"])


def test_the_text_encoder_sees_some_prompts_at_once_and_never_a_whole_chunk(
    measured: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    model = load_model(measured.config.settings.model)
    encode = model.encode

    def watch(texts: list[str]) -> object:
        sizes.append(len(texts))
        return encode(texts)

    monkeypatch.setattr(model, "encode", watch)
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", lambda settings: model)
    calibrate(cell_of(tmp_path, "method.threshold=0.4"))
    assert sizes == [3, 1, 3, 1, 2]


def test_interrupted_it_goes_on_to_the_same_bits_whatever_the_batches(
    measured: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, done = calibrate_stage.save_moments, []

    def stop_at_the_second(path: Path, moments: object) -> None:
        if len(done) == 1:
            raise RuntimeError("stopped")
        done.append(path.name)
        save(path, moments)  # type: ignore[arg-type]

    cell = cell_of(tmp_path, "batch_size=4")
    monkeypatch.setattr(calibrate_stage, "save_moments", stop_at_the_second)
    with pytest.raises(RuntimeError, match="stopped"):
        calibrate(cell)
    assert not cell.is_calibrated
    again = []
    monkeypatch.setattr(calibrate_stage, "save_moments", lambda path, m: (again.append(path.name), save(path, m)))
    calibrate(cell_of(tmp_path, "batch_size=4"))
    assert len(again) == 2
    assert not set(again) & set(done)
    parts = {name: content for name, content in contents(cell).items() if name != "threshold.json"}
    assert len(parts) == 4
    assert parts.items() <= contents(measured).items()


def test_the_advice_on_a_damaged_part_works(measured: Cell, tmp_path: Path) -> None:
    cell = calibrate(cell_of(tmp_path))
    folder = folder_of(cell)
    (folder / "statistics.pt").unlink()
    part = next((folder / "statistics").iterdir())
    part.write_bytes(b"torn")
    with pytest.raises(StoreError, match="delete it and run again"):
        calibrate(cell_of(tmp_path))
    part.unlink()
    assert contents(calibrate(cell_of(tmp_path))) == contents(measured)


@pytest.mark.parametrize("content", [None, "[", "{}"])
def test_a_calibration_s_spec_that_was_lost_or_damaged_is_written_again(
    measured: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    shutil.copytree(folder_of(measured).parents[1], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(runner, "measure_statistics", refuse)
    monkeypatch.setattr(runner, "measure_pairs", refuse)
    cell = cell_of(tmp_path)
    spec = folder_of(cell) / "spec.json"
    before = spec.read_text()
    spec.unlink()
    if content is not None:
        spec.write_text(content)
    calibrate(cell)
    assert spec.read_text() == before
    assert contents(cell) == contents(measured)


def test_a_threshold_that_lacks_something_is_computed_again_from_its_records(
    measured: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder_of(measured).parents[1], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(runner, "measure_pairs", refuse)
    cell = cell_of(tmp_path)
    path = folder_of(cell) / "threshold.json"
    path.write_text(json.dumps({name: read_json(path)[name] for name in ("threshold", "mean", "std")}))
    assert not cell.is_calibrated
    calibrate(cell)
    assert cell.is_calibrated
    assert contents(cell) == contents(measured)


def test_what_is_cached_is_not_measured_again(measured: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure_statistics", refuse)
    monkeypatch.setattr(runner, "measure_pairs", refuse)
    root = folder_of(measured).parents[1]
    again = calibration_of(calibrate(cell_of(root, "method.theta=3")))
    assert again.threshold == calibration_of(measured).threshold


def test_with_a_threshold_only_statistics_are_measured(
    measured: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "measure_pairs", refuse)
    cell = calibrate(cell_of(tmp_path, "method.threshold=0.428"))
    assert calibration_of(cell).threshold == 0.428
    assert cell.spec.calibration is None
    assert contents(cell)["statistics.pt"] == contents(measured)["statistics.pt"]
    assert "threshold.json" not in contents(cell)


def test_with_published_statistics_only_the_threshold_is_measured(
    measured: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "measure_statistics", refuse)
    file = folder_of(measured) / "statistics.pt"
    cell = calibrate(cell_of(tmp_path, f"model.statistics={file}"))
    assert set(contents(cell)) == {"threshold.json"}
    found, expected = calibration_of(cell), calibration_of(measured)
    assert found.threshold == expected.threshold
    assert all(torch.equal(found.mean[layer], expected.mean[layer]) for layer in expected.mean)


def test_with_both_given_no_general_prompt_is_needed(measured: Cell, tmp_path: Path) -> None:
    file = folder_of(measured) / "statistics.pt"
    words = ["prompts.calibration=null", "method.threshold=0.3", f"model.statistics={file}"]
    cell = calibrate(cell_of(tmp_path, *words))
    found = calibration_of(cell)
    assert (found.threshold, found.prompts, cell.calibration_prompts) == (0.3, 0, [])
    assert not list(tmp_path.iterdir())
    for left_out in (words[:2], [words[0], words[2]]):
        with pytest.raises(ConfigError, match=r"needs general prompts, at least 2, given 0: set prompts\.calibration"):
            cell_of(tmp_path, *left_out)


def test_the_content_of_published_statistics_decides_the_result_and_not_their_place(
    measured: Cell, tmp_path: Path
) -> None:
    mean, std = read_statistics(folder_of(measured) / "statistics.pt")
    write_statistics(tmp_path / "a.pt", (mean, std))
    torch.save([mean, std], tmp_path / "b.pt")
    write_statistics(tmp_path / "c.pt", ([mean[0] + 1, *mean[1:]], std))
    a, b, c = (cell_of(tmp_path, f"model.statistics={tmp_path / name}.pt") for name in "abc")
    for of in (lambda cell: cell.id, folder_of):
        assert of(a) == of(b)
        assert len({of(a), of(c), of(measured)}) == 3
    assert str(tmp_path) not in a.spec.model_dump_json()
    for given in (["method.threshold=0.3"], []):
        ids = {cell_of(tmp_path, f"model.statistics={tmp_path / n}.pt", *given).id for n in "abc"}
        assert len(ids) == 2


def test_unusable_statistics_are_refused_before_anything_long(
    measured: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mean, std = read_statistics(folder_of(measured) / "statistics.pt")
    write_statistics(tmp_path / "short.pt", (mean[:-1], std[:-1]))
    monkeypatch.setattr(runner, "measure_pairs", refuse)
    with pytest.raises(ModelError, match=rf"of {len(mean) - 1} layers .* the model has {len(mean)} value layers"):
        calibrate(cell_of(tmp_path, f"model.statistics={tmp_path / 'short.pt'}"))
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", refuse)
    root = f"root={tmp_path / 'results'}"
    assert main(["calibrate", *SMALL, root, f"model.statistics={tmp_path / 'gone.pt'}"]) == 1
    assert "gone.pt: no activation statistics can be read" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_command_says_what_it_found_to_people_and_machines(
    measured: Cell, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_bench.benchmark.runner.load_model", refuse)
    folder = folder_of(measured)
    words = [*SMALL, f"root={folder.parents[1]}"]
    assert main(["calibrate", *words]) == 0
    text = capsys.readouterr().out
    about = read_json(folder / "threshold.json")
    for part in (f"threshold {about['threshold']:.4f}", f"{about['mean']:.4f} ± {about['std']:.4f}", "10 general"):
        assert part in text
    assert f"{folder}\n" in text
    assert main(["calibrate", "--json", *words]) == 0
    statistics = str(folder / "statistics.pt")
    general = "package:planted/prompts/calibration.txt"
    expected = {
        "model": "planted",
        **about,
        "statistics": statistics,
        "folder": str(folder),
        "general_prompts": general,
    }
    spec = read_json(folder / "spec.json")["general_prompts"]
    assert spec == {"file": general, "digest": prompts_digest(measured.calibration_prompts)}
    shares = {"pairs": about, "maxima": about["maxima"]}
    for gate, found in shares.items():
        assert f"gate={gate}: above {found['threshold']:.4f} are {found['passed_gate']} of these 10 prompts" in text
    assert json.loads(capsys.readouterr().out) == [expected]
    file = f"model.statistics={statistics}"
    assert main(["calibrate", "--json", *words, file, "method.threshold=0.428"]) == 0
    (given,) = json.loads(capsys.readouterr().out)
    assert (given["threshold"], given["mean"], given["prompts"], given["folder"]) == (0.428, None, 0, None)
    assert main(["calibrate", *words[:-2], words[-1], "method=none"]) == 1
    assert "method=nemo" in capsys.readouterr().err


def test_two_ranks_measure_the_same_bits(tmp_path: Path) -> None:
    script = tmp_path / "calibrate.py"
    imports = "from nemo_bench import cli\nfrom nemo_bench.benchmark.stages import base\n"
    script.write_text(f"{imports}base.CHUNK = 4\nraise SystemExit(cli.main())\n")
    # One prompt a pass, so that any number of ranks gives the UNet batches of one shape.
    words = ["calibrate", "--json", *SMALL, "batch_size=2"]
    found = []
    for number in (1, 2):
        root = tmp_path / str(number)
        command = [sys.executable, str(script), *words, f"root={root}", f"trainer.devices={number}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        (row,) = json.loads(done.stdout)
        folder = Path(row["folder"])
        assert len(list((folder / "records").glob("chunk.*.jsonl"))) == number
        files = [folder / "statistics.pt", folder / "threshold.json", *sorted((folder / "statistics").iterdir())]
        found.append({path.name: path.read_bytes() for path in files})
    assert len(found[0]) == 5
    assert found[0] == found[1]


def test_all_that_calibrating_lacks_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = ["model.source=someone/model", "model.local_files_only=true", "prompts.calibration=gone.txt"]
    assert main(["calibrate", *SMALL, *gone, "metrics=full", f"root={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "weights someone/model: " in said
    assert "general prompts gone.txt: " in said
    assert "metric " not in said
