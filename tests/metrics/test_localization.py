"""Metrics of a prompt's localization."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_bench.metrics import (
    MemorizationScore,
    NeuronAveragePrecision,
    NeuronCount,
    NeuronF1,
    NeuronPrecision,
    NeuronRecall,
    RecallAtTrueNumber,
    TrainingLoss,
)
from nemo_bench.records.data import Neurons


def test_localization_metrics_give_the_score_and_the_number_of_neurons() -> None:
    assert MemorizationScore().score(memorization=0.25).tolist() == [0.25]
    assert TrainingLoss().score(loss=0.5).tolist() == [0.5]
    assert NeuronCount().score(localization=Neurons({"mid": [1, 2], "down": [7]})).tolist() == [3.0]


def test_sets_are_compared_layer_by_layer() -> None:
    truth, found = Neurons({"down": [1, 2], "mid": [3, 4]}), Neurons({"down": [2, 9], "mid": [1, 2, 4]})
    assert NeuronRecall().score(localization=found, truth=truth).tolist() == [0.5]
    assert NeuronPrecision().score(localization=found, truth=truth).item() == pytest.approx(0.4)
    assert NeuronF1().score(localization=found, truth=truth).item() == pytest.approx(4 / 9)


def test_recall_of_the_published_example() -> None:
    truth, found = Neurons({"mid": [1, 2, 3, 4]}), Neurons({"mid": [2, 4, 9, 10]})
    assert NeuronRecall().score(localization=found, truth=truth).tolist() == [0.5]


def test_without_neurons_nothing_is_found() -> None:
    fields = {"localization": Neurons(), "truth": Neurons({"mid": [1]})}
    assert [kind().score(**fields).item() for kind in (NeuronPrecision, NeuronRecall, NeuronF1)] == [0, 0, 0]


def test_rankings_are_judged_over_all_layers() -> None:
    # True neurons are in places 0, 3 and 4 of five: of the first three one is true.
    ranking = {"down": np.array([3, 1]), "mid": np.array([0, 4, 2])}
    truth = Neurons({"down": [0], "mid": [0, 1]})
    assert RecallAtTrueNumber().score(ranking=ranking, truth=truth).item() == pytest.approx(1 / 3)
    expected = (1 / 1 + 2 / 4 + 3 / 5) / 3
    assert NeuronAveragePrecision().score(ranking=ranking, truth=truth).item() == pytest.approx(expected)


@given(st.permutations(range(8)), st.sets(st.integers(0, 7), min_size=1))
def test_average_precision_is_the_mean_of_precisions_at_true_neurons(places: list[int], true: set[int]) -> None:
    ranking = {"a": np.array(places[:3]), "b": np.array(places[3:])}
    truth = Neurons({"a": [i for i in true if i < 3], "b": [i - 3 for i in true if i >= 3]})
    own = sorted(places[i] + 1 for i in true)
    expected = np.mean([(number + 1) / place for number, place in enumerate(own)])
    assert NeuronAveragePrecision().score(ranking=ranking, truth=truth).item() == pytest.approx(expected, rel=1e-5)
