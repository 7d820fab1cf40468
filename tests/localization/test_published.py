"""The published CSV of localizations: written, read, and refused with the line where it is wrong."""

from __future__ import annotations

import ast
import csv
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench.errors import NemoBenchError
from nemo_bench.localization.published import (
    COLUMNS,
    PublishedRow,
    by_name,
    by_position,
    published_text,
    read_published,
)
from nemo_bench.records.data import Neurons

# As the published scripts write it: pandas' "nan" for an unknown URL, carriage returns, neurons listed twice.
WRITTEN_BY_SCRIPTS = (
    "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM\r\n"
    'The "One; Two" Podcast;https://a.example/1.jpg;[[3, 17, 3], [], [5]];0.4218;[[3, 3], [], []];0.3\r\n'
    '"Rug; ""blue""";nan;[[], [], []];0;[[], [], []];0\r\n'
).replace('The "One; Two" Podcast', '"The ""One; Two"" Podcast"')


def test_files_of_the_published_scripts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "memorization_statistics.csv"
    path.write_bytes(WRITTEN_BY_SCRIPTS.encode())
    first, second = read_published(path)
    assert first == PublishedRow(
        'The "One; Two" Podcast', "https://a.example/1.jpg", ((3, 17, 3), (), (5,)), 0.4218, ((3, 3), (), ()), 0.3
    )
    assert (second.caption, second.initial, second.initial_score) == ('Rug; "blue"', ((), (), ()), 0.0)


LAYERS = st.lists(st.lists(st.integers(0, 1279), max_size=4).map(tuple), min_size=3, max_size=3).map(tuple)
CAPTIONS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1)
SCORES = st.floats(-1, 1)


@settings(deadline=None)
@given(st.lists(st.builds(PublishedRow, CAPTIONS, CAPTIONS, LAYERS, SCORES, LAYERS, SCORES), min_size=1, max_size=4))
def test_written_rows_are_read_back(rows: list[PublishedRow]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "neurons.csv")
        path.write_bytes(published_text(rows).encode())
        assert read_published(path) == rows


def test_written_files_have_the_form_of_the_published_scripts() -> None:
    row = PublishedRow("a; b", "", ((3, 17), (), (5,)), 0.4, ((3,), (), ()), 0.3)
    (cells,) = csv.DictReader(published_text([row]).splitlines(), delimiter=";")
    assert tuple(cells) == COLUMNS
    assert cells["Caption"] == "a; b"
    assert ast.literal_eval(cells["Initial Neurons"]) == [[3, 17], [], [5]]
    assert cells["Refined Neurons"] == "[[3], [], []]"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Refined SSIM", "Score", ["line 2", "no column 'Refined SSIM'", "Initial SSIM"]),
        ("[[3, 17, 3], [], [5]]", "[[3, 17, 3], []", ["line 2", "Initial Neurons is '[[3, 17, 3], []'"]),
        ("[[3, 17, 3], [], [5]]", "[3, 17, 3]", ["line 2", "Initial Neurons"]),
        ("[[3, 17, 3], [], [5]]", "[]", ["line 2", "Initial Neurons"]),
        ("[[3, 17, 3], [], [5]]", "[[3, 1.5], [], [5]]", ["line 2", "Initial Neurons"]),
        ("[[3, 17, 3], [], [5]]", "[[3, true], [], [5]]", ["line 2", "Initial Neurons"]),
        ("[[3, 3], [], []]", "[[-3], [], []]", ["line 2", "Refined Neurons is '[[-3], [], []]'"]),
        ("[[3, 3], [], []]", "__import__('os').getcwd()", ["line 2", "Refined Neurons"]),
        ("[[3, 3], [], []]", "[[3, 3], []]", ["line 2", "2 layers, but of 3"]),
        ("[[], [], []];0;[[], [], []]", "[[], []];0;[[], []]", ["line 3", "2 layers, but of 3"]),
        ("0.4218", "high", ["line 2", "Initial SSIM is 'high'"]),
        ("0.4218", "nan", ["line 2", "Initial SSIM is 'nan'"]),
        ("https://a.example/1.jpg", "a;b", ["line 2", "7 cells, but 6 columns"]),
    ],
)
def test_a_wrong_cell_is_an_error_that_names_file_line_and_column(
    tmp_path: Path, old: str, new: str, said: list[str]
) -> None:
    path = tmp_path / "p.csv"
    assert old in WRITTEN_BY_SCRIPTS
    path.write_bytes(WRITTEN_BY_SCRIPTS.replace(old, new).encode())
    with pytest.raises(NemoBenchError) as caught:
        read_published(path)
    for part in (str(path), *said):
        assert part in str(caught.value)


def test_positions_are_layers_in_network_order() -> None:
    widths = {"down": 4, "deeper": 8, "mid": 16}
    neurons = Neurons({"mid": [15, 2], "down": [3]})
    assert by_position(neurons, widths) == ((3,), (), (2, 15))
    assert by_name(((3, 3), (), (15, 2)), widths) == neurons


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (((), ()), "neurons of 2 layers, but the model has 3"),
        (((4,), (), ()), "neuron 4 of layer 'down', which has 4"),
    ],
)
def test_neurons_of_another_model_are_refused(layers: tuple[tuple[int, ...], ...], said: str) -> None:
    with pytest.raises(NemoBenchError, match=said):
        by_name(layers, {"down": 4, "deeper": 8, "mid": 16})
