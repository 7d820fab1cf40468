"""Methods that start from found neurons: sources of sources, the published CSV of a cell, and its reuse."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_bench import ConfigError, Neurons, read_prompts, resolve
from nemo_bench.benchmark.pending import pending_work
from nemo_bench.benchmark.plan import plan
from nemo_bench.benchmark.run import run
from nemo_bench.config import grid
from nemo_bench.localization.published import by_name, read_published
from nemo_bench.records.results import load_results
from on_disk import read_json, read_records
from small_runs import small


@pytest.fixture(scope="module")
def prompts() -> str:
    """Path of the planted prompts, of which the first two are taken."""
    return resolve("package:planted/prompts/planted.jsonl")


def words(root: Path, prompts: str, *more: str) -> list[str]:
    return [
        *small(seeds=1, steps=2),
        "name=reuse",
        f"root={root}",
        f"prompts.files=[{prompts}]",
        "prompts.limit=2",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prompts: str) -> Path:
    """Shared neurons of two sizes, and random ones in place of found and of shared ones; NeMo is not asked for."""
    root = tmp_path_factory.mktemp("reuse")
    methods = (["method=random,random_shared"], ["method=shared", "method.k=2,100"])
    return run(plan([c for more in methods for c in grid(words(root, prompts, *more))]), "test")


def cells(folder: Path, method: str) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name.split("__")[1] == method)


def neurons(cell: Path) -> dict[str, Neurons]:
    records = read_records(cell, "localize").values()
    return {record["prompt"]: Neurons(record["localization"]["neurons"]) for record in records}


def test_shared_neurons_are_those_found_by_a_source_nobody_asked_for(finished: Path) -> None:
    (nemo,) = cells(finished, "nemo")
    found = neurons(nemo)
    assert any(found.values())
    assert not read_records(nemo, "generate")
    union = Neurons()
    for own in found.values():
        union |= own
    few, many = sorted((neurons(cell) for cell in cells(finished, "shared")), key=lambda n: n["vm-01"].count)
    assert set(few) == set(many) == set(found)
    (two,), (all_of_them,) = set(few.values()), set(many.values())
    assert two.count == 2
    assert not two - union
    assert all_of_them == union if union.count <= 100 else all_of_them.count == 100


def test_random_neurons_follow_a_source_that_has_a_source(finished: Path) -> None:
    (source,), (control,) = cells(finished, "sharedneurons"), cells(finished, "random_shared")
    (found,), (drawn,) = set(neurons(source).values()), set(neurons(control).values())
    assert found.count == drawn.count == 10
    assert {name: len(ids) for name, ids in found.items()} == {name: len(ids) for name, ids in drawn.items()}
    assert not set(found.items()) & set(drawn.items())
    assert (drawn - found).count == 10


def test_rows_of_one_method_are_told_apart(finished: Path) -> None:
    assert {cell.label for cell in load_results(finished).cells} == {
        "Random neurons · random",
        "Random neurons · random_shared",
        "Shared neurons · k 2",
        "Shared neurons · k 100",
    }


def test_a_finished_cell_has_the_published_form_of_what_it_found(finished: Path, tmp_path: Path, prompts: str) -> None:
    for method in ("shared", "random_shared"):
        cell = cells(finished, method)[0]
        rows, widths = read_published(cell / "neurons.csv"), read_json(cell / "layers.json")
        assert [row.caption for row in rows] == [prompt.text for prompt in read_prompts(prompts, limit=2)]
        assert [by_name(row.refined, widths) for row in rows] == list(neurons(cell).values())
    folder = run(plan(grid(words(tmp_path, prompts, "method=none"))), "test")
    (none,) = cells(folder, "none")
    assert not (none / "neurons.csv").exists()


def test_neurons_of_the_reference_protocol_are_written_as_the_scripts_write_them(tmp_path: Path, prompts: str) -> None:
    """Candidates in the order of selection, those found in two ways twice, and the link of the list."""
    (prompt,) = read_prompts(prompts, limit=1)
    listed = tmp_path / "listed.csv"
    listed.write_text(f"id;caption;url;type\np;{prompt.text};https://me:secret@a.example/1.jpg;VM\n")
    short = ["method.theta=4", "method.theta_min=3", "method.theta_step=0.5", "method.initial_k=1"]
    own = words(tmp_path, str(listed), "method=nemo", "method.protocol=reference", *short)
    (nemo,) = cells(run(plan(grid(own)), "test"), "nemo")
    (row,), widths = read_published(nemo / "neurons.csv"), read_json(nemo / "layers.json")
    (record,) = read_records(nemo, "localize").values()
    found = record["localization"]
    assert row.url == "https://a.example/1.jpg"
    assert row.initial == tuple(tuple(found["listed_initial"].get(layer, ())) for layer in widths)
    assert row.refined == tuple(tuple(found["listed"].get(layer, ())) for layer in widths)
    assert by_name(row.initial, widths) == Neurons(found["initial"])
    assert by_name(row.refined, widths) == Neurons(found["neurons"])
    assert any(len(ids) > len(set(ids)) for ids in row.initial), "no neuron is found in two ways"
    assert any(list(ids) != sorted(ids) for ids in row.initial)
    saved = words(tmp_path, str(listed), "method=saved", f"method.file={nemo / 'neurons.csv'}")
    (again,) = cells(run(plan(grid(saved)), "test"), "saved")
    assert neurons(again) == neurons(nemo)


@pytest.mark.parametrize("kind", ["csv", "cell"])
def test_what_was_found_is_blocked_again(finished: Path, tmp_path: Path, prompts: str, kind: str) -> None:
    before = cells(finished, "shared")[0]
    file = before if kind == "cell" else shutil.copy(before / "neurons.csv", tmp_path / "old.csv")
    chosen = plan(grid(words(tmp_path, prompts, "method=saved", f"method.file='{file}'")))
    folder = run(chosen, "test")
    again = folder / chosen[0].id
    assert neurons(again) == neurons(before)
    images = [sorted((cell / "images").glob("*.png")) for cell in (before, again)]
    assert [image.read_bytes() for image in images[0]] == [image.read_bytes() for image in images[1]]
    assert str(file) not in (again / "spec.json").read_text()
    moved = file.parent / f"moved-{kind}.csv" if kind == "csv" else tmp_path / "moved"
    (shutil.copy if kind == "csv" else shutil.copytree)(file, moved)
    renamed = plan(grid(words(tmp_path, prompts, "method=saved", f"method.file='{moved}'")))
    assert [not any(records.values()) for _, records in pending_work(renamed)] == [True]


def test_prompts_without_saved_neurons_are_found_before_anything_loads(finished: Path, prompts: str) -> None:
    file = cells(finished, "shared")[0] / "neurons.csv"
    more = ["method=saved", f"method.file='{file}'", "prompts.limit=3"]
    with pytest.raises(ConfigError, match="no neurons for 1 of 3 prompts"):
        plan(grid(words(finished.parent, prompts, *more)))
    assert plan(grid(words(finished.parent, prompts, *more, "method.missing=none")))
    with pytest.raises(ConfigError, match="saved neurons need a file"):
        plan(grid(words(finished.parent, prompts, "method=saved")))
