"""Clusters by hand, and the neurons that are united."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_bench import ConfigError, Localization, NeMo, Neurons, Prompt
from nemo_bench.diffusion import Conditioning
from nemo_bench.errors import NotFiniteError
from nemo_bench.methods import ClusterNeurons, Setup
from nemo_bench.methods.cluster_neurons import k_means, squared_distances

NEURONS = {
    "a": Neurons({"x": [1]}),
    "b": Neurons({"x": [2], "y": [5]}),
    "c": Neurons({"y": [6]}),
    "d": Neurons({"y": [7]}),
    "general": Neurons({"x": [9]}),
}
PLACES = {"a": 0.0, "b": 1.0, "c": 50.0, "d": 51.0, "general": 2.0, "new": 45.0}
PROMPTS = [Prompt(name, name, None if name == "general" else "VM") for name in NEURONS]
#: Encodes a prompt as the place of its name on a line.
MODEL: Any = SimpleNamespace(
    encode=lambda texts: Conditioning(torch.tensor([[[PLACES[text]]] for text in texts])),
)


def united(name: str, **options: Any) -> Neurons:
    method = ClusterNeurons(NeMo(), clusters=options.pop("clusters", 2), **options)
    localizations = {key: Localization(neurons) for key, neurons in NEURONS.items()}
    method.setup(MODEL, Setup(source_localizations=localizations, source_prompts=PROMPTS))
    return method.localize(MODEL, Prompt(name, name)).neurons


def test_neurons_of_a_cluster_are_united_without_those_of_other_prompts() -> None:
    near, far = Neurons({"x": [1, 2], "y": [5]}), Neurons({"y": [6, 7]})
    assert [united(name) for name in ("a", "b", "c", "d")] == [near, near, far, far]
    assert united("general") == near
    assert united("new") == far


def test_as_many_clusters_as_prompts_leave_each_its_own() -> None:
    assert [united(name, clusters=9) for name in "abcd"] == [NEURONS[name] for name in "abcd"]
    assert united("a", clusters=1) == NEURONS["a"] | NEURONS["b"] | NEURONS["c"] | NEURONS["d"]


def test_groups_by_chance_have_the_sizes_of_the_clusters_and_the_prompts_own_neurons() -> None:
    mixed = False
    for seed in range(4):
        groups = {name: united(name, random=True, seed=seed) for name in "abcd"}
        assert all(not (NEURONS[name] - groups[name]).count for name in "abcd")
        assert sorted(sum(group == other for other in groups.values()) for group in groups.values()) == [2] * 4
        mixed = mixed or groups["a"] != groups["b"]
    assert mixed


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_row_is_nearest_to_its_own_centre_which_is_the_mean_of_its_rows(data: st.DataObject) -> None:
    values = st.lists(st.integers(-50, 50), min_size=2, max_size=2)
    rows = np.asarray(data.draw(st.lists(values, min_size=1, max_size=12)), dtype=float)
    clusters = data.draw(st.integers(1, len(rows)))
    centres, labels = k_means(rows, clusters, seed=data.draw(st.integers(0, 9)))
    distances = squared_distances(rows, centres)
    assert (distances[range(len(rows)), labels] <= distances.min(1) + 1e-9).all()
    for cluster in set(labels.tolist()):
        np.testing.assert_allclose(centres[cluster], rows[labels == cluster].mean(0))


@pytest.mark.parametrize("options", [{"clusters": 0}, {"seed": -1}])
def test_argument_out_of_range_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected greater than or equal to"):
        ClusterNeurons(NeMo(), **options)


def test_without_neurons_there_is_nothing_to_unite() -> None:
    with pytest.raises(ConfigError, match="call setup with the localizations"):
        ClusterNeurons(NeMo()).localize(MODEL, PROMPTS[0])
    method = ClusterNeurons(NeMo())
    found = {"general": Localization()}
    method.setup(MODEL, Setup(source_localizations=found, source_prompts=PROMPTS))
    with pytest.raises(NotFiniteError, match="failed for all memorized prompts"):
        method.localize(MODEL, PROMPTS[0])
