"""Metrics of a prompt's localization."""

from nemo_bench.metrics import MemorizationScore, NeuronCount
from nemo_bench.records.data import Neurons


def test_localization_metrics_give_the_score_and_the_number_of_neurons() -> None:
    assert MemorizationScore().score(memorization=0.25).tolist() == [0.25]
    assert NeuronCount().score(localization=Neurons({"mid": [1, 2], "down": [7]})).tolist() == [3.0]
