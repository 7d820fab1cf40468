"""Neurons from files of every kind, by prompt, and what the hash of a cell takes from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_bench import ConfigError, Diffusion, Localization, NemoBenchError, Neurons, Prompt
from nemo_bench.localization.published import PublishedRow, by_position, published_text
from nemo_bench.methods import SavedNeurons

A, B, OTHER = Prompt("a", "red sun map"), Prompt("b", "fox"), Prompt("c", "hat")


@pytest.fixture
def found(tiny: Diffusion) -> dict[str, Localization]:
    """What was found before for A and B."""
    first, *_, last = tiny.value_layers
    refined, initial = Neurons({first: [1]}), Neurons({first: [1, 2], last: [3]})
    return {
        "a": Localization(refined, initial, initial_score=0.25, refined_score=0.375),
        "b": Localization(),
    }


@pytest.fixture(params=["published", "cell"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, tiny: Diffusion, found: dict[str, Localization]) -> Path:
    """The same in a published CSV, and in the folder of a cell."""
    if request.param == "published":
        path = tmp_path / "old.csv"
        path.write_text(published_text(rows(tiny, found)))
        return path
    folder = tmp_path / "cell"
    (folder / "records").mkdir(parents=True)
    records = [
        {
            "id": f"0{prompt.id}",
            "prompt": prompt.id,
            "localization": {
                "neurons": dict(found[prompt.id].neurons),
                "initial": dict(found[prompt.id].initial),
                "gate_score": 0.0,
                "initial_score": found[prompt.id].initial_score,
                "refined_score": found[prompt.id].refined_score,
                "threshold": 0.0,
            },
            "cost": {"seconds": 1.0},
        }
        for prompt in (A, B)
    ]
    lines(folder / "records" / "localize.0.jsonl", records)
    lines(folder / "prompts.jsonl", [{"id": p.id, "text": p.text, "references": []} for p in (A, B)])
    return folder


def rows(model: Diffusion, found: dict[str, Localization]) -> list[PublishedRow]:
    def row(prompt: Prompt) -> PublishedRow:
        own, widths = found[prompt.id], model.masks.widths
        initial, refined = by_position(own.initial, widths), by_position(own.neurons, widths)
        return PublishedRow(prompt.text, "", initial, own.initial_score, refined, own.refined_score)

    return [row(A), row(B)]


def lines(path: Path, content: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in content))


def localize(model: Diffusion, method: SavedNeurons, prompt: Prompt) -> Localization:
    return method.localize(model, prompt, model.latents([0, 1]))


def test_saved_localizations_are_read_again(tiny: Diffusion, saved: Path, found: dict[str, Localization]) -> None:
    method = SavedNeurons(str(saved))
    for prompt in (A, B):
        expected, result = found[prompt.id], localize(tiny, method, prompt)
        # Published files say it by their candidates, records by themselves.
        passed = bool(expected.initial) if saved.suffix == ".csv" else expected.passed_gate
        assert result == replace(expected, passed_gate=passed)
    before = localize(tiny, SavedNeurons(str(saved), neurons="initial"), A)
    assert (before.neurons, before.refined_score) == (found["a"].initial, 0.25)


def test_fingerprint_follows_the_content_and_not_the_path(tmp_path: Path, saved: Path) -> None:
    def fingerprint(path: Path) -> Any:
        return SavedNeurons(str(path)).fingerprint([A, B])

    before = fingerprint(saved)
    moved = saved.rename(tmp_path / f"moved{saved.suffix}")
    assert fingerprint(moved) == before
    changed = moved / "records" / "localize.0.jsonl" if moved.is_dir() else moved
    assert "[1]" in changed.read_text()
    changed.write_text(changed.read_text().replace("[1]", "[2]"))
    assert fingerprint(moved) != before


def test_missing_prompt_is_an_error_unless_allowed(tiny: Diffusion, saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"no neurons for 1 of 3 prompts \(first: 'c'\).*missing=none"):
        SavedNeurons(str(saved)).fingerprint([A, OTHER, B])
    lenient = SavedNeurons(str(saved), missing="none")
    assert lenient.fingerprint([A, OTHER]) != lenient.fingerprint([A, B])
    assert localize(tiny, lenient, OTHER) == Localization()


def test_prompt_of_the_same_id_and_another_text_is_missing(saved: Path) -> None:
    with pytest.raises(ConfigError, match="no neurons for 1 of 1 prompts"):
        SavedNeurons(str(saved)).fingerprint([A._replace(text="another")])


@pytest.mark.parametrize("name", ["set.json", "set.safetensors"])
def test_one_set_for_all_prompts(tiny: Diffusion, tmp_path: Path, found: dict[str, Localization], name: str) -> None:
    found["a"].initial.save(tmp_path / name)
    method = SavedNeurons(str(tmp_path / name))
    assert localize(tiny, method, A).neurons == localize(tiny, method, OTHER).neurons == found["a"].initial
    assert method.fingerprint([A, OTHER])


def test_a_published_cluster_is_one_set_with_empty_layers_of_floats(tiny: Diffusion, tmp_path: Path) -> None:
    path, (first, *_, last) = tmp_path / "neurons_cluster_3.npz", tiny.value_layers
    np.savez(path, np.array([5, 2]), *[np.array([])] * 5, np.array([3]))
    method = SavedNeurons(str(path))
    assert localize(tiny, method, A).neurons == Neurons({first: [2, 5], last: [3]})
    assert method.fingerprint([A, OTHER])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([np.array([0.5])] + [np.array([])] * 6, "arr_0 is no list of whole numbers"),
        ([np.array([99])] + [np.array([])] * 6, "neuron 99 of layer"),
        ([np.array([1])], "neurons of 1 layers"),
    ],
)
def test_a_cluster_of_another_form_or_model_is_refused(
    tiny: Diffusion, tmp_path: Path, layers: list[np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "c.npz", *layers)
    with pytest.raises(NemoBenchError, match=message):
        localize(tiny, SavedNeurons(str(tmp_path / "c.npz")), A)
    (tmp_path / "broken.npz").write_text("no numbers")
    with pytest.raises(NemoBenchError, match="expected arrays arr_0, arr_1"):
        localize(tiny, SavedNeurons(str(tmp_path / "broken.npz")), A)


def test_lines_of_one_prompt_must_agree(tmp_path: Path, tiny: Diffusion, found: dict[str, Localization]) -> None:
    first, second = rows(tiny, found)
    path = tmp_path / "twice.csv"
    path.write_text(published_text([first, second, first]))
    SavedNeurons(str(path)).fingerprint([A, B])
    path.write_text(published_text([first, second._replace(caption=first.caption)]))
    with pytest.raises(NemoBenchError, match="two lines of other neurons for the prompt 'red sun map'"):
        SavedNeurons(str(path)).fingerprint([A])


def test_neurons_of_another_model_are_refused(tmp_path: Path, tiny: Diffusion) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(published_text([PublishedRow(A.text, "", ((1279,),) * 7, 0.0, ((1279,),) * 7, 0.0)]))
    method = SavedNeurons(str(path))
    method.fingerprint([A])
    with pytest.raises(NemoBenchError, match="neuron 1279 of layer"):
        localize(tiny, method, A)


def test_unreadable_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="saved neurons need a file"):
        SavedNeurons().fingerprint([A])
    with pytest.raises(NemoBenchError, match="holds no localization"):
        SavedNeurons(str(tmp_path)).fingerprint([A])
    with pytest.raises(NemoBenchError, match="no such file"):
        SavedNeurons(str(tmp_path / "gone.csv")).fingerprint([A])
