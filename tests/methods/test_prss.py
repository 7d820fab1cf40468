from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from batches import batch_of, images_of
from nemo_bench import ConfigError, Diffusion, Prompt
from nemo_bench.diffusion import Step
from nemo_bench.diffusion.noise import masked_magnitude
from nemo_bench.errors import PromptError
from nemo_bench.methods import AMG, PRSS, BrightEndingOptimization, EmbeddingOptimization
from nemo_bench.methods.bright_ending import bright_ending
from nemo_bench.methods.prss import read_paraphrases

WORDINGS = ("fox sun", "red map", "dog", "big hat cup")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "paraphrases.jsonl"
    lines = [{"caption": "red sun map", "caption2": WORDINGS[1], "caption1": WORDINGS[0]}, {"caption": "ice jam"}]
    lines[0].update({"caption10": WORDINGS[3], "caption3": WORDINGS[2]})
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    return str(path)


def magnitudes(model: Diffusion, latents: torch.Tensor, texts: tuple[str, ...]) -> list[float]:
    rows = len(texts)
    return model.text_noise(latents.expand(rows, -1, -1, -1), 981, model.encode(texts)).flatten(1).norm(dim=1).tolist()


def test_re_anchoring_as_worked_out_by_hand() -> None:
    # One number a row: m = 2, 3, 4, 5, 8 with g 7.5 give r = -, 1, 4.25, 7.5, 7.5.
    chosen = torch.tensor([2.0, 3.0, 4.0, 5.0, 8.0])[:, None, None, None] + 1
    unconditional, anchor = torch.ones_like(chosen), torch.full_like(chosen, 10.0)
    found = PRSS().reanchored(7.5, unconditional, chosen, anchor).flatten().tolist()
    expected = [1 + 7.5 * 2, 1 + 7.5 * 3, 10 + 4.25 * (5 - 10) + 3.25 * 4, 10 + 7.5 * (6 - 10), 10 + 7.5 * (9 - 10)]
    assert found == pytest.approx(expected)


def test_the_published_form_of_r_is_the_same() -> None:
    g, low, high = 7.5, 3.0, 5.0
    a = (g * low - high) / (g - 1)
    assert a == pytest.approx(2.692, abs=1e-3)
    for m in (3.1, 3.9, 4.6, 5.0, 7.0):
        r = min(g * (m - a) / (high - a), g)
        one = torch.ones(1, 1, 1, 1)
        found = float(PRSS().reanchored(g, 0 * one, m * one, -2 * one))
        assert found == pytest.approx(-2 + r * (m + 2) + (g - r) * m, rel=1e-5)


def test_reanchoring_without_transition_is_the_papers_form() -> None:
    chosen = torch.tensor([3.0, 3.1])[:, None, None, None]
    found = PRSS(anchor_full=3.0).reanchored(5.0, 0 * chosen, chosen, 0 * chosen + 1).flatten().tolist()
    assert found == pytest.approx([5 * 3.0, 1 + 5 * 2.1])


@pytest.mark.parametrize("target", ["above all", "third", "none"])
def test_the_first_wording_below_the_target_is_taken_or_else_the_least(tiny: Diffusion, file: str, target: str) -> None:
    batch = batch_of(tiny, [(0, 0)], ["red sun map"])
    values = magnitudes(tiny, batch.latents, ("red sun map", *WORDINGS))
    limit = {"above all": max(values) + 1, "third": sorted(values)[1] + 1e-2, "none": 0.0}[target]
    below = [i for i, value in enumerate(values) if value <= limit]
    expected = below[0] if below else values.index(min(values))
    assert below or 0 < expected < len(WORDINGS), "the least should be neither the prompt nor the last wording"
    before = tiny.row_passes
    with PRSS(file, limit).apply(tiny, batch) as changed:
        notes = {"triggered": values[0] > limit, "paraphrase": expected, "reached": bool(below)}
        assert changed.notes == (notes,)
        wording = ("red sun map", *WORDINGS)[expected]
        torch.testing.assert_close(changed.text.text, tiny.encode([wording]).text)
    # The empty prompt and the prompt, then wordings until one is enough.
    assert tiny.row_passes - before == 1 + 1 + (below[0] if below else 4)


def test_an_image_below_the_target_is_the_same_and_costs_nothing_more(tiny: Diffusion, file: str) -> None:
    batch = batch_of(tiny, [(0, 0), (1, 0)], ["red sun map", "ice jam"])
    plain = tiny.generate(batch.text, batch.latents)
    for method in (PRSS(file, 1e9, missing="none"), PRSS(search_target=1e9)):
        before = tiny.row_passes
        assert torch.equal(images_of(tiny, method, batch), plain)
        assert tiny.row_passes - before <= 2 * (2 + tiny.passes_per_image)


def test_images_are_anchored_on_their_own(tiny: Diffusion, file: str) -> None:
    texts = ["red sun map", "ice jam"]
    batch = batch_of(tiny, [(0, 0), (1, 0), (0, 1)], texts)
    method = PRSS(file, max(magnitudes(tiny, batch.latents[1:2], ("ice jam",))) + 1e-2, 0.0, 1e-3, missing="none")
    with method.apply(tiny, batch) as changed:
        triggered = [note["triggered"] for note in changed.notes]
    assert len(set(triggered)) == 2, "choose other texts"
    together, plain = images_of(tiny, method, batch), tiny.generate(batch.text, batch.latents)
    for row in range(3):
        assert torch.equal(together[row], plain[row]) != triggered[row]
        alone = images_of(tiny, method, batch.rows([row]))
        torch.testing.assert_close(together[[row]], alone, rtol=0, atol=5e-3)


@pytest.mark.parametrize(("above", "anchored"), [(0.0, True), (1e6, False)])
def test_each_step_of_an_anchored_image_takes_one_more_pass(tiny: Diffusion, above: float, anchored: bool) -> None:
    batch, before = batch_of(tiny, [(0, 0)]), tiny.row_passes
    images_of(tiny, PRSS(search_target=0.0, anchor_from=above, anchor_full=above, steps=2), batch)
    assert tiny.row_passes - before == (1 + 2 * 2) + (3 if anchored else 2) * tiny.steps


def test_the_anchor_is_the_prompt_and_the_paraphrase_is_approached(tiny: Diffusion, file: str) -> None:
    """What a step takes off, against predictions for the prompt, its paraphrase and the empty prompt."""
    batch, method = batch_of(tiny, [(0, 0)], ["red sun map"]), PRSS(file, 0.0, anchor_from=0.5, anchor_full=20.0)
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []

    with method.apply(tiny, batch) as changed:
        rule = changed.rule
        assert rule

        def watched(step: Step) -> torch.Tensor:
            noise = rule(step)
            taken.append((step.latents, noise))
            return noise

        replace(changed, rule=watched).generate_checked(tiny)
    wording = WORDINGS[changed.notes[0]["paraphrase"] - 1]
    assert len(taken) == tiny.steps
    for (latents, noise), timestep in zip(taken, tiny.timesteps(), strict=True):
        chosen, anchor = (tiny.predict_noise(latents, timestep, tiny.encode([t])) for t in (wording, "red sun map"))
        empty = tiny.predict_noise(latents, timestep, tiny.unconditional(1))
        expected = method.reanchored(tiny.guidance, empty, chosen, anchor)
        torch.testing.assert_close(noise, expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(noise, empty + tiny.guidance * (chosen - empty), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_file_embeddings_are_optimized(tiny: Diffusion, masked: bool) -> None:
    batch = batch_of(tiny, [(0, 0)])
    kind = BrightEndingOptimization(0.0, 2) if masked else EmbeddingOptimization(0.0, 2, images=None)
    with kind.apply(tiny, batch) as expected:
        text = expected.text.text
    with PRSS(search_target=0.0, steps=2, bright_ending=masked).apply(tiny, batch) as changed:
        torch.testing.assert_close(changed.text.text, text, rtol=0, atol=1e-3)
        assert changed.notes == ({"steps": 2, "reached": False, "triggered": True},)


def test_search_under_the_mask_takes_the_least_masked_magnitude(tiny: Diffusion, file: str) -> None:
    batch = batch_of(tiny, [(0, 0)], ["red sun map"])
    mask = bright_ending(tiny, batch.prompts, batch.text, batch.latents)
    texts = ("red sun map", *WORDINGS)
    added = tiny.text_noise(batch.latents.expand(5, -1, -1, -1), 981, tiny.encode(texts))
    values = masked_magnitude(added, mask.expand(5, -1, -1)).tolist()
    with PRSS(file, 0.0, bright_ending=True).apply(tiny, batch) as changed:
        assert changed.notes[0]["paraphrase"] == values.index(min(values))


def test_paraphrases_are_read_in_their_order(file: str, tmp_path: Path) -> None:
    assert read_paraphrases(Path(file)) == {"red sun map": WORDINGS}
    listed = tmp_path / "listed.jsonl"
    listed.write_text('{"text": "a", "paraphrases": ["b", "c"]}\n')
    assert read_paraphrases(listed) == {"a": ("b", "c")}
    table = tmp_path / "table.csv"
    table.write_text("prompt,caption1,caption2\na,b,\n")
    assert read_paraphrases(table) == {"a": ("b",)}


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (['{"text": "a", "paraphrases": [1]}'], "line 1: paraphrases"),
        (['{"text": "a", "caption1": "b"}', '{"text": "a", "caption1": "c"}'], "line 2: other paraphrases"),
    ],
)
def test_malformed_paraphrases_are_errors(tmp_path: Path, lines: list[str], named: str) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(PromptError, match=named):
        read_paraphrases(path)


def test_title_without_a_file_names_the_substitute(file: str) -> None:
    assert (PRSS(file).title, PRSS().title) == ("PRSS", "PRSS by optimization")
    assert AMG("sscd.pt").title + " by pixels" == AMG().title


def test_prompts_missing_in_the_file_are_an_error_unless_allowed(file: str) -> None:
    prompts = [Prompt("a", "red sun map"), Prompt("b", "ice jam")]
    with pytest.raises(ConfigError, match=r"no paraphrases for 1 of 2 prompts \(first: 'b'\)"):
        PRSS(file).fingerprint(prompts)
    assert set(PRSS(file, missing="none").fingerprint(prompts)) == {"file"}
    assert PRSS().fingerprint(prompts) == {}


def test_full_anchoring_before_its_start_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"anchor_full=5\.0; expected at least anchor_from=6\.0"):
        PRSS(anchor_from=6.0)
