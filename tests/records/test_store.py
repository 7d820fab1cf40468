"""Results on disk: nothing that was written is lost, nothing that was not is made up, whenever a process is killed."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from nemo_bench.errors import StoreError
from nemo_bench.records import store as store_module
from nemo_bench.records.io import as_json, read_file, replacing, write_json
from nemo_bench.records.schema import (
    VERSION,
    CalibrationRecord,
    Cost,
    DetectionRecord,
    ImageRecord,
    LocalizationRecord,
    MemorizationRecord,
    Record,
    ScoreRecord,
    Spec,
)
from nemo_bench.records.store import Store, read_records
from on_disk import read_json

SPEC = Spec(task="benchmark", settings={"model": "m", "steps": 3})
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\u2028\u2029\x85\x1e\r\n"\\{}é'), max_size=8)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = Store(tmp_path / "cell")
    opened.open(SPEC)
    return opened


def lines_of(store: Store, number: int, kind: type[Record] = DetectionRecord) -> Path:
    return store.folder / "records" / f"{kind.stage}.{number}.jsonl"


def record(name: str, **more: Any) -> DetectionRecord:
    return DetectionRecord(**{"id": name, "prompt": name, "score": 0.5, **more})


def with_text(name: str, text: str) -> DetectionRecord:
    return record(name, details={"text": text})


def image_record(name: str, **more: Any) -> ImageRecord:
    return ImageRecord(id=name, prompt=name, seed=0, **more)


def test_records_come_back_by_id(store: Store) -> None:
    detected = [record("a"), record("b", score=None, failed="not finite")]
    scored = ScoreRecord(id="a", prompt="a", seed=1, scores={"ssim": 2.0})
    store.writer(DetectionRecord)(detected)
    store.writer(ScoreRecord)([scored])
    assert store.records(DetectionRecord) == {"a": detected[0], "b": detected[1]}
    assert read_records(store.folder, ScoreRecord) == {"a": scored}
    assert store.records(LocalizationRecord) == {}


def test_a_torn_last_line_is_dropped_and_its_id_is_pending_again(store: Store) -> None:
    store.writer(DetectionRecord)([record("a"), record("b")])
    path = lines_of(store, 0)
    path.write_bytes(path.read_bytes()[:-9])
    assert set(store.records(DetectionRecord)) == {"a"}
    assert store.pending_ids(DetectionRecord, ["c", "b", "a"]) == ["c", "b"]
    store.writer(DetectionRecord)([record("b"), record("c")])
    assert set(store.records(DetectionRecord)) == {"a", "b", "c"}


@pytest.mark.parametrize("garbage", ["garbage", '{"id": "b", "sco', "[]", "7", '"id"', '{"score": 1}', ""])
def test_garbage_in_the_middle_is_an_error_that_names_file_and_line(store: Store, garbage: str) -> None:
    path = lines_of(store, 0)
    good = [as_json(record(name)) for name in "ac"]
    path.write_text(f"{good[0]}\n{garbage}\n{good[1]}\n")
    with pytest.raises(StoreError, match=re.escape(f"{path}, line 2 is no record")):
        store.records(DetectionRecord)


@pytest.mark.parametrize(
    "garbage", [b"garbage", b'{"id": "b", "sco', b"\0" * 9, b"\xff", as_json(record("b"))[:-2].encode()]
)
def test_a_damaged_line_is_set_aside_and_its_item_alone_is_pending(
    store: Store, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = lines_of(store, 0)
    good = [as_json(record(name)).encode() + b"\n" for name in "acd"]
    torn = b'{"id": "e", "sc'
    path.write_bytes(good[0] + garbage + b"\n" + good[1] + garbage + b"\n" + good[2] + torn)
    with pytest.raises(StoreError, match=r"sets it aside and computes its item again"):
        store.records(DetectionRecord)
    store.set_damaged_aside()
    assert store.pending_ids(DetectionRecord, "abcde") == ["b", "e"]
    assert path.with_name("detect.0.jsonl.damaged").read_bytes() == 2 * (garbage + b"\n")
    assert path.read_bytes() == b"".join(good)
    assert [f"{path}, line {number} is no" in said for number, said in zip((2, 4), caplog.messages, strict=True)]
    assert "it is in detect.0.jsonl.damaged now" in caplog.text
    store.set_damaged_aside()
    assert len(caplog.messages) == 2


def test_a_whole_file_is_not_written_again(store: Store) -> None:
    store.writer(DetectionRecord)([record("a")])
    store.writer(ScoreRecord)([ScoreRecord(id="a", prompt="a")])
    lines_of(store, 1).write_text("garbage\n" + as_json(record("b")))
    before = lines_of(store, 0).stat().st_mtime_ns, lines_of(store, 0).stat().st_ino
    store.set_damaged_aside()
    assert (lines_of(store, 0).stat().st_mtime_ns, lines_of(store, 0).stat().st_ino) == before
    assert set(store.records(DetectionRecord)) == {"a", "b"}


def test_a_disk_that_is_full_is_named_and_what_was_recorded_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store.writer(DetectionRecord)
    write([record("a")])

    def full(file: int) -> None:
        os.ftruncate(file, os.fstat(file).st_size - 9)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError) as told:
            write([record("b")])
    assert str(told.value) == (
        f"{lines_of(store, 0)} can't be written (No space left on device). All that was recorded is kept: free space "
        "on its disk, and the same command goes on"
    )
    assert set(store.records(DetectionRecord)) == {"a"}
    write([record("b")])  # never after half a line
    assert set(store.records(DetectionRecord)) == {"a", "b"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_small_disk_that_is_filled_made_read_only_and_taken_away(disk: Path) -> None:
    store = Store(disk / "cell")
    store.open(SPEC)
    write = store.writer(DetectionRecord)
    written: list[str] = []

    def fill() -> None:
        while True:
            write([with_text(str(len(written)), "x" * 1000)])
            written.append(str(len(written)))

    with pytest.raises(StoreError, match=r"detect\.0\.jsonl can't be written \(No space left.*free space on its disk"):
        fill()
    assert len(written) > 10
    assert set(store.records(DetectionRecord)) == {*written}
    with (
        pytest.raises(StoreError, match=r"a\.safetensors can't be written \(No space left"),
        replacing(store.folder / "a.safetensors") as part,
    ):
        save_file({"a": np.zeros(100_000)}, part)
    with pytest.raises(StoreError, match=r"a\.png can't be written \(No space left"):
        store.save_image("images/a.png", Image.effect_noise((400, 400), 50))
    assert not list(store.folder.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,ro,size=1m", disk], check=True)
    for act in (lambda: write([record("z")]), lambda: store.save_image("images/a.png", Image.new("L", (2, 2)))):
        with pytest.raises(StoreError, match=r"can't be written \(Read-only file system\).*make its folder writable"):
            act()
    subprocess.run(["mount", "-o", "remount,rw,size=1m", disk], check=True)
    write([record("z")])
    assert set(store.records(DetectionRecord)) == {*written, "z"}
    subprocess.run(["umount", "-l", disk], check=True)
    with pytest.raises(
        StoreError, match=r"can't be written \(No such file or directory\).*bring its disk or folder back"
    ):
        write([record("y")])
    subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)


def test_files_left_half_written_by_a_kill_are_removed_and_those_of_living_processes_stay(store: Store) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom nemo_bench.records.io import replacing\n"
        "with replacing(Path(sys.argv[1])) as part:\n    part.write_text('half')\n"
        "    print(part, flush=True)\n    sys.stdin.read()"
    )
    target = store.folder / "images" / "a.png"
    with subprocess.Popen(
        [sys.executable, "-c", code, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        part = Path(process.stdout.readline().strip())
        store.open(SPEC)
        assert part.read_text() == "half"
        process.kill()
    *_, process_id, _ = part.name.split(".")
    elsewhere = [part.with_name(f"{name}.png.00000000.{process_id}.part") for name in ("new", "old")]
    foreign = part.with_name("holiday.part")
    for path in (*elsewhere, foreign):
        path.write_text("half")
    os.utime(elsewhere[1], (0, 0))
    store.open(SPEC)
    assert {path for path in (part, *elsewhere, foreign) if path.exists()} == {elsewhere[0], foreign}


def test_equal_lines_count_once_whatever_their_cost(store: Store) -> None:
    first, second = store.writer(DetectionRecord), store.writer(DetectionRecord)
    first([record("a", cost=Cost(seconds=1.0))])
    second([record("a", cost=Cost(seconds=9.0)), record("a"), record("b")])
    assert set(store.records(DetectionRecord)) == {"a", "b"}
    assert store.records(DetectionRecord)["a"].cost == Cost(seconds=1.0)


def test_lists_that_differ_by_rounding_are_equal_and_others_are_not(store: Store) -> None:
    def pairs(*values: float) -> list[CalibrationRecord]:
        return [CalibrationRecord(id="a", prompt="a", pairs=list(values))]

    first, second = store.writer(CalibrationRecord), store.writer(CalibrationRecord)
    first(pairs(0.5, 0.25))
    second(pairs(0.5, 0.2500001))
    assert store.records(CalibrationRecord)["a"].pairs == [0.5, 0.25]
    store.writer(CalibrationRecord)(pairs(0.5, 0.3))
    with pytest.raises(StoreError, match="different results for a"):
        store.records(CalibrationRecord)


def test_different_lines_for_an_id_are_an_error_that_names_both_files(store: Store) -> None:
    first, second = store.writer(DetectionRecord), store.writer(DetectionRecord)
    first([record("a")])
    second([record("b"), record("a", score=0.6)])
    with pytest.raises(StoreError, match="different results for a; delete the one that is wrong") as error:
        store.records(DetectionRecord)
    assert str(lines_of(store, 0)) in str(error.value)
    assert str(lines_of(store, 1)) in str(error.value)


def test_every_writer_has_a_file_of_its_own_made_at_the_first_call(store: Store) -> None:
    writers = [store.writer(DetectionRecord) for _ in range(3)]
    assert not list((store.folder / "records").iterdir())
    for number in (2, 0, 2):
        writers[number]([record(f"w{number}")])
    assert sorted(path.name for path in (store.folder / "records").iterdir()) == [
        "detect.0.jsonl",
        "detect.1.jsonl",
    ]
    assert lines_of(store, 0).read_text().count('"id":"w2"') == 2
    assert lines_of(store, 1).read_text().count('"id":"w0"') == 1


def test_a_file_left_by_an_earlier_process_is_never_appended_to(store: Store) -> None:
    # Its last line may be torn: what is appended to it would be lost with it.
    lines_of(store, 0).write_text(as_json(record("a")) + '\n{"id": "b", "sc')
    store.writer(DetectionRecord)([record("b")])
    assert lines_of(store, 0).read_text().endswith('"sc')
    assert set(store.records(DetectionRecord)) == {"a", "b"}


@given(st.lists(TEXT, min_size=1, max_size=5))
@settings(max_examples=30)
def test_any_text_survives(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.open(SPEC)
        written = [with_text(str(number), text) for number, text in enumerate(texts)]
        store.writer(DetectionRecord)(written)
        assert list(store.records(DetectionRecord).values()) == written


def test_line_separators_of_unicode_do_not_split_a_line(store: Store) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\r\neight\rnine"
    store.writer(DetectionRecord)([with_text("a", text), record("b")])
    assert store.records(DetectionRecord)["a"].details == {"text": text}
    assert set(store.records(DetectionRecord)) == {"a", "b"}


@given(st.lists(st.tuples(st.integers(0, 2), TEXT), min_size=1, max_size=6), st.data())
@settings(max_examples=40, deadline=None)
def test_a_kill_loses_no_complete_record_and_invents_none(split: list[tuple[int, str]], data: st.DataObject) -> None:
    written = [(writer, with_text(f"r{number}", text)) for number, (writer, text) in enumerate(split)]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.open(SPEC)
        writers = [store.writer(DetectionRecord) for _ in range(3)]
        for writer, line in written:
            writers[writer]([line])
        torn = data.draw(st.sampled_from(sorted((store.folder / "records").iterdir())))
        content = torn.read_bytes()
        kept = content[: data.draw(st.integers(0, len(content)))]
        torn.write_bytes(kept)

        # What counts as complete: all bytes of the object are there, with or without the end of the line.
        lost = {json.loads(line)["id"] for line in content.split(b"\n")[:-1] if line not in kept.split(b"\n")}
        expected = {line.id: line for _, line in written if line.id not in lost}
        assert store.records(DetectionRecord) == expected

        names = [line.id for _, line in written]
        missing = store.pending_ids(DetectionRecord, names)
        assert missing == [name for name in names if name in lost]
        store.writer(DetectionRecord)([line for _, line in written if line.id in missing])
        store.finish(DetectionRecord, names)
        assert store.records(DetectionRecord) == {line.id: line for _, line in written}


def test_an_id_whose_image_was_deleted_is_pending_again(store: Store) -> None:
    image = Image.new("RGB", (4, 4), "red")
    names = [store.save_image(f"images/{i}.png", image) for i in "ab"]
    written = [image_record(i, image=name) for i, name in zip("ab", names, strict=True)]
    store.writer(ImageRecord)([*written, image_record("c", failed="not finite")])
    assert store.pending_ids(ImageRecord, "abc") == []
    (store.folder / names[0]).unlink()
    assert store.pending_ids(ImageRecord, "abc") == ["a"]
    with pytest.raises(StoreError, match="1 of 3 records of 'generate' are missing"):
        store.finish(ImageRecord, "abc")


def test_an_image_is_saved_whole(store: Store) -> None:
    image = Image.new("RGB", (5, 3), (1, 2, 3))
    assert store.save_image("images/a.png", image) == "images/a.png"
    with Image.open(store.folder / "images/a.png") as saved:
        assert saved.size == (5, 3)
        assert saved.getpixel((4, 2)) == (1, 2, 3)
    assert [path.name for path in (store.folder / "images").iterdir()] == ["a.png"]


def other_spec(**settings: Any) -> Spec:
    return Spec(task="benchmark", settings=settings)


def test_open_again_takes_the_same_configuration_only(store: Store) -> None:
    written = (store.folder / "spec.json").read_bytes()
    Store(store.folder).open(other_spec(steps=3, model="m").model_copy(update={"title": "spelled otherwise"}))
    with pytest.raises(StoreError, match=r"another configuration \(differing: settings.seeds, settings.steps\)"):
        Store(store.folder).open(other_spec(model="m", steps=4, seeds=1))
    with pytest.raises(StoreError, match=r"differing: settings.model"):
        Store(store.folder).open(other_spec(steps=3))
    assert (store.folder / "spec.json").read_bytes() == written
    assert read_file(store.folder / "spec.json", Spec) == SPEC
    content = read_json(store.folder / "spec.json")
    assert (content["schema"], content["settings"]) == (VERSION, SPEC.settings)


def test_what_json_makes_equal_is_the_same_configuration(store: Store) -> None:
    other = Store(store.folder.with_name("other"))
    other.open(other_spec(seeds=(1, 2)))
    other.open(other_spec(seeds=[1, 2]))


def test_a_foreign_folder_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("photos")
    with pytest.raises(StoreError, match=r"not empty and holds no spec\.json"):
        Store(tmp_path).open(SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").write_text("left by a system")
    Store(tmp_path / "empty").open(SPEC)


def test_a_kill_while_the_folder_is_made_can_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, content: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path / "cell").open(SPEC)
    Store(tmp_path / "cell").open(SPEC)


def test_a_deleted_folder_of_images_is_made_again(store: Store) -> None:
    (store.folder / "images").rmdir()
    store.open(SPEC)
    store.save_image("images/a.png", Image.new("RGB", (2, 2)))


def test_finish_recounts_and_forget_starts_over(store: Store) -> None:
    scored = ScoreRecord(id="a", prompt="a")
    store.writer(DetectionRecord)([record("a")])
    store.writer(ScoreRecord)([scored])
    with pytest.raises(StoreError, match="1 of 2 records of 'detect' are missing; run the command again"):
        store.finish(DetectionRecord, iter("ab"))
    assert not store.is_done(DetectionRecord)
    store.writer(DetectionRecord)([record("b")])
    store.finish(DetectionRecord, iter("ab"))
    assert store.is_done(DetectionRecord)
    assert not store.is_done(ScoreRecord)
    assert read_json(store.folder / "detect.done") == {"records": 2}
    store.forget(DetectionRecord)
    assert not store.is_done(DetectionRecord)
    assert store.records(DetectionRecord) == {}
    assert store.records(ScoreRecord) == {"a": scored}


def test_write_json_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in ({"a": [1, None, "é\u2028"]}, [2]):
        write_json(path, content)
        assert read_json(path) == content
    with pytest.raises(ValueError, match="unknown type"):
        write_json(path, {"a": object()})
    assert read_json(path) == [2]
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_file_that_is_missing_or_torn_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone\.json is missing"):
        read_file(tmp_path / "gone.json", Spec)
    (tmp_path / "torn.json").write_bytes(b'{"a": "\xff')
    with pytest.raises(StoreError, match=r"torn\.json does not hold what it should \(Invalid JSON"):
        read_file(tmp_path / "torn.json", Spec)


@pytest.mark.parametrize(
    ("kind", "content", "result"),
    [
        (CalibrationRecord, {"prompt": "a", "pairs": [0.5]}, "pairs"),
        (LocalizationRecord, {"prompt": "a", "localization": {}}, "localization"),
        (MemorizationRecord, {"prompt": "a", "score": 0.5}, "score"),
        (ImageRecord, {"prompt": "a", "seed": 0, "image": "images/a_00.png"}, "image"),
        (DetectionRecord, {"prompt": "a", "score": 0.5}, "score"),
    ],
)
def test_a_record_lacks_its_result_only_where_it_says_why_it_failed(
    store: Store, kind: type[Record], content: dict[str, Any], result: str
) -> None:
    file = lines_of(store, 0, kind)
    whole = {"id": "1", **content}
    lacking = {key: value for key, value in whole.items() if key != result}
    for good in (whole, {**lacking, "failed": "not finite"}):
        file.write_text(json.dumps(good) + "\n")
        assert read_records(store.folder, kind) == {"1": kind(**good)}
    for bad in (lacking, {**lacking, result: None}):
        file.write_text(json.dumps(bad) + "\n")
        words = f"{file}, line 1: the record 1 has no {result} that it should; the command that made it"
        with pytest.raises(StoreError, match=re.escape(words)):
            read_records(store.folder, kind)


def test_the_records_of_a_stage_are_parsed_once_until_one_of_its_files_changes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[list[str]] = []
    parse = store_module._parse

    def counted(files: Iterable[Path], kind: type[Record]) -> object:
        names = [path.name for path in files]
        parsed.append(names)
        return parse([store.folder / "records" / name for name in names], kind)

    monkeypatch.setattr(store_module, "_parse", counted)
    first, second = store.writer(DetectionRecord), store.writer(DetectionRecord)
    first([record("a")])
    known = read_records(store.folder, DetectionRecord)
    assert read_records(store.folder, DetectionRecord) is known
    assert store.pending_ids(DetectionRecord, "ab") == ["b"]
    assert parsed == [["detect.0.jsonl"]]

    # Files of other stages do not matter.
    store.writer(ScoreRecord)([ScoreRecord(id="a", prompt="a")])
    assert read_records(store.folder, DetectionRecord) is known

    # A line more, a new file, other content of the same size, a file less.
    first([record("b")])
    assert set(store.records(DetectionRecord)) == {"a", "b"}
    second([record("c")])
    assert set(store.records(DetectionRecord)) == {"a", "b", "c"}
    file = lines_of(store, 1)
    time = file.stat().st_mtime_ns
    file.write_text(as_json(record("d")) + "\n")
    os.utime(file, ns=(time + 1, time + 1))
    assert set(store.records(DetectionRecord)) == {"a", "b", "d"}
    file.unlink()
    assert set(store.records(DetectionRecord)) == {"a", "b"}
    assert parsed[1:] == [["detect.0.jsonl"], *[["detect.0.jsonl", "detect.1.jsonl"]] * 2, ["detect.0.jsonl"]]
