"""The typed form of results: what is written is read back equal, and anything else is refused by file and place."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.errors import StoreError
from nemo_bench.records import schema
from nemo_bench.records.data import Kind, Localization, Neurons, Prompt
from nemo_bench.records.io import as_json, prompts_digest, read_file, write_json
from nemo_bench.records.schema import FILES, RECORDS, Entry, Layers, LocalizationRecord, Record, Sets, Spec
from nemo_bench.records.store import Store, read_cell_prompts, read_records, read_starts, write_prompts
from on_disk import read_json

FORMS = {name: form for name, (form, _) in FILES.items() if form}
HOLDING_ENTRIES = [name for name, form in FORMS.items() if form not in (Layers, Sets)]
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2028\x85\x1e\r\n"), max_size=5)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
PLAIN = {str: TEXT, float: FLOATS, int: st.integers(), bool: st.booleans(), NoneType: st.none(), Any: JSON}
LAYERS_OF_NEURONS = st.dictionaries(TEXT, st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=2)
LOCALIZATIONS = st.builds(
    Localization,
    LAYERS_OF_NEURONS.map(Neurons),
    LAYERS_OF_NEURONS.map(Neurons),
    FLOATS,
    threshold=FLOATS,
    passed_gate=st.none() | st.booleans(),
    listed=LAYERS_OF_NEURONS,
)


def values(form: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation of the schema."""
    of, inner = get_origin(form), get_args(form)
    if form in PLAIN:
        return PLAIN[form]
    if of is Literal:
        return st.sampled_from(inner)
    if of in (Union, UnionType):
        return st.one_of(map(values, inner))
    if of is list:
        return st.lists(values(inner[0]), max_size=2)
    if of is tuple:
        return st.tuples(*map(values, inner))
    if of is dict:
        return st.dictionaries(values(inner[0]), values(inner[1]), max_size=2)
    if form is Localization:
        return LOCALIZATIONS
    assert issubclass(form, Entry), form
    return entries(form)


def entries(kind: type[Entry]) -> st.SearchStrategy[Any]:
    """Entries with all fields that a class needs, and some of the others."""
    forms = get_type_hints(kind)
    fields = {name: values(forms[name]) for name in kind.model_fields}
    fields.pop("version", None)  # others than this one: test_versions.py
    needed = {name for name, field in kind.model_fields.items() if field.is_required()}
    drawn = st.fixed_dictionaries(
        {name: fields[name] for name in needed},
        optional={name: content for name, content in fields.items() if name not in needed},
    )
    return drawn.map(lambda content: kind(**content))


def whole(record: Record) -> Record:
    """A record as a stage writes it: with its result or why there is none, its picture's digest known."""
    changes: dict[str, Any] = {}
    if record.image is not None and not record.sha256:
        changes["sha256"] = "0" * 64
    if record.result and getattr(record, record.result) is None and record.failed is None:
        changes["failed"] = "not finite"
    return record.model_copy(update=changes)


def smallest(kind: type[Entry]) -> dict[str, Any]:
    """The content of a line or file that holds only what it must, as JSON."""
    content = {"str": "a", "int": 3, "float": 0.5, "bool": True}
    forms = get_type_hints(kind)
    needed = {name: forms[name] for name, field in kind.model_fields.items() if field.is_required()}
    found: dict[str, Any] = {}
    for name, form in needed.items():
        if get_origin(form) is list:
            inner = get_args(form)[0]
            found[name] = [smallest(inner)] if isinstance(inner, type) and issubclass(inner, Entry) else []
        elif get_origin(form) is dict:
            found[name] = {}
        elif get_origin(form) is Literal:
            found[name] = get_args(form)[0]
        else:
            found[name] = smallest(form) if issubclass(form, Entry) else content[form.__name__]
    if issubclass(kind, Record):
        found["failed"] = "not finite"
        if kind is schema.ScoreRecord:
            found["failed"] = {"ssim": "not finite"}
    return found


def test_every_class_of_records_is_listed_once_in_the_order_of_stages() -> None:
    written = [kind for kind in _subclasses(Record) if kind.stage]
    assert sorted(RECORDS, key=repr) == sorted(written, key=repr)
    assert len({kind.stage for kind in RECORDS}) == len(RECORDS)
    assert all(kind.result is None or kind.result in kind.model_fields for kind in RECORDS)


def _subclasses(kind: type[Record]) -> list[type[Record]]:
    return [found for sub in kind.__subclasses__() for found in (sub, *_subclasses(sub))]


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@given(st.data())
@settings(max_examples=25)
def test_a_written_line_is_read_back_equal(kind: type[Record], data: st.DataObject) -> None:
    drawn = data.draw(st.lists(entries(kind).map(whole), min_size=1, max_size=3, unique_by=lambda record: record.id))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.open(Spec(task="benchmark", settings={}))
        store.writer(kind)(drawn)
        assert list(read_records(store.folder, kind).values()) == drawn


@pytest.mark.parametrize("name", FORMS)
@given(st.data())
@settings(max_examples=25)
def test_a_written_file_is_read_back_equal(name: str, data: st.DataObject) -> None:
    content = data.draw(values(FORMS[name]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_json(path, content)
        assert read_file(path, FORMS[name]) == content
        assert json.loads(as_json(content)) == read_json(path)
        # Layers come in the order of the network.
        assert list(read_file(path, FORMS[name])) == list(content)


PROMPTS = st.builds(
    lambda id_, text, kind, files, words: Prompt(
        id_, text, kind, tuple(map(Path, files)), tuple(words), tuple(words), tuple(map(Path, files)), tuple(words)
    ),
    TEXT,
    TEXT,
    st.sampled_from([None, *get_args(Kind)]),
    st.lists(st.sampled_from(["/images/a.png", "/images/é b.jpg"]), max_size=2),
    st.lists(TEXT, max_size=2),
)


@given(st.lists(PROMPTS, min_size=1, max_size=3))
def test_written_prompts_are_read_back_equal(prompts: list[Prompt]) -> None:
    spec = Spec(task="benchmark", settings={"prompts": prompts_digest(prompts)})
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder), prompts)
        assert read_cell_prompts(Path(folder), spec) == prompts


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_a_line_with_an_unknown_or_missing_field_is_refused_by_file_and_line(
    tmp_path: Path, kind: type[Record]
) -> None:
    good = smallest(kind)
    path = tmp_path / "records" / f"{kind.stage}.0.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(good) + "\n")
    assert read_records(tmp_path, kind) == {"a": kind(**good)}
    needed = [name for name, field in kind.model_fields.items() if field.is_required()]
    wrong = {
        f"{name}: Field required": {key: value for key, value in good.items() if key != name} for name in needed
    } | {
        "seedz: Extra inputs are not permitted": {**good, "seedz": 1},
        "cost.secs: Extra inputs are not permitted": {**good, "cost": {"secs": 1.0}},
        "bytes: Input should be a valid integer": {**good, "bytes": "7"},
        "id: Input should be a valid string": {**good, "id": 7},
    }
    for words, bad in wrong.items():
        for after in ("", json.dumps({**good, "id": "c"}) + "\n"):  # a whole line is never taken for a torn one
            path.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n{after}")
            with pytest.raises(StoreError, match=re.escape(f"{path}, line 2 is no record of this stage ({words}")):
                read_records(tmp_path, kind)


@pytest.mark.parametrize("name", HOLDING_ENTRIES)
def test_a_file_with_an_unknown_or_missing_field_is_refused_by_name(tmp_path: Path, name: str) -> None:
    form, repair = FILES[name]
    kind = get_args(form)[-1] if get_origin(form) else form
    place = {list: "0.", dict: "a.", None: ""}[get_origin(form)]

    def held(entry: Any) -> Any:
        return {list: [entry], dict: {"a": entry}, None: entry}[get_origin(form)]

    path = tmp_path / name
    good = smallest(kind)
    path.write_text(json.dumps(held(good)))
    assert read_file(path, form) == held(kind(**good))
    needed = [name for name, field in kind.model_fields.items() if field.is_required()]
    wrong = {f"{name}: Field required": {k: v for k, v in good.items() if k != name} for name in needed}
    wrong["colour: Extra inputs are not permitted"] = {**good, "colour": "red"}
    for words, bad in wrong.items():
        path.write_text(json.dumps(held(bad)))
        expected = f"{path} does not hold what it should ({place}{words}); delete this one file: {repair}"
        with pytest.raises(StoreError, match=re.escape(expected)):
            read_file(path, form)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("layers.json", {"mid": "wide"}, "mid: Input should be a valid integer"),
        ("layers.json", ["mid"], "Input should be an object"),
        ("sets.json", {"all": {"fid": "x"}}, "all.fid: Input should be a valid number"),
        ("sets.json", {"all": 3.0}, "all: Input should be an object"),
        ("env.json", {}, "Input should be a valid array"),
    ],
)
def test_a_file_of_another_type_is_refused_by_name(tmp_path: Path, name: str, content: Any, words: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(content))
    expected = f"{path} does not hold what it should ({words}); delete this one file: {FILES[name][1]}"
    with pytest.raises(StoreError, match=re.escape(expected)):
        read_file(path, FORMS[name])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"id": "b"}, "a prompt with text: "),
        ({"id": "b", "text": "t", "colour": "red"}, "a prompt with colour: "),
        ({"id": "b", "text": "t", "kind": "XM"}, "a prompt with kind: Input should be 'VM', 'TM' or 'memorized'"),
    ],
)
def test_a_prompt_with_an_unknown_or_missing_field_is_refused_by_file(
    tmp_path: Path, line: dict[str, Any], words: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in ({"id": "a", "text": "t"}, line)))
    with pytest.raises(StoreError, match=re.escape(f"{path} does not hold what it should ({words}")):
        read_cell_prompts(tmp_path, Spec(task="benchmark", settings={}))


def test_fields_without_a_value_are_left_out_and_settings_without_one_kept(tmp_path: Path) -> None:
    spec = Spec(task="detect", settings={"limit": None, "method": {"file": None, "layers": [None]}})
    write_json(tmp_path / "spec.json", spec)
    content = read_json(tmp_path / "spec.json")
    assert content["settings"] == spec.settings
    assert content["schema"] == schema.VERSION
    assert not {"method", "detector", "calibration", "general_prompts", "version"} & content.keys()


def test_a_number_that_is_not_finite_is_written_as_null() -> None:
    record = LocalizationRecord(id="a", prompt="a", localization=Localization(gate_score=math.nan, threshold=math.inf))
    content = json.loads(as_json(record))["localization"]
    assert content["gate_score"] is content["threshold"] is None
    read = LocalizationRecord.model_validate_json(as_json(record), strict=True)
    assert read.localization == Localization(gate_score=0.0, threshold=0.0)


def test_a_cell_that_never_started_has_no_starts(tmp_path: Path) -> None:
    write_json(tmp_path / "env.json", [])
    with pytest.raises(StoreError, match=re.escape(f"{tmp_path / 'env.json'} does not hold what it should (no start)")):
        read_starts(tmp_path)
