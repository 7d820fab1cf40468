"""Results of older versions: read as this one, brought to its form by whoever writes on; newer ones are refused."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nemo_bench
from fake_results import write_fake_results
from nemo_bench.benchmark.runner import open_folder
from nemo_bench.cli import main
from nemo_bench.errors import VersionError
from nemo_bench.records import io, schema
from nemo_bench.records.data import Localization, Neurons, Prompt
from nemo_bench.records.io import as_json, read_file, read_whole, stated_version
from nemo_bench.records.results import load_results
from nemo_bench.records.schema import DetectionRecord, LocalizationRecord, Run, Spec, Start
from nemo_bench.records.store import Store, read_cell_prompts, read_records, read_spec, read_starts, write_prompts
from older_results import two_versions
from on_disk import read_json, write_json

OLD_LINES = (
    '{"id":"a3","cost":{"seconds":3.1,"row_passes":512.0},"prompt":"vm-01","neurons":{"mid_block.attentions.0":[3,7]},'
    '"initial":{"mid_block.attentions.0":[3,7,9]},"gate_score":0.6,"initial_score":0.1,"refined_score":0.11,'
    '"threshold":0.12,"passed_gate":true,"exhausted":false,"listed":{"mid_block.attentions.0":[7,3]},'
    '"listed_initial":{}}\n'
    '{"id":"b3","failed":"noise differences are not finite","prompt":"vm-02","initial":{},"listed":{},'
    '"listed_initial":{}}\n'
)
OLD_STARTS = """{
  "starts": [
    {
      "time": "2026-11-23T17:00:00+00:00",
      "command": "nemo-bench run prompts=planted",
      "world_size": 1,
      "device": "cpu",
      "python": "",
      "settings": {},
      "versions": {
        "torch": "2.15.0"
      }
    }
  ]
}
"""
"""What the code of commit 5ca334e^ wrote."""


def old_cell(folder: Path) -> Store:
    store = Store(folder)
    store.open(Spec(task="benchmark", settings={"seeds": 2}))
    write_json(folder / "spec.json", {**read_json(folder / "spec.json"), "schema": 1})
    (folder / "records" / "localize.0.jsonl").write_text(OLD_LINES)
    (folder / "env.json").write_text(OLD_STARTS)
    write_prompts(folder, [Prompt("vm-01", "one\u2028line", "VM"), Prompt("vm-02", "another")])
    return store


def check(folder: Path) -> None:
    read = read_records(folder, LocalizationRecord)
    assert read["a3"].localization == Localization(
        Neurons({"mid_block.attentions.0": [3, 7]}),
        Neurons({"mid_block.attentions.0": [3, 7, 9]}),
        gate_score=0.6,
        initial_score=0.1,
        refined_score=0.11,
        threshold=0.12,
        passed_gate=True,
        exhausted=False,
        listed={"mid_block.attentions.0": (7, 3)},
    )
    assert (read["b3"].localization, read["b3"].failed) == (None, "noise differences are not finite")
    assert [start.versions for start in read_starts(folder)] == [{"torch": "2.15.0"}]
    spec = read_spec(folder)
    assert spec.version == 2
    assert [prompt.text for prompt in read_cell_prompts(folder, spec)] == ["one\u2028line", "another"]


def test_an_older_form_of_this_project_is_read_and_brought_to_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    two_versions(monkeypatch)
    caplog.set_level(logging.INFO)
    store = old_cell(tmp_path / "cell")
    before = contents(store.folder)
    check(store.folder)
    assert contents(store.folder) == before  # a reader writes nothing
    (store.folder / "records" / "localize.0.jsonl").write_text(OLD_LINES + "garbage\n" + '{"id": "c", "pro')
    times = {path: path.stat().st_mtime_ns for path in store.folder.glob("**/*.json*")}
    store.open(Spec(task="benchmark", settings={"seeds": 2}))
    store.upgrade()
    store.set_damaged_aside()
    check(store.folder)
    store.writer(LocalizationRecord)([LocalizationRecord(id="d", prompt="d", failed="not finite")])
    assert set(store.records(LocalizationRecord)) == {"a3", "b3", "d"}
    assert read_json(store.folder / "spec.json")["schema"] == 2
    assert isinstance(read_json(store.folder / "env.json"), list)
    assert '"localization"' in (store.folder / "records" / "localize.0.jsonl").read_text()
    same = [path for path in times if path.name != "localize.0.jsonl"]  # garbage was set aside
    assert {path: path.stat().st_mtime_ns for path in same} == {path: times[path] for path in same}
    assert f"{store.folder}: from version 1 of results to 2" in caplog.messages
    after = contents(store.folder)
    store.upgrade()
    assert contents(store.folder) == after


@pytest.mark.parametrize("left", [None, "{", '{"schema": 2, "task": "benchmark"}'])
def test_records_of_a_lost_spec_are_kept_whatever_their_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str | None
) -> None:
    two_versions(monkeypatch)
    spec = Spec(task="benchmark", settings={"seeds": 2})
    store = old_cell(tmp_path / "cell")
    store.writer(LocalizationRecord)([LocalizationRecord(id="d", prompt="d", failed="not finite")])
    if left is None:
        (store.folder / "spec.json").unlink()
    else:
        (store.folder / "spec.json").write_text(left)
    store.open(spec, is_named=True)
    check(store.folder)
    store.upgrade()
    store.set_damaged_aside()
    check(store.folder)
    assert set(store.records(LocalizationRecord)) == {"a3", "b3", "d"}
    assert not list(store.folder.glob("records/*.damaged"))
    empty = Store(tmp_path / "empty")
    empty.folder.mkdir()
    empty.open(spec, is_named=True)
    assert stated_version(empty.folder / "spec.json") == 2


def test_what_an_upgrade_raises_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, content: Any) -> Any:
        raise ValueError(f"no {name} has been thought of")

    two_versions(monkeypatch)
    store = old_cell(tmp_path / "cell")
    spec = read_spec(store.folder)
    monkeypatch.setattr(schema, "UPGRADES", {1: fail})
    for act in (
        lambda: store.records(LocalizationRecord),
        store.set_damaged_aside,
        lambda: read_starts(store.folder),
        lambda: read_cell_prompts(store.folder, spec),
    ):
        with pytest.raises(ValueError, match="has been thought of"):
            act()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_version_is_stated_in_one_way() -> None:
    stating = [form for form, _ in schema.FILES.values() if "version" in getattr(form, "model_fields", ())]
    assert Spec in stating
    assert all(issubclass(form, schema.Versioned) for form in stating)


def test_every_older_version_has_an_upgrade() -> None:
    assert [*schema.UPGRADES] == [*range(1, schema.VERSION)]


TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2028\r\n"), max_size=5)
DETECTIONS = st.builds(
    DetectionRecord,
    id=TEXT,
    prompt=TEXT,
    score=st.floats(allow_nan=False, allow_infinity=False),
    details=st.none() | st.dictionaries(TEXT, st.integers() | st.booleans(), max_size=2),
)


def renamed(old: str, new: str) -> Any:
    def step(name: str, content: Any) -> Any:
        is_old = name == "detect" and isinstance(content, dict) and old in content
        return {new if key == old else key: value for key, value in content.items()} if is_old else content

    return step


def line_of(record: DetectionRecord, version: int) -> str:
    """A record as versions 1 and 2 would have written it, which called its score otherwise, or as 3 does."""
    return re.sub('"score":', f'"{("value", "result", "score")[version - 1]}":', as_json(record), count=1)


class Killed(BaseException):
    pass


@given(
    st.lists(st.tuples(DETECTIONS, st.integers(1, 3)), min_size=1, unique_by=lambda pair: pair[0].id),
    st.integers(1, 3),
    st.integers(0, 4),
)
@settings(max_examples=60)
def test_lines_of_every_version_are_read_equal_before_while_and_after_they_are_upgraded(
    drawn: list[tuple[DetectionRecord, int]], oldest: int, survived: int
) -> None:
    drawn = [(record, max(version, oldest)) for record, version in drawn]
    expected = {record.id: record for record, _ in drawn}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as place:
        patch.setattr(schema, "VERSION", 3)
        patch.setattr(schema, "UPGRADES", {1: renamed("value", "result"), 2: renamed("result", "score")})
        store = Store(Path(place) / "cell")
        store.open(Spec(task="detect", settings={}))
        write_json(store.folder / "spec.json", {**read_json(store.folder / "spec.json"), "schema": oldest})
        for number, (record, version) in enumerate(drawn):
            file = store.folder / "records" / f"detect.{number % 3}.jsonl"
            with file.open("a", encoding="utf-8", newline="\n") as opened:
                opened.write(line_of(record, version) + "\n")
        assert store.records(DetectionRecord) == expected
        with pytest.MonkeyPatch.context() as killing:
            left = iter(range(survived))
            whole = io.in_this_version

            def until_killed(*given: Any) -> bytes:
                if next(left, None) is None:
                    raise Killed
                return whole(*given)

            killing.setattr("nemo_bench.records.store.in_this_version", until_killed)
            try:
                store.upgrade()
            except Killed:
                assert stated_version(store.folder / "spec.json") == oldest
        assert store.records(DetectionRecord) == expected
        store.upgrade()
        assert store.records(DetectionRecord) == expected
        assert stated_version(store.folder / "spec.json") == 3
        lines = [line for path in store.folder.glob("records/*") for line in path.read_bytes().splitlines()]
        assert sorted(map(json.loads, lines), key=str) == sorted((json.loads(as_json(r)) for r, _ in drawn), key=str)


def newer(path: Path) -> None:
    write_json(path, {**read_json(path), "schema": schema.VERSION + 1})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    written = write_fake_results(tmp_path / "written", methods={"none": "No mitigation", "nemo": "NeMo"})
    return written.rename(tmp_path / "results")  # where this process has read nothing yet


@pytest.mark.parametrize("of", ["cell", "run"])
@pytest.mark.parametrize("command", [["report"], ["status"], ["track", "logger=csv"], ["score", "trainer=cpu"]])
def test_a_newer_version_is_refused_by_every_command_and_stays_as_it_is(
    run: Path, capsys: pytest.CaptureFixture[str], of: str, command: list[str]
) -> None:
    path = run / "run.json" if of == "run" else next(run.glob("*__nemo__*")) / "spec.json"
    newer(path)
    before = contents(run)
    assert main([command[0], str(run), *command[1:]]) != 0
    shown = " ".join("".join(capsys.readouterr()).split())
    known = f"nemo-bench {nemo_bench.__version__} knows versions up to {schema.VERSION}"
    remedy = "update it (pip install --upgrade nemo-bench), or choose another name=... or root=..."
    assert shown == f"nemo-bench: {path} has version {schema.VERSION + 1} of results, and {known}; {remedy}"
    assert contents(run) == before


def test_a_newer_cell_is_never_opened_upgraded_or_taken_for_damaged(run: Path) -> None:
    store = Store(next(run.glob("*__nemo__*")))
    spec = read_spec(store.folder)
    newer(store.folder / "spec.json")
    before = contents(run)
    for act in (
        lambda: store.open(spec),
        lambda: store.open(spec, is_named=True),
        store.upgrade,
        store.set_damaged_aside,
        lambda: open_folder(run, []),
        lambda: read_whole(store.folder / "metrics.json", schema.Summary),
        lambda: read_file(store.folder / "env.json", list[Start]),
        lambda: read_cell_prompts(store.folder, spec),
        lambda: read_records(store.folder, LocalizationRecord),
    ):
        with pytest.raises(VersionError, match=re.escape(f"{store.folder / 'spec.json'} has version 2 of results")):
            act()
    assert contents(run) == before


@pytest.mark.parametrize("stated", ["2", 0, -1, True, None, 1.0, [1]])
def test_what_is_no_version_is_damage(run: Path, stated: Any) -> None:
    path = next(run.glob("*__nemo__*")) / "spec.json"
    write_json(path, {**read_json(path), "schema": stated})
    (why,) = load_results(run).unfinished.values()
    assert why.startswith(f"{path} does not hold what it should (schema: ")


def test_every_folder_and_table_states_its_version(run: Path) -> None:
    assert main(["report", str(run)]) == 0
    stated: Mapping[str, int] = {
        str(path.relative_to(run)): content["schema"]
        for path in run.rglob("*.json")
        if "schema" in (content := read_json(path))
    }
    cells = [f"{path.name}/spec.json" for path in run.iterdir() if (path / "spec.json").is_file()]
    assert stated == dict.fromkeys([*cells, "run.json", "leaderboard.json"], schema.VERSION)
    assert len(cells) == 2
    assert read_file(run / "run.json", Run).version == schema.VERSION
